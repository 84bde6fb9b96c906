from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from apportion.data.humaneval import HumanEval
from apportion.data.problems import Problem, answer
from apportion.score.programs import run_many
from command_line import write_jsonl


@pytest.fixture(scope="module")
def problems(shared: Path) -> list[Problem]:
    return HumanEval(path=str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz")).problems("test")


def test_names_are_the_official_ones_and_answers_continue_the_prompt(problems: list[Problem]) -> None:
    assert [problem.task_id for problem in problems] == [f"HumanEval/{number}" for number in range(164)]
    assert all(problem.head == problem.prompt and problem.solutions for problem in problems)


def test_some_references_pass_and_empty_bodies_do_not(problems: list[Problem]) -> None:
    some = problems[::20]
    references = run_many([(answer(p.solutions[0], p.head).program, p.tests) for p in some])
    assert [outcome.passed for outcome in references] == [1] * len(some)
    assert [outcome.passed for outcome in run_many([(p.head + "    pass\n", p.tests) for p in some])] == [0] * len(some)


def test_rows_to_fine_tune_on_are_prompt_and_reference(
    shared: Path, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz")
    rows = HumanEval(path=path, part="sft", eval_rows=20)(tokenizer)
    assert (len(rows["train"]), len(rows["eval"])) == (33, 20)  # 0.2 of 164 is 32.8
    known = {problem.prompt: problem.solutions[0] for problem in problems}
    assert all(known[row["prompt"]] == row["completion"] for row in rows["train"].to_list())


def test_a_problem_without_a_test_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"task_id": "a/0", "prompt": "def f():\n", "test": "def check(f):\n    assert f()", "entry_point": "f"}
    path = write_jsonl(tmp_path / "a.jsonl", [whole, whole | {"task_id": "a/1", "test": ""}])
    assert [p.task_id for p in HumanEval(path=str(path)).problems("test")] == ["a/0"]
    assert "problems dropped: 1 of 2" in capsys.readouterr().err
