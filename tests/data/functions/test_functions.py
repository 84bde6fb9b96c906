"""The task of short functions: its solutions pass, its mistakes do not all, nothing is in two splits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion import Problem, run_many
from apportion.data.functions import FunctionsData, operations, write_functions
from apportion.data.functions.tokenizer import code_tokenizer
from apportion.data.tasks import Task, write_task

SMALL = FunctionsData(sft=200, prompts=60, prompts_eval=20)


def test_right_solutions_pass_and_spoiled_ones_mostly_do_not() -> None:
    rng = random.Random(0)
    functions = [operations.draw(rng) for _ in range(60)]
    problems = [SMALL._problem(rng, function, "t") for function in functions]
    right = [(function.head + function.body, of.tests) for function, of in zip(functions, problems, strict=True)]
    assert {outcome.failed for outcome in run_many(right)} == {0}
    wrong = [
        (function.head + operations.spoiled(rng, function), of.tests)
        for function, of in zip(functions, problems, strict=True)
    ]
    outcomes = [*run_many(wrong)]
    assert {outcome.status for outcome in outcomes} == {"ok", "runtime_error", "compile_error"}
    assert sum(outcome.failed > 0 for outcome in outcomes) > 0.6 * len(outcomes)


def test_no_function_is_in_two_splits_and_the_same_seed_gives_the_same() -> None:
    splits = SMALL.datasets()
    prompts = [prompt for rows in splits.values() for prompt in rows["prompt"]]
    assert len({*prompts}) == len(prompts) == 280
    assert splits["sft"].to_list() == SMALL.datasets()["sft"].to_list()
    assert splits["sft"].to_list() != FunctionsData(sft=200, seed=1).datasets()["sft"].to_list()
    problem = Problem.from_json(splits["prompts_eval"]["problem"][0])
    assert problem.head == splits["prompts_eval"]["prompt"][0]
    assert len(problem.tests) == SMALL.tests


def test_the_tokenizer_reads_and_writes_every_text_of_the_task() -> None:
    tokenizer = code_tokenizer()
    for row in SMALL.datasets()["sft"].to_list():
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        head = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert ids[: len(head)] == head


def test_a_folder_holds_an_ordinary_model_and_ordinary_files(tmp_path: Path) -> None:
    folder = write_functions(tmp_path / "task", SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "base"))
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [*rows[0]] == ["prompt", "problem", "task_id"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is there already; choose another output_dir"):
        write_task(Task(name="functions", output_dir=str(tmp_path)))


@pytest.mark.parametrize(("name", "value"), [("sft", 0), ("tests", 0), ("right", 1.5)])
def test_sizes_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; choose"):
        FunctionsData(**{name: value})
