"""Log-probabilities of tokens under a large vocabulary, in bounded memory."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from apportion.sampling import Sampling, sampled_logits

CHUNK_ELEMENTS = 2**23
"""Logits are formed for so many elements at a time on a CPU (32 MiB in float32), whatever the vocabulary."""

DEVICE_CHUNK_ELEMENTS = 2**26
"""The same on an accelerator (256 MiB in float32), where few rows at a time would leave its arithmetic idle."""


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    tokens: Int[Tensor, " N"],
    places: Int[Tensor, " N"],
    project: Callable[[Tensor], Tensor],
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    vocab_size: int,
    truncate: bool = True,
) -> Float[Tensor, " N"]:
    """Compute log-probabilities of tokens from the hidden states before them, without all their logits at once.

    Logits are formed for a chunk of tokens at a time; where there are several chunks they are formed again in the
    backward pass. So memory does not grow with N times the vocabulary.

    Args:
        hidden: (N, D) float. Last hidden state at the position that predicts each token.
        tokens: (N) int64.
        places: (N) int64. Place of each token in its response, from 0.
        project: From hidden states to logits.
        sampling: The distribution.
        eos_ids: Tokens that end a response.
        vocab_size: Width of the logits.
        truncate: Whether top-k and top-p apply (see `sampled_logits`).

    Returns:
        (N) float32. In nats.
    """

    def logprobs(hidden: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        logits = sampled_logits(
            project(hidden), sampling, places=places, eos_ids=eos_ids, chosen=tokens, truncate=truncate
        )
        return _LogprobOf.apply(logits, tokens)

    elements = CHUNK_ELEMENTS if hidden.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    return _by_chunks(logprobs, (hidden, tokens, places), max(1, elements // vocab_size))


class _LogprobOf(torch.autograd.Function):
    """Log-probability of one token a row: `logits[token] - logsumexp(logits)`.

    Its gradient is made in the place of the logits, where autograd fills three matrices of their size. Nothing else may
    read them in the backward pass: autograd refuses if an operation before kept its result, and a second pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Read the tokens' logits and normalise them."""
        totals = logits.logsumexp(1)
        ctx.save_for_backward(logits, tokens, totals)
        return logits.gather(1, tokens[:, None])[:, 0] - totals

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """One at the token less the distribution, times what comes from above."""
        logits, tokens, totals = ctx.saved_tensors
        above = gradients[0][:, None]
        return logits.sub_(totals[:, None]).exp_().mul_(-above).scatter_add_(1, tokens[:, None], above), None


def _by_chunks(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], size: int) -> Float[Tensor, " N"]:
    """Apply a function to chunks of rows; with several, activations are recomputed in the backward pass."""
    if len(tensors[0]) <= size:
        return function(*tensors)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])
