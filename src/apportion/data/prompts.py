"""Prompts as tokens: checked and encoded once, before any long work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apportion.batch import Prompts
from apportion.streams import generator


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of a data set, encoded.

    Attributes:
        texts: The prompts as the data set holds them: text, or a list of chat messages.
        ids: Token ids of each.
        columns: The other columns of the data set, for rewards that ask for them.
        dropped: Prompts that were left out for being longer than the limit.
        pad_id: Token that pads them.
    """

    texts: list
    ids: list[list[int]]
    columns: dict[str, list]
    dropped: int
    pad_id: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.ids)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Prompts:
        """Collect some prompts into a left-padded batch.

        Args:
            indices: B prompt numbers.
            device: Where the tensors go.

        Returns:
            B prompts, padded to the longest of them.
        """
        ids = [self.ids[index] for index in indices]
        width = max(map(len, ids))
        padded = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids])
        return Prompts(
            prompt_ids=padded.to(device),
            prompt_mask=mask.to(device),
            texts=[self.texts[index] for index in indices],
            columns={name: [values[index] for index in indices] for name, values in self.columns.items()},
        )


def encode_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int, strict: bool = False
) -> PromptSet:
    """Encode the column `prompt` of a data set.

    Text is encoded as the tokenizer does it (with its beginning-of-text token, without an end); a list of chat messages
    through the chat template, up to where the assistant's turn begins.

    Args:
        dataset: At least one row, with a column `prompt`.
        tokenizer: The policy's, with a padding token.
        max_prompt_length: Tokens; longer prompts are dropped and counted.
        strict: Refuse longer prompts instead.

    Returns:
        The prompts that fit, in order.

    Raises:
        ValueError: If the tokenizer has no padding token; the data set is a stream, is empty, lacks the column, or has
            an empty prompt; a prompt is too long and `strict` is set; or none is left.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"the prompts are given as {type(dataset).__name__}; give a datasets.Dataset, for every pass has its own "
            "order (Dataset.from_list(list(stream.take(n))) makes one of a stream, Dataset.from_dict of lists)"
        )
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise ValueError("the tokenizer has no padding token; set one (tokenizer.pad_token = ...) and save it again")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"the data set has no column 'prompt'; its columns are {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError("the data set is empty; give at least one row with a column 'prompt'")
    texts = list(dataset["prompt"])
    ids = [_encode(text, tokenizer, row) for row, text in enumerate(texts)]
    fits = [row for row, tokens in enumerate(ids) if len(tokens) <= max_prompt_length]
    dropped = len(ids) - len(fits)
    if dropped and (strict or not fits):
        row = next(row for row, tokens in enumerate(ids) if len(tokens) > max_prompt_length)
        raise ValueError(
            f"{dropped} of {len(ids)} prompts are longer than max_prompt_length ({max_prompt_length}), first "
            f"row {row} with {len(ids[row])} tokens; raise the limit, or shorten them"
        )
    names = [name for name in dataset.column_names if name not in ("prompt", "completion", "completions", "prompts")]
    return PromptSet(
        texts=[texts[row] for row in fits],
        ids=[ids[row] for row in fits],
        columns={name: [values[row] for row in fits] for name in names if (values := list(dataset[name]))},
        dropped=dropped,
        pad_id=pad_id,
    )


def _encode(text: Any, tokenizer: PreTrainedTokenizerBase, row: int) -> list[int]:
    """Encode one prompt; refuse an empty one, to which there is nothing to respond."""
    if not text or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"the prompt of row {row} is empty; drop such rows")
    if not isinstance(text, str | list):
        raise ValueError(f"the prompt of row {row} is {text!r}; give text or a list of chat messages")
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])
        closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
        if not ids:
            raise ValueError(f"the prompt of row {row} has no tokens; drop such rows")
        return ids[:-1] if closed else ids
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the prompt of row {row} is a list of messages, but the tokenizer has no chat template; give it one "
            "(tokenizer.chat_template), or prompts that are text"
        )
    chat: Any = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)
    return list(chat["input_ids"])


def order_of(seed: int, epoch: int, size: int) -> Int[Tensor, " N"]:
    """Shuffle the prompts of one pass; a function of its arguments, so that a resumed run sees the same order.

    Args:
        seed: Seed of the run.
        epoch: Number of the pass over the data.
        size: Number of prompts.

    Returns:
        (N) int64. A permutation.
    """
    return torch.randperm(size, generator=generator(seed, "prompts", epoch))


def indices_of(step: int, batch_size: int, seed: int, size: int, group_size: int = 1) -> list[int]:
    """List the prompts of one update, one for each response; passes over the data follow each other without a gap.

    Args:
        step: Updates done before.
        batch_size: Responses an update.
        seed: Seed of the run.
        size: Number of prompts in the data.
        group_size: Responses to each prompt; `batch_size` is a multiple of it.

    Returns:
        `batch_size` prompt numbers, each `group_size` times in a row.
    """
    count = batch_size // group_size
    places = range(step * count, (step + 1) * count)
    orders = {epoch: order_of(seed, epoch, size) for epoch in {place // size for place in places}}
    prompts = [int(orders[place // size][place % size]) for place in places]
    return [prompt for prompt in prompts for _ in range(group_size)]
