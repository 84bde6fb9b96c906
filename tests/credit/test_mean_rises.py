"""Runs that end before what exceeds their mean: the CPU's way and the accelerator's, against exact arithmetic."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.credit import guessed_rises as guessing
from apportion.credit.guessed_rises import BLOCK, guessed_rises
from apportion.credit.mean_rises import mean_rises
from apportion.credit.merged_rises import merged_rises

each_way = pytest.mark.parametrize("rises", [mean_rises, merged_rises])


def exactly(row: list[float], kind: Callable = Fraction) -> list[bool]:
    """The definition, number after number: in fractions, or rounded as another kind of numbers is."""
    begins, total, count = [], kind(0), 0
    for number in map(kind, row):
        begins.append(count == 0 or number * count > total)
        total, count = (number, 1) if begins[-1] else (total + number, count + 1)
    return begins


def random_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    """Surprises as of a language model: many small, few large."""
    return -torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-30).log()


@each_way
def test_runs_by_hand(rises: Callable) -> None:
    """The mean of 3, 1 is 2, below 2.5; that of 2.5 is below 3; that of 3, 2, 2, 2 is 2.25, below 2.5."""
    row = [3.0, 1.0, 2.5, 3.0, 2.0, 2.0, 2.0, 2.5]
    wanted = [True, False, True, True, False, False, False, True]
    assert exactly(row) == wanted
    assert rises(torch.tensor([row]))[0].tolist() == wanted


@each_way
@given(
    row=st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0, 2.0, 7.7]), min_size=1, max_size=5 * BLOCK),
    shift=st.integers(0, BLOCK),
)
def test_ties_are_told_apart_exactly_wherever_blocks_end(rises: Callable, row: list[float], shift: int) -> None:
    given_row = torch.tensor([[9.0] * shift + row])
    assert rises(given_row)[0].tolist() == exactly(given_row[0].tolist())


SHAPES = {
    "random": lambda x: x,
    "rising": lambda x: x.sort(1).values,
    "falling": lambda x: x.sort(1, descending=True).values,
    "tied": lambda x: (8 * x).round(),
    "peaked": lambda x: (4 * x).exp(),
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "half of them falling": lambda x: torch.cat([x[::2], x[1::2].sort(1, descending=True).values]),
}


@each_way
@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 517])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_equal_exact_arithmetic(rises: Callable, shape: str, width: int) -> None:
    rows: Tensor = SHAPES[shape](torch.rand(7, width, generator=torch.Generator().manual_seed(width)))
    assert rises(rows).tolist() == [exactly(row) for row in rows.tolist()]


@pytest.mark.parametrize(("power", "lost_at_most"), [(0.5, 0), (1, 0), (3, 3), (6, 40)])
def test_a_guess_gives_the_sums_of_the_tokens_in_their_order(power: float, lost_at_most: int) -> None:
    """Numbers of any size side by side, the impossible too: to the bit what a loop in float64 finds."""
    rows = random_rows(64, 300) ** power
    rows[torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.001] = 1e9
    begins, lost = guessed_rises(rows.numpy())
    assert lost.sum() <= lost_at_most
    for row, found, is_lost in zip(rows.tolist(), begins.tolist(), lost, strict=True):
        assert is_lost or found == exactly(row, float)


@given(
    block=st.sampled_from([1, 2, 3, 8]),
    tries=st.sampled_from([0, 1, 2, 99]),
    few=st.sampled_from([0, 1, 5, 99]),
    seed=st.integers(0, 999),
    power=st.sampled_from([0.1, 1.0, 4.0, 9.0]),
    tied=st.booleans(),
)
def test_guesses_however_bad_are_mended(block: int, tries: int, few: int, seed: int, power: float, tied: bool) -> None:
    """Short blocks guess badly."""
    rows = random_rows(9, 1 + seed % 70, seed) ** power
    rows = (3 * rows).round() / 3 if tied else rows
    with pytest.MonkeyPatch.context() as patch:
        for name, size in ("BLOCK", block), ("TRIES", tries), ("FEW", few):
            patch.setattr(guessing, name, size)
        begins, lost = guessed_rises(rows.numpy())
    for row, found, is_lost in zip(rows.tolist(), begins.tolist(), lost, strict=True):
        assert is_lost or found == exactly(row, float)


def test_every_way_to_mend_is_taken_where_surprises_differ_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above have seen them: blocks together, one by one, and whole rows in another way."""
    rows, segmented, alone = random_rows(64, 512) ** 6, [], []
    segment, mend = guessing._segment, guessing._mend
    monkeypatch.setattr(guessing, "_segment", lambda *given: segmented.append(given[0].shape[1]) or segment(*given))
    monkeypatch.setattr(guessing, "_mend", lambda *given: alone.extend(given[3]) or mend(*given))
    begins, lost = guessed_rises(rows.numpy())
    assert len(segmented) == 2 + guessing.TRIES
    assert segmented[:2] == [64 * 512 // BLOCK] * 2
    assert len(alone) > 0 < lost.sum() < 64
    assert len(alone) < segmented[3] < segmented[2] < segmented[0] / 2
    found = mean_rises(rows)
    assert torch.equal(found[torch.from_numpy(lost)], merged_rises(rows)[torch.from_numpy(lost)])
    assert torch.equal(found[torch.from_numpy(~lost)], torch.from_numpy(begins[~lost]))


def test_rows_are_segmented_alone_as_among_others() -> None:
    """Also those that are lost to guesses, and such as rounding could tell apart."""
    rows = random_rows(64, 512) ** torch.linspace(0.1, 12, 64)[:, None]
    rows[torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.02] = 1e9
    rows[20:24] = 0.3
    together = mean_rises(rows)
    assert 5 < guessed_rises(rows.numpy())[1].sum() < 60
    for some in slice(0, 1), slice(3, 9), slice(20, 21), slice(40, 64):
        assert torch.equal(mean_rises(rows[some]), together[some])


def test_where_rounding_could_tell_an_action_from_its_last_tokens_it_does_not() -> None:
    """Equal tokens, and such as differ in the last bit, beside a billion times as much and as little."""
    generator = np.random.default_rng(0)
    near = np.float32(1 / 3) * (1 + generator.integers(-1, 2, (300, 70)) * 2.0**-23)
    rows = (near * generator.choice([1e9, 1, 1, 1, 1, 1e-9], (300, 70))).astype(np.float32)
    begins, lost = guessed_rises(rows)
    assert (~lost).sum() > 100
    for row, found, is_lost in zip(rows.tolist(), begins.tolist(), lost, strict=True):
        assert is_lost or found == exactly(row, float)


def test_another_device_is_not_waited_for() -> None:
    assert mean_rises(torch.ones(3, 40, device="meta")).shape == (3, 40)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_begins_nowhere(shape: tuple[int, int]) -> None:
    assert mean_rises(torch.zeros(shape)).shape == shape
