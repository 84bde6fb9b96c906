"""Supervised fine-tuning: TRL's `SFTTrainer`, with the loss on the response only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apportion.bars import quiet_bars
from apportion.pretrained import check_policy
from apportion.train.hosted import (
    HostedRecipe,
    accepted_format,
    check_rows,
    configuration,
    load_tokenizer,
    prepared_folder,
    train,
)

FORMATS = (("prompt", "completion"), ("messages",))
# Columns that TRL reads besides.
OPTIONAL = ("tools", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(HostedRecipe):
    """Everything that `apportion sft` needs to know.

    Rows are `prompt` and `completion` (text, or lists of chat messages), or `messages`. A completion of text gets the
    end token where it lacks it. The loss is on completions, or on the assistant's turns of `messages` (for which the
    chat template has to mark them); prompts and padding have none.
    """

    output_dir: str = "runs/sft"


def sft(recipe: SFTRecipe) -> Path:
    """Fine-tune a language model, and save it with its tokenizer and metrics.json.

    Args:
        recipe: The settings.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If a model or data file is not there.
        ValueError: For anything in the recipe that does not fit together.
    """
    tokenizer = load_tokenizer(recipe)
    check_policy(recipe.model)
    checkpoint = prepared_folder(recipe)
    with quiet_bars():
        train(sft_trainer(recipe, tokenizer), recipe, checkpoint, {})
    return Path(recipe.output_dir)


def sft_trainer(recipe: SFTRecipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make TRL's trainer, its rows tokenized and labelled.

    Args:
        recipe: The settings.
        tokenizer: The model's, with a padding token.

    Returns:
        An `SFTTrainer`, ready to train.

    Raises:
        FileNotFoundError: If a data file is not there.
        ValueError: If a column is missing, or `extra` holds what TRL does not know.
    """
    data = recipe.data(tokenizer)
    columns = accepted_format(data["train"], FORMATS)
    for split in data.values():
        check_rows(split, columns, tokenizer)
    rows = {name: _select(split, columns) for name, split in data.items()}
    # Seconds of import: only where it is needed.
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    by_turns = columns == ("messages",)
    arguments = recipe.arguments(evaluate="eval" in rows)
    loss = {"completion_only_loss": None if by_turns else True, "assistant_only_loss": by_turns}
    return SFTTrainer(
        model=recipe.model,
        args=configuration(SFTConfig, recipe, **arguments, **loss),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
    )


def _select(rows: Dataset, columns: tuple[str, ...]) -> Dataset:
    """Keep what TRL is to read; a stray `text` or `messages` would change what it makes of a row."""
    return rows.select_columns([*columns, *(name for name in OPTIONAL if name in rows.column_names)])
