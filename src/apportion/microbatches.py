"""Rows grouped by length, so that little is computed on padding and memory stays within a budget of tokens."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor


def by_length(lengths: Int[Tensor, " B"], budget: int) -> list[Int[Tensor, " N"]]:
    """Group rows of like length; a group times its longest row stays within the budget.

    Args:
        lengths: (B) int64. Tokens of each row.
        budget: Tokens of a group, padding included; a single longer row is a group of its own.

    Returns:
        Row numbers of each group, longest rows first, so that memory runs out at once or never.
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered, groups, first = lengths[order].tolist(), [], 0
    while first < len(ordered):
        size = max(1, budget // max(1, ordered[first]))
        groups.append(order[first : first + size])
        first += size
    return groups


def in_groups(
    function: Callable[[Int[Tensor, " N"]], tuple[Tensor, ...]], lengths: Int[Tensor, " B"], budget: int, width: int
) -> tuple[Tensor, ...]:
    """Compute something for all rows, group by group, and put the rows back in order.

    Args:
        function: From row numbers to tensors of N rows; a second axis shorter than `width` is filled with zeros.
        lengths: (B) int64. Tokens of each row.
        budget: Tokens of a group.
        width: Length of the second axis, where there is one.

    Returns:
        What the function returns, with B rows in the order of `lengths`.
    """
    groups = by_length(lengths, budget)
    parts = [function(group) for group in groups]
    back = torch.cat(groups).argsort()
    return tuple(torch.cat([_widen(x, width) for x in tensors])[back] for tensors in zip(*parts, strict=True))


def _widen(x: Tensor, width: int) -> Tensor:
    """Fill the second axis with zeros up to a width."""
    return x if x.ndim == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))
