"""Runs of numbers that each end before the one that exceeds their mean, for a whole batch in a logarithm of steps."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 16
"""Tokens that are segmented one after the other: merging so short blocks would take longer."""


def mean_rises(surprise: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Mark where actions begin when each ends before the token that exceeds its mean; without meaning in the filling.

    Blocks of tokens are segmented as if each began a row, and merged in pairs. The beginnings found in the right block
    stay, but for those up to the first that exceeds the mean of the action which the left block leaves open. That is
    exact: inside an action of the right block the mean only falls from the first token on, and if that token did not
    exceed the open action's mean, then the open action's mean stays the higher, and no token exceeds it. For the same
    reason a merge need not know which tokens are beginnings, and which of them were dropped: none else exceeds a mean
    sooner.

    With P_t the sum before t, token t exceeds the mean of the action that began at i when

        s_t (t - i) > P_t - P_i,    or, the terms of t on one side,    P_t - t s_t + i s_t < P_i

    Sums are kept in float64, where those of float32 numbers are exact unless some are less than a millionth of others;
    there a token that equals the mean may be taken to exceed it. Time is the first axis here, which keeps short blocks
    as quick as long ones, and within blocks the place in the block, so that what is done at once lies side by side.

    Args:
        surprise: (B, T) float32. What is compared, valid entries first in each row; finite.

    Returns:
        (B, T) bool. The first token of a row begins an action, too.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2, the wording of perplexity-based termination.
    """
    rows, width = surprise.shape
    length = max(1 << max(width - 1, 0).bit_length(), BLOCK)
    filled = torch.nn.functional.pad(surprise, (0, length - width)) if length > width else surprise
    exact = filled.T.contiguous().double()  # quicker than to turn and to convert at once
    number = length // BLOCK
    stays, total, count = _mean_stays_in_blocks(exact.view(number, BLOCK, rows).transpose(0, 1).contiguous())
    ends = torch.arange(1, length + 1, dtype=torch.float64, device=surprise.device)[:, None]
    places = length + 1 - ends  # counted from the end: the first is the largest
    sums = exact.cumsum(0)
    last = slice(BLOCK - 1, None, BLOCK)
    opened = torch.stack([ends[last] - count, sums[last] - total])  # i and P_i of the action each block leaves open
    line = sums.addcmul_(exact, ends, value=-1)  # P_t - t s_t
    kept = _first_that_stays(exact, line, places, opened)
    ranks = stays.mul_(length).add_(places.view(number, BLOCK, 1).transpose(0, 1))  # what stays is by so much too late
    opens = ranks.le_(kept).bool()
    return opens.permute(2, 1, 0).reshape(rows, length)[:, :width]


def _first_that_stays(
    surprise: Float[Tensor, "L B"],
    line: Float[Tensor, "L B"],
    places: Float[Tensor, "L 1"],
    opened: Float[Tensor, "2 N B"],
) -> Float[Tensor, "N B"]:
    """Merge N blocks in pairs, and return before which place none of a block's beginnings stays; see `mean_rises`.

    Args:
        surprise: (L, B) float64. s_t.
        line: (L, B) float64. P_t - t s_t.
        places: (L, 1) float64. Counted from the end: L for the first.
        opened: (2, N, B) float64. i and P_i of the action that each block leaves open.

    Returns:
        (N, B) float64. Counted from the end.
    """
    length, rows = surprise.shape
    kept = torch.full_like(opened[0], length)
    number = len(kept) // 2  # of pairs
    while number:
        span = len(kept) // number // 2  # blocks in each half
        left, own = opened.view(2, number, 2, 1, rows).unbind(2)
        begin, before = left.unbind()
        halves = (x.view(number, 2, span * BLOCK, x.shape[1]) for x in (line, surprise, places))
        terms, factors, right = (half.select(1, 1) for half in halves)
        rises = torch.addcmul(terms, factors, begin).lt_(before)  # 1 or 0, in place, too
        first = rises.mul_(right).amax(1, keepdim=True)
        kept.view(number, 2, span, rows).select(1, 1).clamp_(max=first)
        opened = torch.lerp(left, own, first.clamp_(max=1))  # exact at 0 and 1, and quicker than to choose
        number //= 2
    return kept


def _mean_stays_in_blocks(
    blocks: Float[Tensor, "K N B"],
) -> tuple[Float[Tensor, "K N B"], Float[Tensor, "N B"], Float[Tensor, "N B"]]:
    """Mark with 0 where actions begin in blocks of K tokens, each of which begins a row, and all else with 1.

    Returns the sum and the number of tokens of the action that each block leaves open, too.
    """
    stays, one = torch.empty_like(blocks), blocks.new_ones(())
    stays[0] = 0
    tokens = blocks.unbind()
    total, count = tokens[0].clone(), torch.ones_like(tokens[0])
    for token, stay in zip(tokens[1:], stays.unbind()[1:], strict=True):
        torch.mul(token, count, out=stay).le_(total)  # 1 or 0: comparing is quickest in place
        torch.addcmul(token, total, stay, out=total)
        torch.addcmul(one, count, stay, out=count)
    return stays, total, count
