"""Macro actions: runs of response tokens, numbered; from tokens to macro actions and back.

A macro action has no object of its own. `macro_ids` (B, T) holds the number of each token's action, and everything else
is scatter and gather along the token axis. The axis M of macro actions is as long as T, its upper bound, so that
nothing has to be counted on the host; actions that do not exist are zero, and their length is 0. On the way there and
back, tokens outside the response have an action of their own before the first, number -1, which is cut off: that is
quicker than to mask them out, and nothing that stands there can be heard.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apportion.masked import ranks

Pooling = Literal["equal", "unit", "position", "position_falling"]


def macro_ids(closes: Bool[Tensor, "B T"], response_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number the macro actions of each row.

    Every valid token has one number; the numbers of a row are 0, 1, 2, ... without gaps and never fall.

    Args:
        closes: (B, T) bool. True on tokens that close their action; ignored outside the response.
        response_mask: (B, T) bool. True on valid tokens, in any pattern.

    Returns:
        (B, T) int64. -1 outside the response.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.1.
    """
    before = torch.nn.functional.pad(closes & response_mask, (1, 0))[:, : closes.shape[1]]
    return torch.where(response_mask, before.cumsum(1), -1)


def sum_over_actions(x: Shaped[Tensor, "B T"], ids: Int[Tensor, "B T"]) -> Shaped[Tensor, "B M"]:
    """Sum a token quantity over each macro action.

    Args:
        x: (B, T) float or int. Outside the response it has no effect.
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, M) same dtype, M = T. 0 where no such action exists.
    """
    return x.new_zeros(len(x), x.shape[1] + 1).scatter_add_(1, ids + 1, x)[:, 1:]


def to_tokens(x: Shaped[Tensor, "B M"], ids: Int[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
    """Give each token the quantity of its macro action.

    Args:
        x: (B, M) any dtype. One entry a macro action.
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, T) same dtype. 0 outside the response.
    """
    return torch.nn.functional.pad(x, (1, 0)).gather(1, ids + 1)


def macro_lengths(ids: Int[Tensor, "B T"]) -> Int[Tensor, "B M"]:
    """Count the tokens of each macro action.

    Args:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, M) int64, M = T. 0 where no such action exists, so that `macro_lengths(ids) > 0` is the mask of actions.
    """
    return sum_over_actions(torch.ones_like(ids), ids)


def offsets(ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count the tokens before each token inside its own macro action.

    Args:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, T) int64. 0 on the first token of an action; meaningless outside the response.
    """
    lengths = macro_lengths(ids)
    return ranks(ids >= 0) - to_tokens(lengths.cumsum(1) - lengths, ids)


def pooling_weights(
    ids: Int[Tensor, "B T"], pooling: Pooling, lengths: Int[Tensor, "B M"] | None = None
) -> Float[Tensor, "B T"]:
    r"""Weigh the tokens of each macro action; the weights of an action sum to 1.

    With m tokens in the action, i = 0 .. m - 1 the place in it:

        equal              1 / m
        unit               1 on the last token
        position           (1 / (m - i)) / H,   H = sum_j 1 / (m - j): rises to the last token
        position_falling   (1 / (i + 1)) / H: falls from the first token

    Args:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.
        pooling: Which of the four.
        lengths: (B, M) int64. `macro_lengths(ids)`, where that is known already.

    Returns:
        (B, T) float32. 0 outside the response.

    Raises:
        ValueError: If the pooling is none of the four.

    Source:
        MA-RLHF, section 3.2 and appendix; `position_falling` is what its official code computes for `position`.
    """
    lengths = macro_lengths(ids) if lengths is None else lengths
    if pooling == "equal":
        return to_tokens(lengths.clamp(min=1).float().reciprocal(), ids)
    ahead = to_tokens(lengths, ids) - offsets(ids)
    if pooling == "unit":
        return ((ids >= 0) & (ahead == 1)).float()
    if pooling not in ("position", "position_falling"):
        raise ValueError(f"pooling is {pooling!r}; choose 'equal', 'unit', 'position' or 'position_falling'")
    distance = ahead if pooling == "position" else offsets(ids) + 1
    weights = torch.where(ids >= 0, distance.clamp(min=1).float().reciprocal(), 0)
    return weights / to_tokens(sum_over_actions(weights, ids), ids).clamp(min=torch.finfo(torch.float32).tiny)
