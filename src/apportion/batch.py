"""What flows through the program: prompts, rollouts, scores and credit, as frozen groups of tensors and texts.

Axes: B rows, P prompt tokens, T response tokens. Prompts are padded on the left, responses on the right; an end-of-text
token is a response token even where the padding token is the same one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.checks import is_whole
from apportion.masked import Packing


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts, as token ids and as text.

    Attributes:
        prompt_ids: (B, P) int64. Left-padded.
        prompt_mask: (B, P) bool. False on padding.
        texts: B prompts as the data set holds them, for rewards that read text.
        columns: The other columns of the data set, B values each, for rewards that ask for them.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    texts: list
    columns: dict[str, list]


@dataclass(frozen=True, kw_only=True)
class ResponseTexts:
    """What responses say, and where each of their tokens stands in it.

    Attributes:
        texts: B responses as they read behind their prompts, special tokens left out.
        spans: (B, T, 2) int64. First character of each sampled token in its text, and the one after its last. Tokens
            that share a character cover the whole of it; special tokens cover nothing, nor does what was not sampled.

    Raises:
        ValueError: If there are not as many spans as texts.
    """

    texts: tuple[str, ...]
    spans: Int[Tensor, "B T 2"]

    def __post_init__(self) -> None:
        """Refuse spans of other rows."""
        if len(self.texts) != len(self.spans):
            raise ValueError(f"spans has {len(self.spans)} rows; there are {len(self.texts)} texts")

    @cached_property
    def begins(self) -> Int[Tensor, "B T"]:
        """(B, T) int64. First character of each token, or where it covers nothing, that of the next one which does.

        Behind all of them, the length of the longest text. Never falls along a row.
        """
        start, end = self.spans.unbind(2)
        known = torch.where(start < end, start, max(map(len, self.texts), default=0))
        return known.flip(1).cummin(1).values.flip(1)

    def __getitem__(self, index: Int[Tensor, " N"] | slice) -> Self:
        """Take some rows; texts lie on the host, so a tensor of row numbers is read there."""
        numbers = range(len(self.texts))[index] if isinstance(index, slice) else map(int, index)
        return replace(self, texts=tuple(self.texts[row] for row in numbers), spans=self.spans[index])


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled responses with all that was known when they were sampled.

    What is worked out of the mask is kept (`packing`), so nothing may be written into the tensors; for other ones,
    `dataclasses.replace` makes another rollout.

    Attributes:
        prompt_ids: (B, P) int64. Left-padded prompt.
        prompt_mask: (B, P) bool. False on padding.
        response_ids: (B, T) int64. Right-padded response, its end-of-text token included.
        response_mask: (B, T) bool. False on padding and on tokens that the policy did not choose (tool output).
        old_logprobs: (B, T) float. Log-probability under the distribution that was sampled, in nats.
        ref_logprobs: (B, T) float. The same tokens under the reference model, at the same temperature and minimum
            length, but over its whole vocabulary: top-k and top-p do not apply to it.
        values: (B, T) float. Critic before each token, 0 where there is none; with the critic's graph where the first
            pass of the update is to learn from this very reading of it.
        entropies: (B, T) float or None. Entropy of the distribution that each token was drawn from, in nats; for
            terminations that need it.
        text: What the responses say, for terminations that need it (`apportion.with_text`).

    Raises:
        ValueError: If a mask is not bool or a shape does not fit the others.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    response_ids: Int[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    entropies: Float[Tensor, "B T"] | None = None
    text: ResponseTexts | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together."""
        for name in ("prompt_mask", "response_mask"):
            if (dtype := getattr(self, name).dtype) != torch.bool:
                raise ValueError(f"{name} has dtype {dtype}; convert it with .bool()")
        if self.prompt_ids.shape != self.prompt_mask.shape or len(self.prompt_ids) != len(self.response_ids):
            shapes = f"{tuple(self.prompt_ids.shape)} and {tuple(self.prompt_mask.shape)}"
            raise ValueError(
                f"prompt_ids and prompt_mask have shapes {shapes}; give both ({len(self.response_ids)}, P)"
            )
        per_token = ("response_mask", "old_logprobs", "ref_logprobs", "values", "entropies")
        given = [(name, x.shape) for name in per_token if (x := getattr(self, name)) is not None]
        given += [] if self.text is None else [("text.spans", self.text.spans.shape[:2])]
        for name, shape in given:
            if shape != self.response_ids.shape:
                raise ValueError(f"{name} has shape {tuple(shape)}; response_ids has {tuple(self.response_ids.shape)}")

    @property
    def kl(self) -> Float[Tensor, "B T"]:
        """(B, T) float32. The k1 estimate `old_logprobs - ref_logprobs` on valid tokens, 0 elsewhere, in nats."""
        difference = self.old_logprobs.float() - self.ref_logprobs.float()
        return torch.where(self.response_mask, difference, 0)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """(B) int64. Valid response tokens of each row, the end-of-text token included."""
        return self.response_mask.sum(1)

    @cached_property
    def packing(self) -> Packing:
        """How the valid response tokens move to the front of their rows; worked out once, for much asks for it."""
        return Packing(self.response_mask)


