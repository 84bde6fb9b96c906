from pathlib import Path

import pytest

from apportion.data.humaneval import HumanEval
from apportion.evaluate.samples import Sample, cut, read_samples
from command_line import write_jsonl

STOPS = HumanEval.stops


def test_samples_of_a_problem_are_numbered_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "2"), ("a", "3")]
    path = write_jsonl(tmp_path / "s.jsonl", [{"task_id": name, "completion": text} for name, text in rows])
    assert read_samples(path, {"a", "b"}) == [
        Sample(task_id="a", number=0, completion="1"),
        Sample(task_id="b", number=0, completion="2"),
        Sample(task_id="a", number=1, completion="3"),
    ]


def test_a_name_may_be_a_number(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [{"task_id": 11, "completion": ""}])
    assert [sample.task_id for sample in read_samples(path, {"11"})] == ["11"]


def test_a_number_may_be_written_as_a_folder_of_apps(tmp_path: Path) -> None:
    names = ("0001", "1", "0000", "0007")
    path = write_jsonl(tmp_path / "s.jsonl", [{"task_id": name, "completion": ""} for name in names])
    samples = read_samples(path, {"0", "1", "0007", "7"})
    assert [(sample.task_id, sample.number) for sample in samples] == [("1", 0), ("1", 1), ("0", 0), ("0007", 0)]


def test_the_example_of_a_name_is_the_same_each_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [{"task_id": "0009", "completion": ""}])
    for known in (["10", "2", "3"], ["3", "10", "2"]):
        with pytest.raises(ValueError, match="there is no problem '0009'; names are such as '2'; give more"):
            read_samples(path, known, "; give more")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "a"}, "line 2: a sample has a task_id and a completion of text"),
        ({"completion": ""}, "line 2: a sample has a task_id"),
        ({"task_id": "a", "completion": None}, "line 2: a sample has a task_id"),
        ({"task_id": "HumanEval/999", "completion": ""}, "line 2: there is no problem 'HumanEval/999'; .* as 'a'"),
    ],
)
def test_a_malformed_line_is_told_by_its_number(row: dict, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [{"task_id": "a", "completion": ""}, row])
    with pytest.raises(ValueError, match=message):
        read_samples(path, {"a": None})


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no samples"):
        read_samples(tmp_path / "s.jsonl", {"a"})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return 1\n\ndef g():\n    pass", "    return 1\n"),
        ("    return 1\nprint(f(1))", "    return 1"),
        ("    if x:\n        return 1\n", "    if x:\n        return 1\n"),
        ("    return 1\n# done\nif a:", "    return 1"),
        ("    # a comment inside\n    return 1", "    # a comment inside\n    return 1"),
        ("Here:\n```python\nx = 1\ndef f():\n    pass\n```", "Here:\n```python\nx = 1\ndef f():\n    pass\n```"),
    ],
)
def test_a_completion_ends_where_the_function_does(text: str, kept: str) -> None:
    assert cut(text, STOPS) == kept


def test_a_body_before_a_fence_ends_where_the_function_does() -> None:
    """The fence is of what was said about it; the program is the body."""
    text = "    return 1\n\ndef g():\n    pass\n```\nI hope that this helps."
    assert cut(text, STOPS, "def f():\n") == "    return 1\n"


def test_without_stops_a_completion_stays_whole() -> None:
    assert cut("x\ndef f(): pass", ()) == "x\ndef f(): pass"
