from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from apportion.data.answers import answer
from apportion.data.humaneval import HumanEval
from apportion.data.problems import Problem
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


@pytest.fixture(scope="module")
def sanitized(shared: Path) -> list[Problem]:
    return HumanEval(path=str(shared / "data" / "mbpp" / "mbpp_sanitized_codet.jsonl")).problems("test")


def test_references_of_the_sanitized_mbpp_pass_whatever_their_indent(sanitized: list[Problem]) -> None:
    """Two spaces, four, one that defines `check` (56), and tests that lack `import math` (98)."""
    assert len(sanitized) == 427
    some = [p for p in sanitized if p.task_id in {"MbppEval/56", "MbppEval/98"}] + sanitized[::60]
    references = run_many([(answer(p.solutions[0], p.head).program, p.tests) for p in some])
    assert [outcome.passed for outcome in references] == [1] * len(some)
    assert [outcome.passed for outcome in run_many([(p.head + "    pass\n", p.tests) for p in some])] == [0] * len(some)
    assert "'''" in some[0].prompt


@pytest.mark.slow
def test_all_references_of_the_sanitized_mbpp_pass_that_return_plain_values(sanitized: list[Problem]) -> None:
    pairs = [(answer(p.solutions[0], p.head).program, p.tests) for p in sanitized]
    failed = {p.task_id for p, outcome in zip(sanitized, run_many(pairs), strict=True) if outcome.failed}
    assert failed <= {f"MbppEval/{number}" for number in (737, 787, 794)}  # which return a match of `re`


def test_a_problem_without_a_test_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"task_id": "a/0", "prompt": "def f():\n", "test": "def check(f):\n    assert f()", "entry_point": "f"}
    path = write_jsonl(tmp_path / "a.jsonl", [whole, whole | {"task_id": "a/1", "test": ""}])
    assert [p.task_id for p in HumanEval(path=str(path)).problems("test")] == ["a/0"]
    assert "problems dropped: 1 of 2" in capsys.readouterr().err
