"""Reward models: TRL's `RewardTrainer` on preference pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apportion.train.hosted import (
    HostedRecipe,
    accepted_format,
    configuration,
    load_tokenizer,
    prepared_folder,
    quiet_data,
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
        group_by_length: Put pairs of like length into a batch, which saves padding.
    """

    output_dir: str = "runs/reward"
    append_eos: bool = True
    group_by_length: bool = False


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
    checkpoint = prepared_folder(recipe)
    with quiet_data():
        data = recipe.data(tokenizer)
        rows = {name: _prepared(split, recipe, tokenizer) for name, split in data.items()}
        # Seconds of import: only where it is needed.
        from trl.trainer.reward_config import RewardConfig
        from trl.trainer.reward_trainer import RewardTrainer

        arguments = recipe.arguments(evaluate="eval" in rows) | _sampling(recipe)
        trainer = RewardTrainer(
            model=recipe.model,
            args=configuration(RewardConfig, recipe, **arguments),
            train_dataset=rows["train"],
            eval_dataset=rows.get("eval"),
            processing_class=tokenizer,
        )
        if not (left := len(cast(Dataset, trainer.train_dataset))):
            raise ValueError(f"every pair is longer than max_length ({recipe.max_length}); raise it, or shorten them")
        train(trainer, checkpoint, {"pairs_dropped": len(rows["train"]) - left})
    return Path(recipe.output_dir)


def _prepared(rows: Dataset, recipe: RewardRecipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Keep what TRL is to read, and tokenize here what it would end with the end token."""
    columns = accepted_format(rows, FORMATS)
    rows = rows.select_columns([*columns, *(name for name in OPTIONAL if name in rows.column_names)])
    if recipe.group_by_length:
        rows = rows.map(lambda row: {"length": max(len(row["chosen"]), len(row["rejected"]))})
    if recipe.append_eos or not isinstance(rows[0]["chosen"], str):
        return rows

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = row.get("prompt", "")
        return {f"{side}_ids": tokenizer(prompt + row[side])["input_ids"] for side in ("chosen", "rejected")}

    return rows.map(tokenized, remove_columns=list(columns))


def _sampling(recipe: RewardRecipe) -> dict[str, object]:
    """Sort batches by the column `length`, which transformers' trainer would drop before it looks."""
    return (
        {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False} if recipe.group_by_length else {}
    )
