"""What responses say, for credit that reads text: from sampled ids to texts and the characters of each token."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apportion.batch import ResponseTexts, Rollout
from apportion.score.spans import Span, decode_with_spans, special_ids


def with_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """Add to a rollout what its responses say.

    The ids are decoded exactly as they were sampled, behind their prompts, and nothing is tokenised again. A character
    that begins in the prompt and ends in the response is the response's. Tokens outside of the response mask (tool
    output) are left out of the text.

    Args:
        rollout: B responses.
        tokenizer: The policy's.

    Returns:
        The same rollout with its `text`.
    """
    rows = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
    return replace(rollout, text=response_texts(tokenizer, *rows))


def response_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    response_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
) -> ResponseTexts:
    """Read responses behind their prompts; see `with_text`.

    Args:
        tokenizer: The policy's.
        prompt_ids: (B, P) int64.
        prompt_mask: (B, P) bool.
        response_ids: (B, T) int64.
        response_mask: (B, T) bool.

    Returns:
        B texts, with the characters of their tokens.
    """
    special = special_ids(tokenizer)
    prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
    sampled = [ids[mask].tolist() for ids, mask in zip(response_ids, response_mask, strict=True)]
    read = [_response(tokenizer, special, *row) for row in zip(prompts, sampled, strict=True)]
    spans = torch.zeros(*response_ids.shape, 2, dtype=torch.long)
    found = [span for _, row in read for span in row]
    spans[response_mask.cpu()] = torch.tensor(found, dtype=torch.long).view(-1, 2)
    return ResponseTexts(texts=tuple(text for text, _ in read), spans=spans.to(response_ids.device))


def _response(
    tokenizer: PreTrainedTokenizerBase, special: frozenset[int], prompt: list[int], sampled: list[int]
) -> tuple[str, list[Span]]:
    """Decode one response behind its prompt; return it with the characters of its tokens."""
    data, spans = decode_with_spans(tokenizer, prompt + sampled, special)
    boundary = spans[len(prompt) - 1][1] if prompt else 0
    while boundary < len(data) and data[boundary] & 0xC0 == 0x80:
        boundary -= 1
    said = data[boundary:].decode()
    moved = [(max(start, boundary) - boundary, end - boundary) for start, end in spans[len(prompt) :]]
    return said, _characters(said, moved)


def _characters(text: str, spans: Sequence[Span]) -> list[Span]:
    """Turn bytes of a text into characters; a span that holds part of a character covers the whole of it."""
    if text.isascii():
        return list(spans)
    begins = [place for place, character in enumerate(text) for _ in character.encode()] + [len(text)]
    return [(begins[start], begins[end - 1] + 1 if end > start else begins[start]) for start, end in spans]
