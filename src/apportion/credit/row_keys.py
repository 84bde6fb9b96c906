"""Random numbers that belong to a row: a function of the seed and of what the row says, and of nothing else.

A row draws the same numbers alone or in a batch, in any order, under any padding, on any device. So a random
segmentation never changes between the epochs of an update, between processes, or after a resume, and no generator has
to be carried along. Two rows with the same prompt and response draw the same numbers.

Source:
    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in 64-bit integers that wrap.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.batch import Rollout
from apportion.masked import Packing


def _signed(x: int) -> int:
    """Reduce an integer to the 64-bit signed range."""
    return (x + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Scramble 64-bit integers; a shift to the right has to drop the sign that torch would copy."""
    # Each result is written over the one before it, never over what was given.
    x = (x >> 30).bitwise_and_(2**34 - 1).bitwise_xor_(x).mul_(_FIRST)
    x = (x >> 27).bitwise_and_(2**37 - 1).bitwise_xor_(x).mul_(_SECOND)
    return (x >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(x)


def permutations(rollout: Rollout, seed: int, mask: Bool[Tensor, "B T"] | None = None) -> Int[Tensor, "B T"]:
    """Draw a random permutation of the valid response tokens of each row, or of other columns.

    All rows are sorted as one sequence, the row in the high bits, which torch sorts faster than many rows. Of the
    random bits 40 are left; among 512 tokens two keys agree once in eight million rows.

    Args:
        rollout: The rows.
        seed: Any integer; another seed gives other permutations.
        mask: (B, T) bool. The columns that are permuted; by default those of valid tokens.

    Returns:
        (B, T) int64. On such a column the number of another one of the row, each once; elsewhere some column.
    """
    mask = rollout.response_mask if mask is None else mask
    count, packing = mask.shape[1], Packing(mask)
    keys = packing.unpack(row_keys(rollout, count, seed))
    random = torch.where(mask, keys >> 24, 2**39)  # what is not valid comes last
    row = torch.arange(len(mask), device=mask.device)[:, None]
    order = (random + (row << 41)).flatten().argsort().view(mask.shape) - row * count
    return packing.unpack(order)


def row_keys(rollout: Rollout, count: int, seed: int, stream: int = 0) -> Int[Tensor, "B count"]:
    """Draw `count` random 64-bit integers for each row.

    Args:
        rollout: The rows; their valid prompt and response tokens are read.
        count: Numbers a row.
        seed: Any integer; another seed gives other numbers.
        stream: Tells apart what draws with one seed.

    Returns:
        (B, count) int64. Sorting random keys gives a random permutation.
    """
    start = _signed(seed * _GOLDEN + _FIRST + stream * _SECOND)
    state = rollout.response_ids.new_full((len(rollout.response_ids),), start, dtype=torch.long)
    for ids, mask in (rollout.prompt_ids, rollout.prompt_mask), (rollout.response_ids, rollout.response_mask):
        tokens = _mix(ids.long().bitwise_left_shift(32).add_(Packing(mask).ranks).add_(_GOLDEN))
        state = _mix(state + tokens.mul_(mask).sum(1))
    steps = torch.arange(1, count + 1, device=state.device) * _GOLDEN
    return _mix(state[:, None] + steps)
