"""Random numbers that belong to a row: a function of the seed and of what the row says, and of nothing else.

A row draws the same numbers alone or in a batch, in any order, under any padding, on any device. So a random
segmentation never changes between the epochs of an update, between processes, or after a resume, and no generator has
to be carried along. Two rows with the same prompt and response draw the same numbers.

Source:
    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in 64-bit integers that wrap.
"""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64
from torch import Tensor

from apportion.batch import Rollout
from apportion.masked import Packing

Array = TypeVar("Array", Tensor, np.ndarray)


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


def _mix_unsigned(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Do the same to NumPy's integers without a sign, in half of the time."""
    x = (x >> 30 ^ x) * (_FIRST % 2**64)
    x = (x >> 27 ^ x) * (_SECOND % 2**64)
    return x >> 31 ^ x


def check_seed(seed: object) -> None:
    """Refuse what is no seed.

    Raises:
        ValueError: If it is not a whole number.
    """
    if not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed!r}; give a whole number, such as 0")


def permutations(rollout: Rollout, seed: int) -> Int[Tensor, "B T"]:
    """Draw a random permutation of the valid response tokens of each row.

    Where two of a row's keys agree in their 24 bits, in one of 130 rows of 512 tokens, those two keep their order.

    Args:
        rollout: The rows.
        seed: Any integer; another seed gives other permutations.

    Returns:
        (B, T) int64. On a valid token the column of another one of the row, each once; elsewhere some column.
    """
    mask, packing = rollout.response_mask, rollout.packing
    return packing.unpack(_order(packing.unpack(row_keys(rollout, mask.shape[1], seed) >> 40), mask))


def orders(rollout: Rollout, seed: int, exists: Bool[Tensor, "B M"]) -> Int[Tensor, "B M"]:
    """Draw a random order of what stands at the front of each row, such as its macro actions; see `permutations`.

    Args:
        rollout: The rows.
        seed: Any integer.
        exists: (B, M) bool. True at the front of each row, as often as there is something to be ordered.

    Returns:
        (B, M) int64. The columns of what exists in their new order, each once, and then the other columns.
    """
    return _order(row_keys(rollout, exists.shape[1], seed) >> 40, exists)


def _order(keys: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Sort each row of signed integers of 24 bits, equal ones in the order they are in, and return their columns.

    What is not of the mask comes last. With the column in the low bits the numbers themselves are sorted, and all
    differ: on a CPU NumPy does that with vector instructions, in a fraction of torch's time.
    """
    ranked = keys.clamp(max=2**23 - 2).masked_fill_(~mask, 2**23 - 1)
    marked = ranked.bitwise_left_shift_(32).bitwise_or_(torch.arange(keys.shape[1], device=keys.device))
    if marked.device.type == "cpu":
        marked.numpy().sort(axis=1)
    else:
        marked = marked.sort(dim=1).values
    return marked.bitwise_and_(2**32 - 1)


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
    start = int(seed) * _GOLDEN + _FIRST + stream * _SECOND
    parts = (rollout.prompt_ids, Packing(rollout.prompt_mask)), (rollout.response_ids, rollout.packing)
    texts = [packing.pack(ids.long() + 1) for ids, packing in parts]
    if rollout.response_ids.device.type == "cpu":
        numbers = partial(np.arange, dtype=np.uint64)
        unsigned = [text.numpy().view(np.uint64) for text in texts]
        keys = _keys(unsigned, count, start % 2**64, _GOLDEN % 2**64, numbers, _mix_unsigned)
        return torch.from_numpy(keys.view(np.int64))
    return _keys(texts, count, _signed(start), _GOLDEN, partial(torch.arange, device=texts[1].device), _mix)


def _keys(
    texts: Sequence[Array], count: int, start: int, golden: int, numbers: Callable[..., Array], mix: Callable
) -> Array:
    """Draw as `row_keys` does, in torch's integers or in NumPy's, which are quicker on a CPU.

    Args:
        texts: (B, P) and (B, T). Each row's ids of the prompt and of the response, from 1 on, 0 behind them.
        count: Numbers a row.
        start: What tells the seeds apart.
        golden: The step of SplitMix64.
        numbers: `arange` of such integers.
        mix: Scrambles such integers.
    """
    # Odd weights: no token weighs nothing. A place weighs differently in the prompt and in the response.
    weights = (mix(numbers(i, 2 * text.shape[1] + i, 2) * golden) | 1 for i, text in enumerate(texts))
    prompt, response = ((text * own).sum(1) for text, own in zip(texts, weights, strict=True))
    state = mix(prompt + response + start)
    return mix(state[:, None] + numbers(1, count + 1) * golden)
