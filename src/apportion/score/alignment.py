"""What a reward model with its own tokenizer or template says, carried over to the policy's tokens.

Both tokenisations cover the same response text, so weights go from one to the other by the bytes that tokens share:

    w_j += a_i * |span_i & span_j| / |span_i|          reward token i, policy token j

Source: Chan et al., 2024 (https://arxiv.org/abs/2402.00782) assume equal tokenisations; spans are our departure.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apportion.score.spans import Span, byte_spans, decode_with_spans, special_ids

Template = Callable[[Any, str], str]
"""From a prompt (text, or whatever the data set holds) and a response to the text that the reward model reads."""

# Stands for the response while a template is asked where it puts it; private-use characters, which no prompt holds.
_MARK = "\ue000\uf8ff\ue001"


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A reward model's input, and where its tokens and the policy's share text.

    Attributes:
        input_ids: (B, K) int64. Right-padded input of the reward model.
        attention_mask: (B, K) bool. False on padding.
        read_index: (B) int64. Where the head reads: the rightmost token that is not the padding token.
        prefix_index: (B, T + 1) int64. Column whose score belongs to the response's first t tokens; read_index from
            the last valid token on.
        links: (3, L) int64. Row, reward column and policy column of tokens that share text.
        shares: (L) float32. Part of the reward token's mass that goes over each link; sums to 1 over the links of a
            reward token.
    """

    input_ids: Int[Tensor, "B K"]
    attention_mask: Bool[Tensor, "B K"]
    read_index: Int[Tensor, " B"]
    prefix_index: Int[Tensor, "B T1"]
    links: Int[Tensor, "3 L"]
    shares: Float[Tensor, " L"]

    @property
    def answer(self) -> Bool[Tensor, "B K"]:
        """(B, K) bool. Reward tokens that share text with the response, or stand for its end."""
        marked = torch.zeros_like(self.attention_mask)
        marked[self.links[0], self.links[1]] = True
        return marked

    def to_policy(self, rows: Float[Tensor, "B K"]) -> Float[Tensor, "B T"]:
        """Carry weights of the reward model's tokens to the policy's.

        Args:
            rows: (B, K) float. Attention of the query at read_index, say.

        Returns:
            (B, T) float32. Sums to the mass that lies on the response; what lies on prompt and template is dropped.

        Raises:
            ValueError: If rows have another shape than input_ids.
        """
        self._require_shape("rows", rows)
        row, source, target = self.links
        width = self.prefix_index.shape[1] - 1
        weights = torch.zeros(len(rows) * width, device=rows.device)
        moved = rows.float()[row, source] * self.shares
        return weights.index_add_(0, row * width + target, moved).view(len(rows), width)

    def prefix_scores(self, position_scores: Float[Tensor, "B K"]) -> Float[Tensor, "B T1"]:
        """Read the head's scores of prefixes of the response off its scores at every position.

        Args:
            position_scores: (B, K) float. The reward head at each token of the input.

        Returns:
            (B, T + 1) float. Entry 0 at the end of the prompt; entry t at the last reward token that ends within the
            policy's first t tokens; the model's own score from the last valid token on.

        Raises:
            ValueError: If position_scores have another shape than input_ids.
        """
        self._require_shape("position_scores", position_scores)
        return position_scores.gather(1, self.prefix_index)

    def _require_shape(self, name: str, values: Tensor) -> None:
        """Refuse values of other tokens than these."""
        if values.shape != self.input_ids.shape:
            shapes = f"{tuple(values.shape)}, the reward model's input {tuple(self.input_ids.shape)}"
            raise ValueError(f"{name} has shape {shapes}: give one value for each of its tokens")


def concatenation(prompt: str, response: str) -> str:
    """Put the response after the prompt."""
    return prompt + response


def transfer_weights(
    weights: Float[Tensor, " S"], source_spans: Sequence[Span], target_spans: Sequence[Span]
) -> Float[Tensor, " N"]:
    """Carry weights from one tokenisation of a text to another.

        w_j += a_i * |span_i & span_j| / sum_k |span_i & span_k|

    The denominator is |span_i| within the targets' text, so a source token that straddles its beginning keeps its whole
    mass. A source token with an empty span gives its mass to the last target if it stands at the end or after (an
    end-of-text token), to the target at its place if it stands inside. Source tokens outside of the targets' text are
    dropped.

    Args:
        weights: (S) float. One for each source token.
        source_spans: S spans, in order.
        target_spans: N spans in the same text, in order.

    Returns:
        (N) float32. Sums to the weight of the source tokens that are not dropped.

    Raises:
        ValueError: If there are not as many weights as source spans.
    """
    if len(weights) != len(source_spans):
        raise ValueError(f"{len(weights)} weights for {len(source_spans)} source spans: give one for each")
    moved = torch.zeros(len(target_spans), device=weights.device)
    for source, target, share in _links(source_spans, target_spans):
        moved[target] += weights[source].float() * share
    return moved


