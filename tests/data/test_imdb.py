from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from apportion.data.files import load
from apportion.data.imdb import ImdbPairs, ImdbReviews


@pytest.fixture(scope="module")
def stories(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "data" / "stories260k")


@pytest.fixture(scope="module")
def reviews(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60 real reviews."""
    path = tmp_path_factory.mktemp("imdb") / "reviews.jsonl"
    load(shared / "data" / "movie_reviews" / "movie_reviews.jsonl.gz").select(range(60)).to_json(path)
    return path


@pytest.fixture(scope="module")
def parts(reviews: Path, stories: PreTrainedTokenizerBase) -> dict[str, DatasetDict]:
    return {part: ImdbReviews(path=str(reviews), part=part)(stories) for part in ("sft", "ppo")}


@pytest.fixture(scope="module")
def pairs(shared: Path, stories: PreTrainedTokenizerBase) -> DatasetDict:
    return ImdbPairs(path=str(shared / "data" / "rt_polarity" / "rt_polarity.jsonl.gz"))(stories)


def length(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_prompts_have_two_to_eight_tokens_and_passages_keep_the_limit(
    parts: dict[str, DatasetDict], stories: PreTrainedTokenizerBase
) -> None:
    for row in parts["sft"]["train"].to_list() + held(parts).to_list():
        assert 2 <= length(row["prompt"], stories) <= 8
        assert length(row["prompt"] + row["completion"], stories) <= 96


def test_a_prompt_is_a_prefix_of_its_passage_in_tokens_too(
    parts: dict[str, DatasetDict], stories: PreTrainedTokenizerBase
) -> None:
    for row in parts["sft"]["train"].to_list():
        prompt, whole = stories(row["prompt"])["input_ids"], stories(row["prompt"] + row["completion"])["input_ids"]
        assert whole[: len(prompt)] == prompt


def test_no_prompt_is_in_two_parts(parts: dict[str, DatasetDict]) -> None:
    """Defect 29 of ma-rlhf.md, section 4: one post in fine-tuning, policy training and evaluation."""
    sft, ppo, held_out = (set(rows["prompt"]) for rows in (parts["sft"]["train"], parts["ppo"]["train"], held(parts)))
    assert not sft & ppo
    assert not sft & held_out
    assert not ppo & held_out
    assert len(held(parts)) == len(held_out)


def held(parts: dict[str, DatasetDict]) -> Dataset:
    return parts["ppo"]["eval"]


def test_both_parts_hold_out_the_same_rows(parts: dict[str, DatasetDict]) -> None:
    assert parts["sft"]["eval"].to_list() == held(parts).to_list()


def test_passages_are_words_of_the_reviews(parts: dict[str, DatasetDict], reviews: Path) -> None:
    texts = [" ".join(text.split()) for text in load(reviews)["text"]]
    for row in parts["ppo"]["train"].select(range(50)).to_list():
        assert any(row["prompt"] + row["completion"] in text for text in texts)


def test_praise_is_chosen_over_blame_and_no_sentence_is_used_twice(pairs: DatasetDict, shared: Path) -> None:
    rows = load(shared / "data" / "rt_polarity" / "rt_polarity.jsonl.gz")
    labels = dict(zip(rows["text"], rows["label"], strict=True))
    for split in pairs.values():
        assert {labels[text] for text in split["chosen"]} == {1}
        assert {labels[text] for text in split["rejected"]} == {0}
    used = Counter(text for split in pairs.values() for side in ("chosen", "rejected") for text in split[side])
    assert set(used.values()) == {1}


def test_cut_sentences_of_a_pair_have_the_same_number_of_words(shared: Path, stories: PreTrainedTokenizerBase) -> None:
    path = str(shared / "data" / "rt_polarity" / "rt_polarity.jsonl.gz")
    for row in ImdbPairs(path=path, cut=1.0)(stories)["eval"].to_list():
        assert len(row["chosen"].split()) == len(row["rejected"].split())


def test_one_label_alone_makes_no_pairs(tmp_path: Path, stories: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "praise.csv"
    path.write_text("text,label\ngood,1\nfine,1\n")
    with pytest.raises(ValueError, match=r"has labels \[1\]"):
        ImdbPairs(path=str(path))(stories)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ImdbReviews, {"part": "rm"}, "part is 'rm'"),
        (ImdbReviews, {"min_prompt_tokens": 9}, "prompts of 9 to 8 tokens"),
        (ImdbReviews, {"eval_share": 1.0}, r"eval_share is 1\.0"),
        (ImdbPairs, {"cut": 2.0}, r"cut is 2\.0"),
        (ImdbPairs, {"min_words": 0}, "min_words is 0"),
        (ImdbPairs, {"eval_share": 0.0}, r"eval_share is 0\.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(kind: type, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(path="a.csv", **change)


def test_a_missing_path_is_told(stories: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"give data\.path"):
        ImdbReviews()(stories)
