"""How the losses of steps become one number: whose mean it is, and over what."""

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.credit.macro_actions import macro_lengths, to_tokens

Aggregation = Literal["token_mean", "action_mean", "sequence_mean", "constant"]
AGGREGATIONS = ("token_mean", "action_mean", "sequence_mean", "constant")


def step_weights(
    aggregation: Aggregation, mask: Bool[Tensor, "B T"], macro_ids: Int[Tensor, "B T"] | None, *, pooled: bool
) -> Float[Tensor, "B N"] | float:
    r"""Weigh the loss of each step; the weighted sum over `normaliser` is the loss.

    Every token carries the loss of its step, which is the token itself, or its macro action where the ratio is pooled.
    With n tokens in the response, m in the macro action,

        token_mean      mean over all tokens:                                  a token weighs 1
        action_mean     mean over actions of the mean over their tokens:       1 / m
        sequence_mean   mean over responses of the mean over their tokens:     1 / n
        constant        mean over responses of the sum over their tokens, divided by one number for all:  1

    and a step weighs what its tokens do.

    Args:
        aggregation: Which of the four.
        mask: (B, T) bool. True on valid response tokens.
        macro_ids: (B, T) int64. Macro action of each token, -1 outside the response; needed by pooled ratios and
            `action_mean`.
        pooled: Whether steps are macro actions.

    Returns:
        (B, N) float32, or 1 where all steps weigh the same.

    Raises:
        ValueError: If the aggregation is none of the four, or needs macro_ids and has none.

    Source:
        verl, `agg_loss`; `constant` is Dr.GRPO's (https://arxiv.org/abs/2503.20783).
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"loss_aggregation is {aggregation!r}; choose one of {', '.join(map(repr, AGGREGATIONS))}")
    if aggregation != "action_mean" and not pooled:
        sizes: Float[Tensor, "B N"] | float = 1.0
    elif macro_ids is None:
        raise ValueError(f"loss_aggregation {aggregation!r} needs macro_ids, which is None; pass Credit.macro_ids")
    elif aggregation == "action_mean":
        return 1.0 if pooled else to_tokens(macro_lengths(macro_ids), macro_ids).clamp(min=1).float().reciprocal()
    else:
        sizes = macro_lengths(macro_ids).float()
    return sizes / mask.sum(1, keepdim=True).clamp(min=1) if aggregation == "sequence_mean" else sizes


def normaliser(
    aggregation: Aggregation, mask: Bool[Tensor, "B T"], macro_ids: Int[Tensor, "B T"] | None, *, longest: int
) -> Float[Tensor, ""]:
    """Count what the weighted losses are divided by: tokens, macro actions, or responses with tokens.

    Args:
        aggregation: As for `step_weights`.
        mask: (B, T) bool. True on valid response tokens.
        macro_ids: (B, T) int64. Macro action of each token, -1 outside the response; needed by `action_mean`.
        longest: The number that `constant` divides every response by, such as the most tokens that a response may have.

    Returns:
        () float32. Sums over parts of a batch add up to that of the whole.
    """
    if aggregation == "token_mean":
        return mask.sum().float()
    if aggregation == "action_mean" and macro_ids is not None:
        return (macro_lengths(macro_ids) > 0).sum().float()
    responses = mask.any(1).sum().float()
    return responses * longest if aggregation == "constant" else responses
