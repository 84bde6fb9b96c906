import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from apportion.data.apps import Apps, CodeContests
from apportion.data.humaneval import HumanEval
from apportion.data.mbpp import Mbpp
from apportion.data.problem_sets import json_lines
from apportion.data.problems import Problem
from command_line import apportion, read_jsonl, words, write_jsonl

LEVELS = ("introductory", "interview", "competition")


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    tests = json.dumps({"inputs": ["1"], "outputs": ["1"]})
    return [
        {
            "id": number,
            "question": f"Question {number}",
            "solutions": json.dumps([f"print({number})", " ", "print(1)"]),
            "input_output": "" if number == 3 else tests,
            "difficulty": LEVELS[number % 3],
        }
        for number in range(first, first + count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """50 problems to train on, of which number 3 has no tests, and 5 to test."""
    write_jsonl(tmp_path / "train.jsonl", rows(50))
    write_jsonl(tmp_path / "test.jsonl", rows(5, first=100))
    return tmp_path


def numbers(prompts: Any) -> list[int]:
    return [int(text.split()[1]) for text in prompts]


def test_problems_are_shared_out_as_the_official_code_shuffles_rows(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    order = np.arange(50, dtype=np.uint32)  # DeepSpeed-Chat's get_shuffle_idx, which MA-RLHF's code has
    np.random.RandomState(seed=1234).shuffle(order)
    wanted = [[number for number in block if number != 3] for block in (order[:10].tolist(), order[10:].tolist())]
    sft, ppo = (Apps(path=str(folder), part=part)(tokenizer)["train"] for part in ("sft", "ppo"))
    assert numbers(dict.fromkeys(sft["prompt"])) == wanted[0]
    assert numbers(ppo["prompt"]) == wanted[1]


def test_rows_to_fine_tune_on_are_solutions_and_rows_of_a_policy_are_problems(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    sft = Apps(path=str(folder), part="sft")(tokenizer)
    assert sft["train"].column_names == ["prompt", "completion"]
    number = numbers(sft["train"]["prompt"])[0]
    assert sft["train"]["completion"][:2] == [f"\nprint({number})", "\nprint(1)"]  # without the empty one
    assert len(sft["eval"]) == 2 * 5
    assert len(Apps(path=str(folder), part="sft", max_solutions=1)(tokenizer)["eval"]) == 5
    ppo = Apps(path=str(folder))(tokenizer)
    assert ppo["train"].column_names == ["prompt", "problem", "task_id", "difficulty"]
    for row in ppo["train"].to_list():
        read = Problem.from_json(row["problem"])
        assert (read.task_id, read.difficulty, len(read.tests)) == (row["task_id"], row["difficulty"], 1)
    assert numbers(ppo["eval"]["prompt"]) == [100, 101, 102, 103, 104]


def test_both_parts_hold_out_the_same_problems_and_share_none(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sft, ppo = (Apps(path=str(folder), part=part, eval_rows=6)(tokenizer) for part in ("sft", "ppo"))
    held = set(ppo["eval"]["prompt"])
    assert held == set(sft["eval"]["prompt"])
    assert len(held) == 6
    assert not held & {*sft["train"]["prompt"], *ppo["train"]["prompt"]}
    assert not {*sft["train"]["prompt"]} & {*ppo["train"]["prompt"]}
    assert len({*sft["train"]["prompt"], *ppo["train"]["prompt"], *held}) == 49


def test_a_problem_that_is_asked_twice_is_in_one_part(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Defect 29 of ma-rlhf.md, section 4."""
    twice = [row | {"id": row["id"] + 50} for row in rows(50)]
    path = write_jsonl(tmp_path / "train.jsonl", [*rows(50), *twice])
    sft, ppo = (Apps(path=str(path), part=part, eval_rows=20)(tokenizer) for part in ("sft", "ppo"))
    parts = [set(split["prompt"]) for split in (sft["train"], ppo["train"], ppo["eval"])]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_who_is_in_a_part_does_not_depend_on_the_difficulties(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    every = Apps(path=str(folder))(tokenizer)["train"].to_list()
    some = Apps(path=str(folder), difficulties=["interview"])(tokenizer)["train"].to_list()
    assert some == [row for row in every if row["difficulty"] == "interview"]


def test_all_is_every_problem(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert sorted(numbers(Apps(path=str(folder), part="all")(tokenizer)["train"]["prompt"])) == [
        number for number in range(50) if number != 3
    ]


def test_a_path_is_asked_for_where_the_hub_has_none(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [kind().place for kind in (Apps, HumanEval, Mbpp)] == [
        "codeparrot/apps",
        "openai/openai_humaneval",
        "google-research-datasets/mbpp",
    ]
    with pytest.raises(ValueError, match=r"no data is named; give data\.path"):
        CodeContests()(tokenizer)


@pytest.mark.parametrize("name", ["Apps", "CodeContests", "HumanEval", "Mbpp"])
def test_sources_are_chosen_by_short_names_with_settings_of_their_own(name: str) -> None:
    """Settings that the default source has too would keep its values."""
    kind = {source.__name__: source for source in (Apps, CodeContests, HumanEval, Mbpp)}[name]
    for command in ("sft --model m", "ppo --model m --reward_function a.b"):
        shown = apportion(*command.split(), "--data", name, "--data.path", "x", "--print_config")
        assert shown.code == 0, shown.err
        assert f"class_path: apportion.data.{kind.__module__.rpartition('.')[2]}.{name}" in shown.out
        assert "split_seed: 1234" in shown.out
        assert "sft_share: 0.2" in shown.out


@pytest.mark.usefixtures("here")
def test_a_policy_is_fine_tuned_on_solutions_and_trained_on_problems(task: Path, folder: Path) -> None:
    data = f"--model STORIES --data Apps --data.path {folder} --data.eval_rows 2"
    done = apportion(*words(f"sft {data} --data.part sft --max_steps 1 --save_steps 0 --output_dir sft", task))
    assert done.code == 0, done.err
    line = f"ppo {data} --reward_function ProgramTests --num_steps 1 --batch_size 2 --sampling.max_new_tokens 4"
    done = apportion(*words(f"{line} --output_dir ppo", task))
    assert done.code == 0, done.err
    assert {row["score"] for row in read_jsonl(Path("ppo/samples.jsonl"))} <= {-1.0, -0.6, -0.3, 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft_share": 1.5}, r"sft_share is 1\.5, but a share lies in \[0, 1\]"),
        ({"max_solutions": 0}, "max_solutions is 0; give at least 1"),
        ({"eval_rows": -1}, "eval_rows is -1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Apps(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_rows": 45}, "eval_rows is 45, but there are (39|40) problems to hold out from"),
        (
            {"difficulties": ["hard"]},
            "no problem is of hard; its difficulties are competition, interview, introductory",
        ),
        ({"part": "sft", "sft_share": 0.0}, "no problem of the part 'sft' has a solution; change part or sft_share"),
        ({"sft_share": 1.0}, "no problem of the part 'ppo' is left; change part or sft_share"),
    ],
)
def test_what_leaves_nothing_is_refused(
    change: dict[str, Any], message: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=message):
        Apps(path=str(folder), **change)(tokenizer)


def test_two_problems_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "apps.jsonl", [*rows(1), *rows(1)])
    with pytest.raises(ValueError, match="two problems are called '0'"):
        Apps(path=str(path)).problems("train")


def test_an_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        Apps(path=str(folder)).problems("dev")


def test_lines_are_read_with_their_numbers_from_gzip_too(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"a": 1}\n\n{"a": 2}\n')
    assert list(json_lines(tmp_path / "a.jsonl.gz")) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("line", ["{", "[1]", "\udcff"])
def test_a_line_that_is_no_object_is_told_by_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n', errors="surrogateescape")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*; give one JSON object a line"):
        list(json_lines(path))
