"""The losses of PPO: pure functions of tensors, with gradient."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apportion.credit.macro_actions import MacroActions
from apportion.update.aggregation import Aggregation, normaliser, step_weights

Granularity = Literal["token", "macro", "macro_mean"]
Clip = Literal["pooled", "token"]

_LARGEST_LOG_RATIO = 20.0


def importance_ratio(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    granularity: Granularity = "token",
    macro_ids: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B N"], Bool[Tensor, "B N"]]:
    r"""Compute how much likelier the current policy makes each step than the sampling policy did.

        token        r_t = exp(logprobs_t - old_logprobs_t)
        macro        r_k = exp(sum over t in action k of (logprobs_t - old_logprobs_t))
        macro_mean   r_k = exp(mean over t in action k of (logprobs_t - old_logprobs_t))

    Log ratios are held within +-20, beyond which exp would overflow and its gradient become NaN.

    Args:
        logprobs: (B, T) float. Current policy, in nats; the gradient flows through it.
        old_logprobs: (B, T) float. Sampling policy.
        mask: (B, T) bool. True on valid response tokens.
        granularity: Which of the three. `macro_mean` with one action a response is GSPO's ratio.
        macro_ids: (B, T) int64. Macro action of each token, -1 outside the response; not needed for `token`.

    Returns:
        ratio: (B, N) float32, N = T steps. 1 outside the mask.
        mask: (B, N) bool. True on steps that exist.

    Raises:
        ValueError: If the granularity is unknown, or needs macro_ids and has none.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2, for `macro`; GSPO (https://arxiv.org/abs/2507.18071).
    """
    log_ratio = torch.where(mask, logprobs.float() - old_logprobs.float(), 0)
    return _pooled(log_ratio, mask, granularity, macro_ids)


def _pooled(
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    granularity: Granularity,
    macro_ids: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """Pool the log ratios of tokens over each step, and take the ratio."""
    if granularity == "token":
        return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp(), mask
    if granularity not in ("macro", "macro_mean"):
        raise ValueError(f"ratio is {granularity!r}; choose 'token', 'macro' or 'macro_mean'")
    if macro_ids is None:
        raise ValueError(f"ratio {granularity!r} needs macro_ids, which is None; pass Credit.macro_ids")
    actions = MacroActions(macro_ids)
    pooled = actions.mean(log_ratio) if granularity == "macro_mean" else actions.sum(log_ratio)
    return pooled.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp(), actions.lengths.bool()


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    clip: Clip = "pooled",
    ratio: Granularity = "token",
    macro_ids: Int[Tensor, "B T"] | None = None,
    aggregation: Aggregation | None = None,
    longest: int | None = None,
    denominator: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute PPO's clipped policy loss over tokens or macro actions.

        loss_n = max(-A_n * r_n, -A_n * clip(r_n, 1 - cliprange, 1 + cliprange_high))
        loss   = mean of the losses, as the aggregation says

    With `clip="token"` nothing but the log ratio of each token is held, before it is pooled, and only on the side where
    it would raise the objective further: at most cliprange_high where the advantage is positive, at least -cliprange
    where it is negative. The ranges are then nats. With `ratio="macro_mean"` and one action a response that is GMPO,
    and with the clipped ratio (`clip="pooled"`) GSPO.

    Args:
        logprobs: (B, T) float. Current policy, in nats; the gradient flows through it.
        old_logprobs: (B, T) float. Sampling policy.
        advantages: (B, T) float. Averaged over each macro action where the ratio is pooled.
        mask: (B, T) bool. True on valid response tokens.
        cliprange: Largest step of the ratio down from 1, positive.
        cliprange_high: Largest step up, positive; the same by default.
        clip: Whether the pooled ratio is clipped, or the log ratio of each token before it is pooled.
        ratio: What is clipped: see `importance_ratio`.
        macro_ids: (B, T) int64. Needed for a pooled ratio, and for the aggregation `action_mean`.
        aggregation: Whose mean the loss is: see `step_weights`. By default `token_mean` for the ratio of tokens,
            `action_mean` for a pooled one.
        longest: What the aggregation `constant` divides each response by; T by default.
        denominator: () float. What to divide by, when these rows are part of a larger batch: the `normaliser` of that;
            by default of these rows.

    Returns:
        () float32.

    Raises:
        ValueError: If a clip range is not positive, or a name is unknown or needs macro_ids and has none.

    Source:
        Schulman et al., 2017 (https://arxiv.org/abs/1707.06347), equation 7; MA-RLHF, section 3.2; GSPO
        (https://arxiv.org/abs/2507.18071), equation 5; GMPO (https://arxiv.org/abs/2507.20673), equation 4.
    """
    low, high = cliprange, cliprange if cliprange_high is None else cliprange_high
    _check_positive("cliprange", low)
    _check_positive("cliprange_high", high)
    aggregation = aggregation_of(ratio, aggregation)
    if clip not in ("pooled", "token"):
        raise ValueError(f"clip is {clip!r}; choose 'pooled' or 'token'")
    if clip == "token":
        log_ratio = torch.where(mask, logprobs.float() - old_logprobs.float(), 0)
        held = _held(log_ratio, _shared(advantages, mask, ratio, macro_ids), low, high)
        ratios, steps = _pooled(held, mask, ratio, macro_ids)
    else:
        ratios, steps = importance_ratio(logprobs, old_logprobs, mask, granularity=ratio, macro_ids=macro_ids)
    pooled = ratio != "token"
    gains = advantages.float()
    costs = -(gains if macro_ids is None or not pooled else MacroActions(macro_ids).mean(gains))
    losses = costs * ratios
    if clip == "pooled":
        losses = torch.maximum(losses, costs * ratios.clamp(1 - low, 1 + high))
    if denominator is None:
        denominator = normaliser(aggregation, mask, macro_ids, longest=longest or max(mask.shape[1], 1))
    return _mean_over(losses * step_weights(aggregation, mask, macro_ids, pooled=pooled), steps, denominator)


def aggregation_of(ratio: Granularity, aggregation: Aggregation | None) -> Aggregation:
    """Fill in the default: the mean over tokens for the ratio of tokens, over macro actions for a pooled one."""
    return aggregation or ("token_mean" if ratio == "token" else "action_mean")


def _held(
    log_ratio: Float[Tensor, "B T"], gains: Float[Tensor, "B T"], low: float, high: float
) -> Float[Tensor, "B T"]:
    """Hold log ratios within [-low, high] on the side where going further would raise the objective."""
    return torch.where(
        gains > 0, log_ratio.clamp(max=high), torch.where(gains < 0, log_ratio.clamp(min=-low), log_ratio)
    )


def _shared(
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    ratio: Granularity,
    macro_ids: Int[Tensor, "B T"] | None,
) -> Float[Tensor, "B T"]:
    """Give each token the advantage that its ratio is multiplied with; 0 outside the response."""
    if ratio == "token" or macro_ids is None:
        return torch.where(mask, advantages.float(), 0)
    actions = MacroActions(macro_ids)
    return actions.to_tokens(actions.mean(advantages.float()))


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    cliprange_value: float | None,
    denominator: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute PPO's clipped value loss; every token's value regresses to the return of its macro action.

        loss = 0.5 * mean_t max((V_t - R_t)^2, (clip(V_t, V_old - cliprange_value, V_old + cliprange_value) - R_t)^2)

    Args:
        values: (B, T) float. Current critic; the gradient flows through it.
        old_values: (B, T) float. Critic at the time of the rollout.
        returns: (B, T) float. Targets.
        mask: (B, T) bool. True on valid response tokens.
        cliprange_value: Largest step of a value from its old one, positive; None for no clipping.
        denominator: () float. Tokens to divide by, when these rows are part of a larger batch.

    Returns:
        () float32.

    Raises:
        ValueError: If cliprange_value is a number that is not positive.

    Source:
        Schulman et al., 2017; MA-RLHF's official code, `ppo_trainer.py`, critic loss.
    """
    if cliprange_value is not None:
        _check_positive("cliprange_value", cliprange_value)
    # Masked before the square: a NaN of the padding would come back through it as a gradient, 0 * NaN.
    values, old_values, returns = values.float(), old_values.float(), returns.float()
    losses = torch.where(mask, values - returns, 0).square()
    if cliprange_value is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        losses = torch.maximum(losses, torch.where(mask, clipped - returns, 0).square())
    return 0.5 * losses.sum() / _size(mask, denominator)


def _check_positive(name: str, number: float) -> None:
    """Refuse a range that holds nothing: clipping to it would pin the model where it was, without a word."""
    if not number > 0:
        raise ValueError(f"{name} is {number}; choose a positive number")


def _mean_over(
    x: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"], denominator: Float[Tensor, ""] | None
) -> Float[Tensor, ""]:
    """Sum over the mask and divide by its size, or by the size of the larger batch; padding gets no gradient."""
    return torch.where(mask, x, 0).sum() / _size(mask, denominator)


def _size(mask: Bool[Tensor, "B N"], denominator: Float[Tensor, ""] | None) -> Shaped[Tensor, ""]:
    """Count what is averaged over, unless it is part of a larger batch whose size is given; at least 1."""
    return (mask.sum() if denominator is None else denominator).clamp(min=1)
