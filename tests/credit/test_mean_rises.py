"""Runs that end before what exceeds their mean, against exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.credit.mean_rises import BLOCK, mean_rises


def exactly(row: list[float]) -> list[bool]:
    """The definition, number after number, in fractions."""
    begins, total, count = [], Fraction(0), 0
    for number in map(Fraction, row):
        begins.append(count == 0 or number * count > total)
        total, count = (number, 1) if begins[-1] else (total + number, count + 1)
    return begins


def test_runs_by_hand() -> None:
    """The mean of 3, 1 is 2, below 2.5; that of 2.5 is below 3; that of 3, 2, 2, 2 is 2.25, below 2.5."""
    row = [3.0, 1.0, 2.5, 3.0, 2.0, 2.0, 2.0, 2.5]
    wanted = [True, False, True, True, False, False, False, True]
    assert exactly(row) == wanted
    assert mean_rises(torch.tensor([row]))[0].tolist() == wanted


@given(
    st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0, 2.0, 7.7]), min_size=1, max_size=5 * BLOCK),
    st.integers(0, BLOCK),
)
def test_ties_are_told_apart_exactly_wherever_blocks_end(row: list[float], shift: int) -> None:
    given_row = torch.tensor([[9.0] * shift + row])
    assert mean_rises(given_row)[0].tolist() == exactly(given_row[0].tolist())


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 517])
@pytest.mark.parametrize(
    "shape",
    [
        lambda x: x,
        lambda x: x.sort(1).values,
        lambda x: x.sort(1, descending=True).values,
        lambda x: (8 * x).round(),
        lambda x: (4 * x).exp(),
        lambda x: torch.finfo(x.dtype).max / 8 * (8 * x).floor(),
    ],
    ids=["random", "rising", "falling", "tied", "peaked", "huge"],
)
def test_rows_of_every_shape_equal_exact_arithmetic(shape, width: int) -> None:
    rows: Tensor = shape(torch.rand(7, width, generator=torch.Generator().manual_seed(width)))
    assert mean_rises(rows).tolist() == [exactly(row) for row in rows.tolist()]
