import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from apportion.data.answers import answer
from apportion.data.mbpp import Mbpp
from apportion.data.problems import Problem
from apportion.score.programs import run_many, run_tests
from command_line import write_jsonl


@pytest.fixture(scope="module")
def mbpp(shared: Path) -> Mbpp:
    return Mbpp(path=str(shared / "data" / "mbpp" / "mbpp.jsonl"))


@pytest.fixture(scope="module")
def problems(mbpp: Mbpp) -> list[Problem]:
    return mbpp.problems("all")


def test_splits_are_those_of_the_paper(mbpp: Mbpp) -> None:
    ids = {split: [int(problem.task_id) for problem in mbpp.problems(split)] for split in mbpp.splits()}
    assert {split: (min(found), max(found), len(found)) for split, found in ids.items()} == {
        "train": (601, 974, 374),
        "validation": (511, 600, 90),
        "prompt": (1, 10, 10),
        "test": (11, 510, 500),
        "all": (1, 974, 974),
    }


def test_the_prompt_is_that_of_the_paper(problems: list[Problem]) -> None:
    assert problems[1].prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to find the similar elements "
        "from the given two tuple lists. Your code should pass these tests:\n\n"
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
        "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)\n"
        "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)\n[BEGIN]\n"
    )
    assert len(problems[1].tests) == 3
    assert "\r" not in "".join(problem.solutions[0] for problem in problems)


def test_some_references_pass(problems: list[Problem]) -> None:
    outcomes = run_many([(answer(p.solutions[0]).program, p.tests) for p in problems[::120]])
    assert [outcome.failed for outcome in outcomes] == [0] * 9


def test_the_sanitized_edition_has_its_imports_before_each_test(tmp_path: Path) -> None:
    row = {"task_id": 11, "prompt": "Take the root.", "code": "def f(x): return x**0.5"}
    row |= {"test_imports": ["import math"], "test_list": ["assert f(4) == math.sqrt(4)"]}
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row, row | {"task_id": 12, "test_list": []}]))
    problems = Mbpp(path=str(tmp_path / "sanitized-mbpp.json")).problems("test")
    assert [p.task_id for p in problems] == ["11"]
    assert run_tests(problems[0].solutions[0], problems[0].tests).passed == 1


@pytest.mark.parametrize("split", ["test", "all"])
def test_the_form_of_humaneval_is_refused_with_its_place_and_the_benchmark_that_reads_it(
    split: str, shared: Path
) -> None:
    path = shared / "data" / "mbpp" / "mbpp_sanitized_codet.jsonl"
    with pytest.raises(ValueError, match=r"codet\.jsonl, row 1: 'MbppEval/2' is .* give --benchmark humaneval"):
        Mbpp(path=str(path)).problems(split)


def test_a_name_that_is_no_number_is_of_no_split_but_all(tmp_path: Path) -> None:
    rows = [{"task_id": name, "text": "Add it.", "test_list": ["assert f(1) == 2"]} for name in (20, "mine")]
    source = Mbpp(path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [p.task_id for p in source.problems("all")] == ["20", "mine"]
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: task_id is 'mine', but a number tells the split"):
        source.problems("test")


def test_the_test_split_is_held_out(mbpp: Mbpp, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = mbpp(tokenizer)
    assert len(rows["eval"]) == 500
    assert 370 <= len(rows["train"]) <= 374  # some are asked in both


def test_setup_code_runs_before_each_test(tmp_path: Path) -> None:
    row = {"task_id": 20, "text": "Add it.", "test_setup_code": "y = 2", "test_list": ["assert f(1) == 1 + y"]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert run_tests("def f(x): return x + 2", Mbpp(path=str(path)).problems("test")[0].tests).passed == 1
