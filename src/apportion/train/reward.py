"""Reward models: TRL's `RewardTrainer` on preference pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apportion.bars import quiet_bars
from apportion.pretrained import is_scorer
from apportion.train.hosted import (
    HostedRecipe,
    accepted_format,
    check_rows,
    configuration,
    load_tokenizer,
    prepared_folder,
    train,
)

FORMATS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
# Columns that TRL reads besides.
OPTIONAL = ("margin", "tools", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(HostedRecipe):
    """Everything that `apportion reward` needs to know.

    Rows are `chosen` and `rejected` (text, or lists of chat messages), with the `prompt` apart or in both. The model is
    a causal language model, whose trunk gets a new head of one label, or such a classifier.

    Attributes:
        append_eos: End every text with the end token, as TRL does. Without it a text ends where it ends, so that the
            head also learns to read responses that were cut off, and prefixes. Chat messages follow their template
            either way.
    """

    output_dir: str = "runs/reward"
    append_eos: bool = True


def reward(recipe: RewardRecipe) -> Path:
    """Train a reward model, and save it with its tokenizer and metrics.json.

    With held-out pairs, metrics.json tells `eval_accuracy`: the share of them in which the chosen side scores higher
    (TRL's mean over batches: exact where the batch size divides their number).

    Args:
        recipe: The settings.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If a model or data file is not there.
        ValueError: For anything in the recipe that does not fit together.
    """
    tokenizer = load_tokenizer(recipe)
    is_scorer(recipe.model)  # refuses one of several labels
    checkpoint = prepared_folder(recipe)
    with quiet_bars():
        trainer, pairs = reward_trainer(recipe, tokenizer)
        train(trainer, recipe, checkpoint, {"pairs_dropped": pairs - len(trainer.train_dataset)})
    return Path(recipe.output_dir)


def reward_trainer(recipe: RewardRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, int]:
    """Make TRL's trainer, its pairs tokenized.

    Args:
        recipe: The settings.
        tokenizer: The model's, with a padding token.

    Returns:
        A `RewardTrainer`, ready to train, and the number of pairs before those over `max_length` were dropped.

    Raises:
        FileNotFoundError: If a data file is not there.
        ValueError: If a column is missing, no pair fits, or `extra` holds what TRL does not know.
    """
    rows = {name: _prepared(split, recipe, tokenizer) for name, split in recipe.data(tokenizer).items()}
    # Seconds of import: only where it is needed.
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    arguments = recipe.arguments(evaluate="eval" in rows)
    trainer = RewardTrainer(
        model=recipe.model,
        args=configuration(RewardConfig, recipe, **arguments),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
    )
    if not len(cast(Dataset, trainer.train_dataset)):
        raise ValueError(f"every pair is longer than max_length ({recipe.max_length}); raise it, or shorten them")
    return trainer, len(rows["train"])


def _prepared(rows: Dataset, recipe: RewardRecipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Keep what TRL is to read, and tokenize here what it would end with the end token."""
    columns = accepted_format(rows, FORMATS)
    check_rows(rows, columns, tokenizer)
    rows = rows.select_columns([*columns, *(name for name in OPTIONAL if name in rows.column_names)])
    if recipe.append_eos or not isinstance(rows[0]["chosen"], str):
        return rows

    def tokenized(row: Mapping[str, str]) -> dict[str, list[int]]:
        prompt = row.get("prompt", "")
        return {f"{side}_ids": tokenizer(prompt + row[side])["input_ids"] for side in ("chosen", "rejected")}

    return rows.map(tokenized, remove_columns=list(columns))
