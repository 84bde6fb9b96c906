"""Arithmetic that ignores padding: every reduction takes a mask, and padding never speaks."""

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

ROUNDING = 2.0**-19
"""What numbers that are equal but for float32's rounding of sums may differ by, in units of their size: 16 in the last
place, more than sums of about a thousand terms, one after the other, are off by."""

Reduce = Callable[[Tensor], Tensor]
"""Sum a tensor over the processes that share a batch; the identity on one process."""


def alone(total: Tensor) -> Tensor:
    """Return the total of the only process there is."""
    return total


def zero_outside(x: Float[Tensor, "*#shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Keep `x` where `mask` is True, 0 elsewhere: `torch.where` without gradient, and quicker on a CPU.

    The bits of a number are multiplied by 1 or 0, so that those of NaN and infinity vanish too.

    Args:
        x: (...) float. Any values; broadcast to the mask.
        mask: (...) bool. True on what counts.

    Returns:
        (...) float32. 0 outside of the mask.
    """
    return mask.to(torch.int32).mul_(x.detach().float().view(torch.int32)).view(torch.float32)


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, reduce: Reduce = alone
) -> Float[Tensor, ""]:
    """Average `x` where `mask` is True; 0 where nothing is.

    Args:
        x: (...) float. Any values; what lies outside the mask, NaN included, has no effect.
        mask: (...) bool. True on what counts.
        reduce: Sums a tensor over processes, so that the mean is that of the whole batch.

    Returns:
        () float32.
    """
    totals = reduce(torch.stack([torch.where(mask, x, 0).float().sum(), mask.sum().float()]))
    return totals[0] / totals[1].clamp(min=1)


def masked_var(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, reduce: Reduce = alone
) -> Float[Tensor, ""]:
    """Variance of `x` where `mask` is True, with Bessel's correction; 0 for fewer than two values.

    Args:
        x: (...) float. Any values; what lies outside the mask has no effect.
        mask: (...) bool. True on what counts.
        reduce: Sums a tensor over processes, so that the variance is that of the whole batch.

    Returns:
        () float32.
    """
    centred = torch.where(mask, x, 0).float() - masked_mean(x, mask, reduce=reduce)
    totals = reduce(torch.stack([torch.where(mask, centred, 0).square().sum(), mask.sum().float()]))
    return totals[0] / (totals[1] - 1).clamp(min=1)


def masked_whiten(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, reduce: Reduce = alone, eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Shift and scale `x` to mean 0 and variance 1 over the mask; 0 outside of it.

    Values whose deviation is within `ROUNDING` of their mean, in units of it, and of which none is further away than
    four times that, are equal but for the rounding of the sums that they came from: they give 0, where to scale
    rounding would be to learn from it. Where one is not finite, or is too large to be squared, none of the answers is.

    Args:
        x: (...) float. Any values; what lies outside the mask has no effect.
        mask: (...) bool. True on what counts.
        reduce: Sums a tensor over processes, so that the whole batch is whitened as one.
        eps: Added to the variance.

    Returns:
        (...) float32.
    """
    mean = masked_mean(x, mask, reduce=reduce)
    centred = torch.where(mask, x.float() - mean, 0)
    apart = mask & ~(centred.abs() <= 4 * ROUNDING * mean.abs())  # NaN is
    total, count, outside = reduce(torch.stack([t.float().sum() for t in (centred.square(), mask, apart)]))
    variance = total / (count - 1).clamp(min=1)
    scale = torch.where(variance.isfinite(), torch.rsqrt(variance + eps), torch.nan)
    equal = (outside == 0) & (variance <= (ROUNDING * mean) ** 2) & variance.isfinite()
    return torch.where(mask & ~equal, (x.float() - mean) * scale, 0)


def ranks(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count the valid tokens of a row before each token: the position that is left when padding and holes are cut out.

    Args:
        mask: (B, T) bool. True on valid tokens, in any pattern.

    Returns:
        (B, T) int64. Meaningful on the mask; -1 before the first valid token.
    """
    return mask.cumsum(1) - 1


def last_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Find the column of the last True of each row; -1 in a row without one.

    Args:
        mask: (B, T) bool. Any pattern.

    Returns:
        (B) int64.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    padded = torch.nn.functional.pad(torch.where(mask, columns, -1), (1, 0), value=-1)
    return padded.amax(1)


def is_last(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Mark the last True of each row.

    Args:
        mask: (B, T) bool. Any pattern.

    Returns:
        (B, T) bool. At most one True a row.
    """
    return Packing(mask).last


def _are_in_place(mask: Bool[Tensor, "B T"]) -> bool:
    """Whether all rows are known to be without holes; on a CPU, for elsewhere to look would be to wait for it."""
    return mask.device.type == "cpu" and not bool((mask[:, 1:] > mask[:, :-1]).count_nonzero())


class Packing:
    """The valid entries of each row moved to its front, and back.

    Where nothing has to be moved, which is so for all rows without holes, nothing is, on a CPU.

    Args:
        mask: (B, T) bool. True on valid entries, in any pattern.
    """

    def __init__(self, mask: Bool[Tensor, "B T"]) -> None:
        """Find out where each entry goes."""
        self.mask = mask
        self._places = None if _are_in_place(mask) else ranks(mask).clamp_(min=0)

    @property
    def last(self) -> Bool[Tensor, "B T"]:
        """The last valid entry of each row, alone."""
        if self._places is None:
            return self.mask & ~torch.nn.functional.pad(self.mask, (0, 1))[:, 1:]
        return self.mask & (self._places == self._places[:, -1:])

    @property
    def packed_mask(self) -> Bool[Tensor, "B T"]:
        """The mask of what is packed: as many at the front of each row as are valid."""
        if self._places is None:
            return self.mask
        return torch.arange(self.mask.shape[1], device=self.mask.device) < self.mask.sum(1, keepdim=True)

    @property
    def ranks(self) -> Int[Tensor, "*B T"]:
        """`ranks(mask)`, one row for all where nothing is moved; meaningful on the mask alone."""
        return torch.arange(self.mask.shape[1]) if self._places is None else self._places

    def pack(self, x: Shaped[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
        """Move the valid entries of each row to its front, in order, and fill the rest with zero.

        Args:
            x: (B, T) any dtype; nothing flows back to it.

        Returns:
            (B, T) same dtype. Entry j is the valid entry of rank j.
        """
        x = x.detach()
        if self._places is not None:
            return x.new_zeros(len(x), x.shape[1] + 1).scatter_(1, self._targets, x)[:, :-1]
        if x.dtype == torch.bool:
            return x & self.mask
        return zero_outside(x, self.mask) if x.dtype == torch.float32 else torch.where(self.mask, x, x.new_zeros(()))

    def unpack(self, x: Shaped[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
        """Give each valid entry what stands at its rank.

        Args:
            x: (B, T) any dtype.

        Returns:
            (B, T) same dtype. Without meaning outside of the mask.
        """
        return x if self._places is None else x.gather(1, self._places)

    @cached_property
    def _targets(self) -> Int[Tensor, "B T"]:
        """Where each entry goes: its rank, or for an invalid one a column behind all."""
        return torch.where(self.mask, self.ranks, self.mask.shape[1])