def align(
    *,
    policy_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    response_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    template: Template = concatenation,
    prompts: Sequence[Any] | None = None,
    close_with_eos: bool = True,
) -> Alignment:
    """Tokenise responses for a reward model, and say how its tokens correspond to the policy's.

    Args:
        policy_tokenizer: That of the ids.
        reward_tokenizer: A fast tokenizer with a padding token.
        prompt_ids: (B, P) int64. Padded on either side.
        prompt_mask: (B, P) bool. False on padding.
        response_ids: (B, T) int64. Right-padded, exactly as sampled.
        response_mask: (B, T) bool. False on padding. Masked tokens before the last valid one (tool output) are read
            too.
        template: Makes the reward model's text. It may strip the response's outer white space, but not change it.
        prompts: B prompts for the template; the decoded prompt_ids without special tokens if None. The response is
            always decoded in the context of prompt_ids: on its own it may lose its first space.
        close_with_eos: Whether a response that ended with a special token is followed by the reward tokenizer's EOS,
            as TRL trains reward models. Set it to False for a template that closes the turn itself.

    Returns:
        The reward model's input and its correspondence. The input holds no more than one BOS, also where both template
        and tokenizer put one.

    Raises:
        ValueError: If the reward tokenizer is slow or without padding token, the template changes the response, or a
            row has no reward token at all.
    """
    pad_token_id = usable_pad(reward_tokenizer)
    special = special_ids(policy_tokenizer)
    placed = [
        _place(policy_tokenizer, special, *ids, template, None if prompts is None else prompts[row])
        for row, ids in enumerate(_valid_ids(prompt_ids, prompt_mask, response_ids, response_mask))
    ]
    encoded = _encode(reward_tokenizer, placed, close_with_eos)
    tensors = _collate(encoded, placed, pad_token_id, response_ids.shape[1])
    return Alignment(**{name: tensor.to(response_ids.device) for name, tensor in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A response in the reward model's text: the text, the spans of the policy's tokens in it, and whether it ended."""

    text: str
    spans: list[Span]
    start: int
    ended: bool


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """The reward model's tokens of one row; the spans of tokens without text are empty, at the place they stand."""

    ids: list[int]
    spans: list[Span]


def usable_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token of a tokenizer that gives offsets."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: load the reward model's fast tokenizer"
        )
    if not isinstance(tokenizer.pad_token_id, int):
        name = tokenizer.name_or_path or "in memory"
        raise ValueError(
            f"the reward tokenizer ({name}) has no padding token: set its pad_token, such as its EOS token, and save it"
        )
    return tokenizer.pad_token_id


def _valid_ids(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each row's prompt, and of its response up to the last valid token."""
    columns = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    lengths = (response_mask * columns).amax(dim=1).tolist() if len(columns) else [0] * len(response_mask)
    rows = zip(prompt_ids, prompt_mask, response_ids.tolist(), lengths, strict=True)
    return [(prompt[mask].tolist(), response[:length]) for prompt, mask, response, length in rows]


def _place(
    tokenizer: PreTrainedTokenizerBase,
    special: frozenset[int],
    prompt: list[int],
    response: list[int],
    template: Template,
    given: Any,
) -> _Placed:
    """Decode one row, put it into the template, and find the policy's tokens there."""
    data, spans = decode_with_spans(tokenizer, prompt + response, special)
    boundary = spans[len(prompt) - 1][1] if prompt else 0
    while boundary < len(data) and data[boundary] & 0xC0 == 0x80:
        boundary -= 1  # a character that begins in the prompt is the response's: text cannot be cut inside of it
    said = data[boundary:].decode()
    text, shift, kept = _fill(template, data[:boundary].decode() if given is None else given, said)
    moved = [(max(start, boundary) - boundary + shift, end - boundary + shift) for start, end in spans[len(prompt) :]]
    inside = [(min(max(start, kept[0]), kept[1]), min(max(end, kept[0]), kept[1])) for start, end in moved]
    return _Placed(text=text, spans=inside, start=kept[0], ended=bool(response) and response[-1] in special)


def _fill(template: Template, prompt: Any, response: str) -> tuple[str, int, Span]:
    """Fill a template in, and find the response in the text: where it would begin, and the span that is kept of it."""
    before, found, after = template(prompt, _MARK).partition(_MARK)
    text = template(prompt, response)
    for kept in (response, response.lstrip(), response.rstrip(), response.strip()):
        if found and text == before + kept + after:
            start = len(before.encode())
            lead = response[: len(response) - len(response.lstrip())] if response[:1] != kept[:1] else ""
            return text, start - len(lead.encode()), (start, start + len(kept.encode()))
    raise ValueError(f"the template changes the response {response[:40]!r}: let it only put text before and after it")


def _encode(tokenizer: PreTrainedTokenizerBase, placed: Sequence[_Placed], close_with_eos: bool) -> list[_Encoded]:
    """Tokenise the texts, with one BOS where the tokenizer puts one, and close those that ended."""
    batch = tokenizer([row.text for row in placed], return_offsets_mapping=True)
    rows: list[_Encoded] = []
    for number, (row, ids, offsets) in enumerate(zip(placed, batch["input_ids"], batch["offset_mapping"], strict=True)):
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids, offsets = ids[1:], offsets[1:]
        spans = byte_spans(row.text, offsets, tokenizer.convert_ids_to_tokens(ids))
        eos = tokenizer.eos_token_id
        if close_with_eos and row.ended and eos is not None and ids[-1:] != [eos]:
            ids, spans = [*ids, eos], [*spans, (0, 0)]
        if not ids:
            raise ValueError(f"row {number} has no text for the reward model: give it a tokenizer with a BOS token")
        rows.append(_Encoded(ids=ids, spans=_standing(spans)))
    return rows


def _standing(spans: Sequence[Span]) -> list[Span]:
    """Put tokens without text where the token before them ends (tokenizers say 0); before all others at -1."""
    ends = accumulate((end if end > start else -1 for start, end in spans), max)
    return [span if span[1] > span[0] else (end, end) for span, end in zip(spans, ends, strict=True)]


def _collate(
    encoded: Sequence[_Encoded], placed: Sequence[_Placed], pad_token_id: int, width: int
) -> dict[str, Tensor]:
    """Pad the rows and join their links."""
    longest = max(len(row.ids) for row in encoded)
    input_ids = torch.tensor([row.ids + [pad_token_id] * (longest - len(row.ids)) for row in encoded])
    lengths = torch.tensor([len(row.ids) for row in encoded])
    columns = torch.arange(longest)
    read_index = ((input_ids != pad_token_id) * columns).amax(dim=1)
    links = [
        (number, source, target, share)
        for number, (row, place) in enumerate(zip(encoded, placed, strict=True))
        for source, target, share in _links(row.spans, place.spans)
    ]
    prefixes = [
        _prefix_columns(row.spans, place, read, width)
        for row, place, read in zip(encoded, placed, read_index.tolist(), strict=True)
    ]
    return {
        "input_ids": input_ids,
        "attention_mask": columns < lengths[:, None],
        "read_index": read_index,
        "prefix_index": torch.tensor(prefixes),
        "links": torch.tensor([link[:3] for link in links], dtype=torch.long).view(-1, 3).T,
        "shares": torch.tensor([link[3] for link in links], dtype=torch.float32),
    }


def _prefix_columns(spans: Sequence[Span], placed: _Placed, read: int, width: int) -> list[int]:
    """Find the reward token to read after each prefix of the response, from the bare prompt to the padded end."""
    # A token without text after the first is no prefix's: an end-of-text token would close the text for the head.
    reached = list(accumulate((end for _, end in spans), max))
    with_text = [place for place, (start, end) in enumerate(spans) if end > start or end < 0]
    ends = [reached[place] for place in with_text]
    positions = [placed.start, *(end for _, end in placed.spans[:-1])] if placed.spans else []
    found = [max(bisect_right(ends, position) - 1, 0) for position in positions]
    columns = [min(with_text[place], read) if with_text else read for place in found]
    return columns + [read] * (width + 1 - len(columns))


def _links(source_spans: Sequence[Span], target_spans: Sequence[Span]) -> list[tuple[int, int, float]]:
    """Return source, target and share for each pair that shares text, the shares of a source token summing to 1."""
    if not target_spans:
        return []
    ends = list(accumulate((end for _, end in target_spans), max))
    region = (min(start for start, _ in target_spans), ends[-1])
    links: list[tuple[int, int, float]] = []
    for source, (start, end) in enumerate(source_spans):
        overlaps = _overlaps(max(start, region[0]), min(end, region[1]), target_spans, ends)
        total = sum(overlaps.values())
        if total:
            links += [(source, target, shared / total) for target, shared in overlaps.items()]
        elif (start == end and start > region[0]) or start == end == region[1]:
            links.append((source, min(bisect_right(ends, start), len(ends) - 1), 1.0))
    return links


def _overlaps(start: int, end: int, target_spans: Sequence[Span], ends: Sequence[int]) -> dict[int, int]:
    """Return how many bytes of a span lie in each target that it meets."""
    shared: dict[int, int] = {}
    for target in range(bisect_right(ends, start), len(target_spans)):
        if target_spans[target][0] >= end:
            break
        overlap = min(end, target_spans[target][1]) - max(start, target_spans[target][0])
        if overlap > 0:
            shared[target] = overlap
    return shared