def heads_of(heads: object) -> tuple[int, ...] | None:
    """Make a tuple of a list of heads, which could be no key of a mixture.

    Raises:
        ValueError: If they are none, no whole numbers from 0, or twice the same.
    """
    if heads is None:
        return None
    listed = tuple(heads) if isinstance(heads, Iterable) else ()
    numbers = tuple(int(head) for head in listed if is_whole(head) and head >= 0)
    if not numbers or len({*numbers}) < len(listed):
        raise ValueError(f"heads is {heads!r}; list heads from 0, each once, or None for all")
    return numbers


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """Which attention to response tokens a redistribution reads: one layer, some heads, some rows, averaged.

    Attributes:
        layer: Layer number, negative from the end; None for the last full-attention layer.
        heads: Heads that are averaged, from 0; None for all.
        row: Queries that are averaged: "read", the position where the reward head reads; "last", the last response
            token; "mean", for each token the response tokens from it on that see it.
        before_last: Whether the last response token is no query, as while sampling, where it is never fed back.

    Raises:
        ValueError: If the layer is no whole number, the row is unknown, or the heads are none, no whole numbers from 0,
            or twice the same.
    """

    layer: int | None = None
    heads: tuple[int, ...] | None = None
    row: Literal["read", "last", "mean"] = "read"
    before_last: bool = False

    def __post_init__(self) -> None:
        """Refuse what names no attention."""
        object.__setattr__(self, "heads", heads_of(self.heads))
        if self.layer is not None and not is_whole(self.layer):
            raise ValueError(f"layer is {self.layer!r}; give a whole number, negative from the end, or None")
        if self.row not in ("read", "last", "mean"):
            raise ValueError(f"row is {self.row!r}; choose 'read', 'last' or 'mean'")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a redistribution has to be given besides the scores, under the names of `Scores`.

    Attributes:
        attention: Attention of the reward model; None for no need of it.
        policy_attention: Attention of the policy; None for no need of it.
        prefix_scores: Whether the reward head is to be read at every prefix.
        error_tokens: Whether the tokens are to be marked that an error was reported at.
    """

    attention: AttentionRequest | None = None
    policy_attention: AttentionRequest | None = None
    prefix_scores: bool = False
    error_tokens: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        """Ask for what either asks for.

        Raises:
            ValueError: If the two ask for different attention of one model: there is room for one.
        """
        for name in ("attention", "policy_attention"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if None not in (ours, theirs) and ours != theirs:
                raise ValueError(f"{name} is asked for as {ours} and as {theirs}; give all the same layer, heads, row")
        return replace(
            self,
            attention=self.attention or other.attention,
            policy_attention=self.policy_attention or other.policy_attention,
            prefix_scores=self.prefix_scores or other.prefix_scores,
            error_tokens=self.error_tokens or other.error_tokens,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of `Scores` that are needed."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name))

    @property
    def of_reward(self) -> "Needs":
        """What of this the reward has to supply; the rest is the policy's."""
        return replace(self, policy_attention=None)


NOTHING = Needs()
"""No need of anything but scores."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the reward said of each response, and what a redistribution asked for besides.

    The policy's attention stands here, not in `Rollout`: it is read only where a redistribution asks for it, and is
    then used up with the scores; a rollout holds what every method needs.

    Attributes:
        scores: (B) float. One number a response.
        attention: (B, T) float or None. Attention that the reward model pays to each response token when it reads
            its score; not negative, of any sum.
        policy_attention: (B, T) float or None. Attention that the policy pays to each token of its own response; not
            negative, of any sum.
        prefix_scores: (B, T + 1) float or None. The reward head read after the prompt (entry 0) and after each
            response token (entry t + 1 for token t).
        error_tokens: (B, T) bool or None. True on the tokens of the line that an error of a program was reported at;
            none in a row without an error, or where its line is not known or not the policy's.

    Raises:
        ValueError: If the row counts differ, or `scores` has more axes than one.
    """

    scores: Float[Tensor, " B"]
    attention: Float[Tensor, "B T"] | None = None
    policy_attention: Float[Tensor, "B T"] | None = None
    prefix_scores: Float[Tensor, "B T1"] | None = None
    error_tokens: Bool[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together."""
        if self.scores.ndim != 1:
            raise ValueError(f"scores has shape {tuple(self.scores.shape)}; give one number a response, (B,)")
        for name in ("attention", "policy_attention", "prefix_scores", "error_tokens"):
            tensor = getattr(self, name)
            if tensor is not None and len(tensor) != len(self.scores):
                raise ValueError(f"{name} has {len(tensor)} rows; scores has {len(self.scores)}")

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply an elementwise function to everything that is measured in units of the score."""
        prefix = None if self.prefix_scores is None else function(self.prefix_scores)
        return replace(self, scores=function(self.scores), prefix_scores=prefix)


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Who earned the score: what the update needs, a number for each token.

    Attributes:
        token_level_scores: (B, T) float32. The scores after redistribution; at the end where an estimator adds them up
            and the redistribution weighs the advantages instead.
        token_level_rewards: (B, T) float32. The same less the KL penalty.
        macro_ids: (B, T) int64. Macro action of each token, from 0; -1 outside the response.
        advantages: (B, T) float32. Constant inside a macro action, unless it is estimated between boundaries; 0
            outside the response.
        returns: (B, T) float32. Targets of the critic, or what is earned where there is none; 0 outside the response.
    """

    token_level_scores: Float[Tensor, "B T"]
    token_level_rewards: Float[Tensor, "B T"]
    macro_ids: Int[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]


Batch = TypeVar("Batch", Rollout, Scores, Credit)


def rows(batch: Batch, index: Int[Tensor, " N"] | slice) -> Batch:
    """Take some rows of everything in a batch.

    Args:
        batch: A rollout, scores or credit of B rows.
        index: (N) int64 row numbers, or a slice.

    Returns:
        The same kind, with the rows asked for.
    """
    taken = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: None if x is None else x[index] for name, x in taken.items()})
