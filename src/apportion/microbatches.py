"""Rows grouped by length, so that little is computed on padding and memory stays within a budget of tokens."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Int
from torch import Tensor


def by_length(lengths: Int[Tensor, "B *parts"], budget: int) -> list[Int[Tensor, " N"]]:
    """Group rows of like length; a group times its width with padding stays within the budget.

    Args:
        lengths: (B) int64. Tokens of each row; or (B, K), tokens of K parts that are padded each for itself, as a
            prompt on its left and a response on its right.
        budget: Tokens of a group, padding included; a single longer row is a group of its own.

    Returns:
        Row numbers of each group, longest rows first, so that memory runs out at once or never.
    """
    parts = lengths if lengths.ndim == 2 else lengths[:, None]
    order = parts.sum(1).argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    widest: list[int] = []
    for row, widths in zip(order.tolist(), parts[order].tolist(), strict=True):
        widened = [max(pair) for pair in zip(widest, widths, strict=True)] if groups else widths
        if groups and (len(groups[-1]) + 1) * sum(widened) <= budget:
            groups[-1].append(row)
            widest = widened
        else:
            groups.append([row])
            widest = widths
    return [torch.tensor(group, device=lengths.device) for group in groups]


def in_groups(
    function: Callable[[Int[Tensor, " N"]], tuple[Tensor, ...]],
    lengths: Int[Tensor, "B *parts"],
    budget: int,
    width: int,
    *,
    graph_of_last: bool = False,
) -> tuple[Tensor, ...]:
    """Compute something for all rows, group by group, and put the rows back in order.

    Args:
        function: From row numbers to tensors of N rows; a second axis shorter than `width` is filled with zeros.
        lengths: (B) or (B, K) int64. Tokens of each row, see `by_length`.
        budget: Tokens of a group.
        width: Length of the second axis, where there is one.
        graph_of_last: Let the rows of the last group keep their graph, also where gradients are off.

    Returns:
        What the function returns, with B rows in the order of `lengths`.
    """
    groups = by_length(lengths, budget)
    parts = [function(group) for group in (groups[:-1] if graph_of_last else groups)]
    if graph_of_last:
        torch.clear_autocast_cache()  # weights that were cast without a graph would keep the gradient from it
        with torch.enable_grad():
            parts.append(function(groups[-1]))
    back = torch.cat(groups).argsort()
    with torch.enable_grad() if graph_of_last else nullcontext():
        return tuple(torch.cat([_widen(x, width) for x in tensors])[back] for tensors in zip(*parts, strict=True))


def _widen(x: Tensor, width: int) -> Tensor:
    """Fill the second axis with zeros up to a width."""
    return x if x.ndim == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))
