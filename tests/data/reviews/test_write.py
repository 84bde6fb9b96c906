from pathlib import Path
from statistics import fmean

import pytest
from datasets import Dataset

from apportion.data.reviews import ReviewsData, oracle, write_reviews

SMALL = ReviewsData(sft=60, pairs=400, pairs_test=40, prompts=50, prompts_eval=30)


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    return SMALL.datasets()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_prompt_is_in_two_splits_or_twice_in_one(splits: dict[str, Dataset]) -> None:
    """Defect 29 of ma-rlhf.md, section 4: splits by row let one prompt into training and evaluation."""
    prompts = [prompt for rows in splits.values() for prompt in rows["prompt"]]
    assert len(prompts) == 60 + 400 + 40 + 50 + 30
    assert len(set(prompts)) == len(prompts)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    sizes = {"sft": 3, "pairs": 3, "pairs_test": 3, "prompts": 3, "prompts_eval": 3}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_reviews(tmp_path / name, ReviewsData(seed=seed, **sizes))
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith((".jsonl", "safetensors")))


def test_preferences_follow_the_oracle_with_noise_and_without_ties(splits: dict[str, Dataset]) -> None:
    better = oracle(None, splits["pairs"]["chosen"])
    worse = oracle(None, splits["pairs"]["rejected"])
    assert all(a != b for a, b in zip(better, worse, strict=True))
    agreement = fmean(a > b for a, b in zip(better, worse, strict=True))
    assert 0.9 < agreement < 1  # the smallest difference, 1, wins with probability sigmoid(1 / 0.5) = 0.88


def test_the_longer_text_is_not_the_better_one(splits: dict[str, Dataset]) -> None:
    lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in splits["pairs"].to_list()]
    longer = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    # some 100 pairs are of unequal length: a fair coin stays within 0.2 of a half at four deviations
    assert abs(fmean(longer) - 0.5) < 0.2


def test_pairs_are_short_and_long_and_both_finished_and_cut(splits: dict[str, Dataset]) -> None:
    texts = splits["pairs"]["chosen"]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) < 20
    assert max(lengths) > 120
    finished = fmean(text.endswith(" </s>") for text in texts)
    assert abs(finished - (1 - SMALL.cut)) < 0.1
    assert {
        a.endswith("</s>") == b.endswith("</s>") for a, b in zip(texts, splits["pairs"]["rejected"], strict=True)
    } == {True}


def test_prompt_and_completion_join_into_words(splits: dict[str, Dataset]) -> None:
    for row in splits["sft"].to_list():
        assert (row["prompt"] + row["completion"]).split() == row["prompt"].split() + row["completion"].split()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts_eval": 0}, "prompts_eval is 0"),
        ({"shortest": 161}, "shortest 161"),
        ({"pair_shortest": 5}, "pair_shortest 5"),
        ({"cut": -0.1}, r"cut is -0\.1"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReviewsData(**change)
