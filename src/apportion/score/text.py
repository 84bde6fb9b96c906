"""What responses say, for credit that reads text: from sampled ids to texts and the characters of each token."""

from collections.abc import Sequence
from dataclasses import replace

import torch
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
    special = special_ids(tokenizer)
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    sampled = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    read = [_response(tokenizer, special, *row) for row in zip(prompts, sampled, strict=True)]
    spans = torch.zeros(*rollout.response_ids.shape, 2, dtype=torch.long)
    found = [span for _, row in read for span in row]
    spans[rollout.response_mask.cpu()] = torch.tensor(found, dtype=torch.long).view(-1, 2)
    texts = tuple(text for text, _ in read)
    return replace(rollout, text=ResponseTexts(texts=texts, spans=spans.to(rollout.response_ids.device)))


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
