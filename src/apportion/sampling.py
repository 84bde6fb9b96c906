"""The distribution that responses are drawn from: one definition, for the sampler and for every log-probability."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. The names are those of Hugging Face's `generate`.

    Attributes:
        max_new_tokens: Longest response, at least 1.
        min_new_tokens: The end-of-text token is impossible before this many tokens.
        temperature: Logits are divided by it; positive.
        top_k: Only the k likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together reach this probability, in (0, 1]; 1 for all.

    Raises:
        ValueError: If a number is out of range.

    Source:
        The defaults draw from the model itself; MA-RLHF's published runs have temperature 0.8 and top_k 50.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; a response has at least 1 token")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; choose 0 to {self.max_new_tokens}, max_new_tokens"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; choose a positive number (1 for the model itself)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; choose a positive number, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; choose a number in (0, 1], 1 for all tokens")


def sampled_logits(
    logits: Float[Tensor, "N V"],
    sampling: Sampling,
    *,
    places: Int[Tensor, " N"],
    eos_ids: tuple[int, ...],
    chosen: Int[Tensor, " N"] | None = None,
    truncate: bool = True,
) -> Float[Tensor, "N V"]:
    """Turn a model's logits into those of the distribution that is sampled.

    Applied in the order of `generate`: no end before `min_new_tokens`, temperature, top-k, top-p.

    Args:
        logits: (N, V) float. One row a token to come.
        sampling: The distribution.
        places: (N) int64. Place of that token in its response, from 0.
        eos_ids: Tokens that end a response.
        chosen: (N) int64. Tokens that were drawn; they stay possible, also where the policy has moved since and would
            now cut them off.
        truncate: Whether top-k and top-p apply. They do not for the reference: the divergence from a reference that
            makes a sampled token impossible is infinite, from the whole reference it is finite and never negative.

    Returns:
        (N, V) float32. -inf on impossible tokens.
    """
    logits = logits.float()
    if sampling.min_new_tokens and eos_ids:
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        banned[list(eos_ids)] = True
        logits = logits.masked_fill(banned & (places < sampling.min_new_tokens)[:, None], -torch.inf)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if not truncate or (sampling.top_k == 0 and sampling.top_p == 1):
        return logits
    cut = _cut_off(logits.detach(), sampling)
    if chosen is not None:
        cut = cut.scatter(1, chosen[:, None], False)
    return logits.masked_fill(cut, -torch.inf)


def _cut_off(logits: Float[Tensor, "N V"], sampling: Sampling) -> Bool[Tensor, "N V"]:
    """Mark the tokens that top-k and top-p make impossible; the likeliest token always stays."""
    cut = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        cut = logits < logits.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1:
        ordered, order = logits.masked_fill(cut, -torch.inf).sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        cut = cut | torch.zeros_like(cut).scatter(1, order, before >= sampling.top_p)
    return cut


def draw(logits: Float[Tensor, "N V"], uniforms: Float[Tensor, " N"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Draw one token a row by inverting the cumulative distribution.

    One uniform number a row decides, so what a row draws does not depend on the rows beside it nor on the process that
    it runs in; and one cumulative sum is cheaper than `torch.multinomial`.

    Args:
        logits: (N, V) float32. -inf on impossible tokens.
        uniforms: (N) float. Independent, uniform in [0, 1).

    Returns:
        tokens: (N) int64.
        logprobs: (N) float32. Log-probability of the tokens drawn, in nats.
    """
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    # Below 1 by more than rounding, so that the search ends on a token of positive probability.
    target = uniforms.clamp(max=1 - 2**-22).to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    # Only logits that are not numbers lead beyond the last token; their log-probability says so.
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def entropy(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Measure how unsure a distribution is.

        H = -sum_v p_v log p_v

    Args:
        logits: (N, V) float32. -inf on impossible tokens, which add nothing.

    Returns:
        (N) float32. In nats: 0 where one token is certain, log V where all are alike.
    """
    logprobs = logits.log_softmax(-1)
    return -torch.where(logprobs.isneginf(), 0, logprobs.exp() * logprobs).sum(-1)
