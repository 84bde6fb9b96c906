"""From prompts to rollouts: responses, with the log-probabilities and values that they had when they were sampled."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from apportion.batch import Prompts, Rollout
from apportion.masked import last_index
from apportion.microbatches import in_groups
from apportion.models import Critic, Policy, unwrapped
from apportion.sampling import Sampling, draw, entropy, sampled_logits

_LOOK_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What sampling gives.

    Attributes:
        response_ids: (B, T) int64. Right-padded; T is the longest response of the batch.
        response_mask: (B, T) bool. The end-of-text token is part of the response.
        logprobs: (B, T) float32. Log-probability of each token as it was drawn, in nats; 0 outside the response.
        entropies: (B, T) float32 or None. Entropy of the distribution that each token was drawn from, in nats, where it
            was asked for; 0 outside the response.
        attention: (B, T) float32 or None. What a reader of the policy's attention has gathered; 0 outside the response.
    """

    response_ids: Int[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    entropies: Float[Tensor, "B T"] | None = None
    attention: Float[Tensor, "B T"] | None = None


class AttentionReader(ABC):
    """Reads the attention of a model to its response while the response is fed to it, token by token.

    Attributes:
        reads_last: Whether the last token of a response has to be fed too, which predicts nothing.
    """

    reads_last: bool

    @abstractmethod
    def reading(self, model: nn.Module, logprobs: Float[Tensor, "B M"]) -> AbstractContextManager[None]:
        """Look on while the model runs.

        Args:
            model: The policy.
            logprobs: (B, M) float32. Something of the shape of the responses, M = max_new_tokens, where they lie.
        """

    @abstractmethod
    def gather(self, rows: Int[Tensor, " N"], place: int, counted: Bool[Tensor, " N"]) -> None:
        """Take the token that the model was fed last as a query.

        Args:
            rows: (N) int64. Responses that the model was run on.
            place: Place of that token in its response, from 0.
            counted: (N) bool. Responses that the token is a query of.
        """

    @property
    @abstractmethod
    def attention(self) -> Float[Tensor, "B M"]:
        """Attention to each token of each response so far."""


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Prompts,
    sampling: Sampling,
    uniforms: Float[Tensor, "B T"],
    *,
    pad_id: int,
    with_entropies: bool = False,
    reader: AttentionReader | None = None,
) -> Responses:
    """Draw a response to each prompt.

    A short loop over the model's own cache. Rows that have ended leave the batch as soon as there are enough of them,
    and the log-probabilities are gathered on the way, which saves a pass of the policy.

    Args:
        policy: The model; it is used in evaluation mode.
        prompts: B prompts, left-padded.
        sampling: The distribution.
        uniforms: (B, T) float. In [0, 1), for T = max_new_tokens; same numbers, same responses.
        pad_id: What stands after the end of a response.
        with_entropies: Whether to measure the entropy of each distribution that is drawn from.
        reader: Reads the policy's attention to the responses; none if None. One that reads last tokens keeps a row in
            the batch until its last token has been fed.

    Returns:
        Responses of up to `max_new_tokens` tokens.

    Raises:
        ValueError: If a prompt is empty or `uniforms` has another shape.
    """
    _check_shapes(prompts, uniforms, sampling)
    rows = len(prompts.prompt_ids)
    ids = torch.full((rows, sampling.max_new_tokens), pad_id, device=prompts.prompt_ids.device)
    logprobs = torch.zeros(ids.shape, device=ids.device)
    entropies = torch.zeros_like(logprobs) if with_entropies else None
    ended_at = torch.full((rows,), sampling.max_new_tokens, device=ids.device)
    uniforms, eos_ids = uniforms.to(ids.device), torch.tensor(policy.eos_ids, dtype=torch.long, device=ids.device)
    decoder = _Decoder(policy.model, prompts, sampling.max_new_tokens)
    active = torch.arange(rows, device=ids.device)
    reads_last = reader is not None and reader.reads_last
    with nullcontext() if reader is None else reader.reading(policy.model, logprobs):
        for place in range(sampling.max_new_tokens):
            places = torch.full_like(active, place)
            logits = sampled_logits(decoder.logits, sampling, places=places, eos_ids=policy.eos_ids)
            tokens, chances = draw(logits, uniforms[active, place])
            ids[active, place], logprobs[active, place] = tokens, chances
            if entropies is not None:
                entropies[active, place] = entropy(logits)
            ends = torch.isin(tokens, eos_ids)
            ended_at[active] = torch.where(ends & (ended_at[active] > place + 1), place + 1, ended_at[active])
            shortest = place + 1 if reads_last else place + 2  # of the responses whose token here has to be fed
            if sampling.max_new_tokens < shortest:
                break
            if place % _LOOK_EVERY == _LOOK_EVERY - 1:
                still = ended_at[active] >= shortest
                if not still.any():
                    break
                if still.float().mean() <= 0.75:
                    active, tokens = active[still], tokens[still]
                    decoder.keep(still)
            decoder.feed(tokens)
            if reader is not None:
                reader.gather(active, place, ended_at[active] >= shortest)
    width = int(ended_at.max())
    mask = torch.arange(width, device=ids.device) < ended_at[:, None]
    within = partial(_within, mask)
    return Responses(
        response_ids=torch.where(mask, ids[:, :width], pad_id),
        response_mask=mask,
        logprobs=within(logprobs),
        entropies=None if entropies is None else within(entropies),
        attention=None if reader is None else within(reader.attention),
    )


