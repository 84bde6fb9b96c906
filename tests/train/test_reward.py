import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from apportion.data.files import Files
from apportion.pretrained import load_scorer
from apportion.train.reward import RewardRecipe, reward, reward_trainer

NOUNS = ("film", "plot")
PAIRS = [
    {"prompt": f"the {noun}", "chosen": f" is{adverb} good .", "rejected": f" is{adverb} {word} ."}
    for noun in NOUNS
    for adverb in ("", " very")
    for word in ("bad", "dull")
]
HELD_OUT = [{"prompt": "the film and plot", "chosen": " is good .", "rejected": " is bad ."}]


@pytest.fixture
def model(tmp_path: Path, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny language model with its tokenizer, saved as any other."""
    policy.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(model: Path, rows: list[dict[str, Any]], folder: Path | None = None, **changes: Any) -> RewardRecipe:
    folder = folder or model.parent
    settings: dict[str, Any] = {
        "model": str(model),
        "data": Files(path=write(folder / "pairs.jsonl", rows), eval_path=write(folder / "held_out.jsonl", HELD_OUT)),
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 0,
    }
    return RewardRecipe(**settings | changes)


def test_the_chosen_side_comes_to_score_higher_and_the_model_loads_as_a_scorer(model: Path) -> None:
    out = reward(recipe(model, PAIRS, max_steps=30))
    assert json.loads((out / "metrics.json").read_text())["eval_accuracy"] == 1.0
    scorer, tokenizer = load_scorer(str(out)), AutoTokenizer.from_pretrained(out)
    texts = ["the film is very good . </s>", "the film is very bad . </s>"]
    scores = scorer(**tokenizer(texts, return_tensors="pt")).logits
    assert scores.shape == (2, 1)
    assert scores[0] > scores[1] + 1
    assert isinstance(scorer, type(AutoModelForSequenceClassification.from_pretrained(out)))


def test_texts_end_with_the_end_token_only_where_it_was_asked_for_or_written(
    model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [PAIRS[0], PAIRS[1] | {"chosen": " is good . </s>"}]
    ends = {}
    for append in (True, False):
        trainer, _ = reward_trainer(recipe(model, rows, append_eos=append), tokenizer)
        ends[append] = [ids[-1] == tokenizer.eos_token_id for ids in trainer.train_dataset["chosen_ids"]]
    assert ends == {True: [True, True], False: [False, True]}


@pytest.mark.parametrize("append_eos", [True, False])
def test_an_input_has_exactly_one_beginning(shared: Path, tmp_path: Path, append_eos: bool) -> None:
    """Defect 3 of abc.md, section 10: the beginning was decoded with the text and then added again."""
    path = shared / "data" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer, _ = reward_trainer(recipe(path, PAIRS, tmp_path, append_eos=append_eos), tokenizer)
    for side in ("chosen_ids", "rejected_ids"):
        for ids in trainer.train_dataset[side]:
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.eos_token_id) == append_eos


def test_pairs_without_a_prompt_are_read_as_whole_texts(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"chosen": "the film is good .", "rejected": "the film is bad ."}] * 2
    data = Files(path=write(model.parent / "implicit.jsonl", rows))
    trainer, _ = reward_trainer(recipe(model, PAIRS, data=data), tokenizer)
    assert tokenizer.decode(trainer.train_dataset[0]["rejected_ids"]) == "the film is bad . </s>"


def test_pairs_that_are_too_long_are_dropped_and_counted_and_none_left_is_refused(
    model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    longest = max(len(tokenizer(row["prompt"] + row["chosen"])["input_ids"]) for row in PAIRS) + 1
    out = reward(recipe(model, PAIRS, max_length=longest - 1))
    assert json.loads((out / "metrics.json").read_text())["pairs_dropped"] == len(PAIRS) // 2  # those with an adverb
    with pytest.raises(ValueError, match=r"every pair is longer than max_length \(2\)"):
        reward_trainer(recipe(model, PAIRS, max_length=2), tokenizer)


def test_the_same_seed_gives_the_same_head_and_another_seed_another(
    model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again, other = (
        reward_trainer(recipe(model, PAIRS, seed=seed), tokenizer)[0].model.score.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_of_another_format_are_refused_with_their_columns(model: Path) -> None:
    with pytest.raises(ValueError, match="they have prompt, chosen"):
        reward(recipe(model, [{"prompt": "the", "chosen": " film"}]))
