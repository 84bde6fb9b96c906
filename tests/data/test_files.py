import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from apportion.data.files import Files, load, split_by_prompt

ROWS = [{"prompt": "a b", "completion": " c"}, {"prompt": "d", "completion": " e, f"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        path.write_text(text if path.suffix == ".jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert load(write(tmp_path / name, ROWS), columns=["prompt", "completion"]).to_list() == ROWS


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl does not exist"):
        load(tmp_path / "rows.jsonl")


def test_a_path_that_looks_like_a_file_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match=r"data file some/rows\.csv does not exist"):
        load("some/rows.csv")


def test_a_missing_column_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'chosen'; its columns are prompt, completion"):
        load(write(tmp_path / "a.jsonl", ROWS), columns=["prompt", "chosen"])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_data_set_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        Dataset.from_dict({"prompt": []}).to_parquet(path)
    else:
        write(path, [])
    with pytest.raises(ValueError, match="is empty"):
        load(path)


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl", "json"), ("a.json", "json"), ("a.parquet", "parquet")])
def test_a_file_that_cannot_be_read_is_told_in_one_line(
    name: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=f"cannot be read as {kind}") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err  # `datasets` would log the error besides
    assert not caplog.records


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.pickle"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="of no known kind"):
        load(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=30), st.integers(1, 6), st.integers(0, 99))
def test_no_prompt_is_on_both_sides_of_a_split(prompts: list[str], eval_rows: int, seed: int) -> None:
    """Defect 29 of ma-rlhf.md, section 4: rows of one prompt in training and in evaluation."""
    rows = Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
    try:
        split = split_by_prompt(rows, eval_rows=eval_rows, seed=seed)
    except ValueError:
        assert len(set(prompts)) == 1 or len(prompts) - max(map(prompts.count, prompts)) < eval_rows
        return
    assert not set(split["train"]["prompt"]) & set(split["eval"]["prompt"])
    assert sorted([*split["train"]["row"], *split["eval"]["row"]]) == list(range(len(prompts)))
    assert len(split["eval"]) >= eval_rows
    again = split_by_prompt(rows, eval_rows=eval_rows, seed=seed)
    assert again["eval"]["row"] == split["eval"]["row"]


def test_conversations_with_the_same_questions_stay_together() -> None:
    ask = {"role": "user", "content": "why?"}
    answers = [[ask, {"role": "assistant", "content": text}] for text in "abc"]
    other = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "d"}]
    split = split_by_prompt(Dataset.from_dict({"messages": [*answers, other]}), eval_rows=1, seed=0)
    assert {len(split["train"]), len(split["eval"])} == {1, 3}


def test_held_out_rows_of_a_file_of_their_own_may_not_repeat_a_training_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "d", "completion": " other"}])
    with pytest.raises(ValueError, match="1 prompts of the held-out rows are training prompts too, such as 'd'"):
        Files(path=str(train), eval_path=str(held_out))(tokenizer)


def test_held_out_rows_come_from_the_file_or_the_share_that_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "x", "completion": " y"}])
    assert list(Files(path=str(train))(tokenizer)) == ["train"]
    assert Files(path=str(train), eval_path=str(held_out))(tokenizer)["eval"]["prompt"] == ["x"]
    assert len(Files(path=str(train), eval_rows=1)(tokenizer)["train"]) == 1
    assert Files(path=str(train), max_rows=1)(tokenizer)["train"].to_list() == ROWS[:1]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"eval_rows": -1}, "eval_rows is -1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"eval_rows": 1, "eval_path": "b.csv"}, "not both"),
    ],
)
def test_contradictions_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Files(path="a.csv", **settings_)


def test_no_path_at_all_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"give data\.path"):
        Files()(tokenizer)
