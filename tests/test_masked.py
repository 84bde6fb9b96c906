"""Padding never speaks: neither its values, nor NaN, nor its amount."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.masked import (
    ROUNDING,
    Packing,
    is_last,
    last_index,
    masked_mean,
    masked_var,
    masked_whiten,
    ranks,
    zero_outside,
)
from batches import mask_of

NAN = torch.nan

masks = st.integers(0, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4).map(
        lambda rows: torch.tensor(rows, dtype=torch.bool).view(len(rows), width)
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(mask=masks, seed=st.integers(0, 99), column=st.booleans())
def test_what_is_kept_is_kept_to_the_bit_and_the_rest_is_zero(
    dtype: torch.dtype, mask: Tensor, seed: int, column: bool
) -> None:
    odd = torch.tensor([NAN, torch.inf, -torch.inf, -0.0, 1e-42, 3.4e38])  # a subnormal and one of the largest
    generator = torch.Generator().manual_seed(seed)
    shape = (len(mask), 1) if column else mask.shape
    some, which = torch.rand(shape, generator=generator) < 0.5, torch.randint(6, shape, generator=generator)
    x = torch.where(some, odd[which], 1.0)
    kept = zero_outside(x.to(dtype), mask)
    assert kept.dtype == torch.float32
    expected = torch.where(mask, x.to(dtype).float(), 0)
    assert torch.equal(kept.view(torch.int32), expected.view(torch.int32))


def test_means_and_variances_are_those_of_the_valid_entries() -> None:
    x, mask = torch.tensor([[1.0, NAN, 3.0], [8.0, NAN, NAN]]), mask_of([[1, 0, 1], [1, 0, 0]])
    assert masked_mean(x, mask) == 4.0  # (1 + 3 + 8) / 3
    assert masked_var(x, mask) == 13.0  # (9 + 1 + 16) / 2


def test_whitening_gives_mean_0_and_variance_1_and_zero_outside() -> None:
    x = torch.tensor([[1.0, NAN, 3.0], [8.0, torch.inf, NAN]])
    mask = mask_of([[1, 0, 1], [1, 0, 0]])
    white = masked_whiten(x, mask)
    assert masked_mean(white, mask).abs() < 1e-6
    assert (masked_var(white, mask) - 1).abs() < 1e-6
    assert torch.equal(white[~mask], torch.zeros(3))


@pytest.mark.parametrize("reduction", [masked_mean, masked_var])
def test_nothing_to_average_gives_zero(reduction) -> None:
    for shape in (2, 3), (0,), (2, 0):
        assert reduction(torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)) == 0


@pytest.mark.parametrize("value", [0.7, -1.0, 50.0, 1e6])
def test_equal_values_are_whitened_to_zero_though_their_sums_were_rounded(value: float) -> None:
    x = value * (1 + 1e-6 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    mask = torch.ones(64, 512, dtype=torch.bool)
    assert torch.equal(masked_whiten(x, mask), torch.zeros(64, 512))
    x[0] += 1e-3 * value  # one row in 64 stands out by little
    assert masked_whiten(x, mask)[0].abs().min() > 1


@pytest.mark.parametrize("value", [0.7, -1.0, 50.0, 1e6])
def test_one_value_that_differs_among_many_that_are_equal_is_not_whitened_away(value: float) -> None:
    x, mask = torch.full((64, 512), value), torch.ones(64, 512, dtype=torch.bool)
    x[3, 5] *= 1 + 6 * ROUNDING
    wanted = (x.double() - x.double().mean()) / (x.double().var() + 1e-8).sqrt()
    torch.testing.assert_close(masked_whiten(x, mask)[3, 5].double(), wanted[3, 5], rtol=0.2, atol=0)
    x[3, 5] = value * (1 + 2 * ROUNDING)
    assert torch.equal(masked_whiten(x, mask), torch.zeros(64, 512))


@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_not_whitened_away(value: float) -> None:
    mask = mask_of([[1, 1, 0], [1, 1, 1]])
    white = masked_whiten(torch.tensor([[1.0, value, 3.0], [2.0, 4.0, 5.0]]), mask)
    assert white[mask].isnan().all()
    assert white[0, 2] == 0


def test_small_differences_of_large_values_are_whitened_and_too_large_ones_are_not_hidden() -> None:
    x, mask = torch.tensor([[100000, 100000.5, 100000.2, 100000.9]]), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(masked_whiten(x, mask), masked_whiten(x - 100000, mask), atol=0.03, rtol=0)
    assert masked_whiten(torch.tensor([[1e19, 2e19, 3e19, 5e19]]), mask).isnan().all()


def test_a_single_value_is_whitened_to_zero() -> None:
    assert torch.equal(masked_whiten(torch.tensor([[5.0, NAN]]), mask_of([[1, 0]])), torch.zeros(1, 2))


def test_two_processes_reduce_to_what_one_sees() -> None:
    x, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.7
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    sent: list[Tensor] = []
    for half in halves:  # the first round gathers what each process sends, the second adds it up
        masked_mean(*half, reduce=lambda totals: sent.append(totals) or totals)
    means = [masked_mean(*half, reduce=lambda _: sent[0] + sent[1]) for half in halves]
    assert all(torch.allclose(mean, masked_mean(x, mask)) for mean in means)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((1, 4096), 100.0, dtype=dtype)  # the sum, 409600, is beyond float16
    assert masked_mean(x, torch.ones(1, 4096, dtype=torch.bool)) == 100


@given(masks)
def test_positions_are_those_of_the_row_without_padding(mask: Tensor) -> None:
    for row, rank, last, marks in zip(mask, ranks(mask), last_index(mask), is_last(mask), strict=True):
        valid = row.nonzero()[:, 0].tolist()
        assert rank[row].tolist() == list(range(len(valid)))
        assert last == (valid[-1] if valid else -1)
        assert marks.nonzero()[:, 0].tolist() == valid[-1:]


@pytest.mark.parametrize("looks", [True, False])
@given(mask=masks)
def test_packing_keeps_order_and_is_undone_by_unpacking(looks: bool, mask: Tensor) -> None:
    x = torch.arange(1.0, mask.numel() + 1).view(mask.shape)
    packing = Packing(mask)
    if not looks:  # as where the device is another one
        packing._places = ranks(mask).clamp(min=0)
    front = packing.pack(x.masked_fill(~mask, NAN))
    for row, entries, kept in zip(mask, x, front, strict=True):
        assert kept.tolist() == entries[row].tolist() + [0.0] * int((~row).sum())
    assert torch.equal(packing.unpack(front)[mask], x[mask])


@pytest.mark.parametrize(
    ("mask", "moved"), [([[1, 1, 0], [0, 0, 0]], False), ([[1, 1, 1]], False), ([[0, 1, 1]], True)]
)
def test_rows_without_holes_stay_where_they_are(mask: list, moved: bool) -> None:
    packing = Packing(torch.tensor(mask).bool())
    x = torch.randn(packing.mask.shape)
    assert (packing.unpack(x) is not x) == moved