def _check_shapes(prompts: Prompts, uniforms: Float[Tensor, "B T"], sampling: Sampling) -> None:
    """Refuse what there is no response to, or no numbers for."""
    rows = len(prompts.prompt_ids)
    if uniforms.shape != (rows, sampling.max_new_tokens):
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}; give ({rows}, {sampling.max_new_tokens})")
    if not prompts.prompt_mask.any(1).all():
        raise ValueError(f"prompt {int((~prompts.prompt_mask.any(1)).nonzero()[0, 0])} is empty; drop empty prompts")


def _within(mask: Bool[Tensor, "B T"], x: Float[Tensor, "B M"]) -> Float[Tensor, "B T"]:
    """Cut to the responses; 0 outside."""
    return torch.where(mask, x[:, : mask.shape[1]], 0)


class _Decoder:
    """A model's next-token logits for a growing batch of texts; with its cache where the model has one."""

    def __init__(self, model: nn.Module, prompts: Prompts, new: int) -> None:
        self.model = model
        self.parameters = inspect.signature(unwrapped(model).forward).parameters
        self.cached = "past_key_values" in self.parameters
        self.cache = _cache(unwrapped(model).config, prompts.prompt_ids.shape[1] + new) if self.cached else None
        self.mask = prompts.prompt_mask
        self.ids = prompts.prompt_ids
        self.logits = self._run(self.ids)

    def feed(self, tokens: Int[Tensor, " N"]) -> None:
        """Append one token to each text."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        if not self.cached:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.logits = self._run(tokens[:, None] if self.cached else self.ids)

    def keep(self, rows: Bool[Tensor, " N"]) -> None:
        """Drop texts that have ended."""
        self.mask, self.ids = self.mask[rows], self.ids[rows]
        if self.cache is not None:
            # Made for beam search; unlike batch_select_indices every kind of cache layer has it, recurrent ones too.
            index: Any = rows.nonzero()[:, 0]
            self.cache.reorder_cache(index)

    def _run(self, ids: Int[Tensor, "N L"]) -> Float[Tensor, "N V"]:
        options: dict = {"input_ids": ids, "attention_mask": self.mask.long()}
        if "position_ids" in self.parameters:
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.parameters:
            options["logits_to_keep"] = 1
        options |= {"past_key_values": self.cache, "use_cache": True} if self.cached else {}
        return self.model(**options).logits[:, -1]


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for all tokens to come, so that one more token does not copy those before it."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.kept: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of some tokens; return those of all."""
        first, states = self.get_seq_length(), (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Autocast rotates keys in float32 but reads them in the values' dtype: cast once, not with every token.
            self.kept = [value_states.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in states]
        for kept, new in zip(self.kept, states, strict=True):
            kept[:, :, first : first + new.shape[2]] = new
        return self._show(first + key_states.shape[2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some texts."""
        self.kept = [kept[beam_idx] for kept in self.kept]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (kept[:, :, :length] for kept in self.kept)
        return self.keys, self.values


def _cache(config: PretrainedConfig, room: int) -> DynamicCache:
    """Make a cache of the kinds of layers that a model has; those that keep every token get room for them."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def complete(
    prompts: Prompts,
    responses: Responses,
    *,
    reference: Policy,
    critic: Critic | None,
    sampling: Sampling,
    budget: int,
    learning_budget: int | None = None,
    as_reference: Callable[[], AbstractContextManager] = nullcontext,
) -> Rollout:
    """Add to sampled responses what the reference and the critic say of them.

    The critic comes last: the last rows that it reads can keep their graph (`learning_budget`), so that the update,
    which begins with them, need not read them again and holds no more than it would.

    Args:
        prompts: B prompts.
        responses: Their responses.
        reference: The model that the policy is held to.
        critic: Values before each token; 0 everywhere without a critic, as when responses are only evaluated.
        sampling: The distribution; top-k and top-p do not apply to the reference.
        budget: Tokens that a model is given at once, padding included.
        learning_budget: Tokens that the update gives the critic at once; the values of the last such group keep their
            graph. None: none do.
        as_reference: Context that turns `reference` into the reference, where it is the policy with adapters.

    Returns:
        The rollout.
    """
    lengths, width = widths(prompts.prompt_mask, responses.response_mask), responses.response_ids.shape[1]

    def text(group: Int[Tensor, " N"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return trim(
            prompts.prompt_ids[group],
            prompts.prompt_mask[group],
            responses.response_ids[group],
            responses.response_mask[group],
        )

    def refer(group: Int[Tensor, " N"]) -> tuple[Tensor]:
        with as_reference():
            return (reference(*text(group), sampling, truncate=False),)

    def value(group: Int[Tensor, " N"]) -> tuple[Tensor]:
        return (torch.zeros(len(group), width, device=lengths.device) if critic is None else critic(*text(group)),)

    (ref_logprobs,) = in_groups(refer, lengths, budget, width)
    keep_graph = critic is not None and learning_budget is not None
    (values,) = in_groups(value, lengths, learning_budget or budget, width, graph_of_last=keep_graph)
    return Rollout(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        response_ids=responses.response_ids,
        response_mask=responses.response_mask,
        old_logprobs=responses.logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        entropies=responses.entropies,
    )


def widths(prompt_mask: Bool[Tensor, "B P"], response_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B 2"]:
    """Count the columns that `trim` leaves of each row alone.

    Args:
        prompt_mask: (B, P) bool. Left-padded.
        response_mask: (B, T) bool. Right-padded.

    Returns:
        (B, 2) int64. Of the prompt, and of the response.
    """
    return torch.stack([last_index(prompt_mask.flip(1)), last_index(response_mask)], 1) + 1


def trim(
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    response_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut away the columns where every row is padding: at the left of the prompts, at the right of the responses.

    Args:
        prompt_ids: (B, P) int64. Left-padded.
        prompt_mask: (B, P) bool.
        response_ids: (B, T) int64. Right-padded.
        response_mask: (B, T) bool.

    Returns:
        The four, of widths P' and T'; at least one column of each is left.
    """
    prompt_width = max(1, int(prompt_mask.flip(1).any(0).nonzero().amax()) + 1) if prompt_mask.any() else 1
    width = max(1, int(response_mask.any(0).nonzero().amax()) + 1) if response_mask.any() else 1
    return (
        prompt_ids[:, -prompt_width:],
        prompt_mask[:, -prompt_width:],
        response_ids[:, :width],
        response_mask[:, :width],
    )
