"""Numbering macro actions, and pooling to and from them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import macro_ids, macro_lengths, pooling_weights, sum_over_actions, to_tokens
from apportion.credit.macro_actions import MacroActions, Pooling
from batches import mask_of, without_type_checks

POOLINGS: tuple[Pooling, ...] = ("equal", "unit", "position", "position_falling")


def ids_of(*sizes: int) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]


@st.composite
def segmentations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    width = draw(st.integers(0, 12))
    bits = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=3, max_size=3)
    closes, mask = (torch.tensor(draw(bits), dtype=torch.bool).view(3, width) for _ in range(2))
    return closes, mask


@given(segmentations())
def test_ids_cover_the_row_without_gaps(segmentation: tuple[Tensor, Tensor]) -> None:
    """ma-rlhf.md section 0: one id a valid token, ids 0, 1, 2, ... that never fall, no empty segment."""
    closes, mask = segmentation
    ids = macro_ids(closes, mask)
    assert torch.equal(ids == -1, ~mask)
    for row, closing, valid in zip(ids, closes, mask, strict=True):
        of_tokens, ends = row[valid].tolist(), closing[valid].tolist()
        wanted = [sum(ends[:t]) for t in range(len(ends))]
        assert of_tokens == wanted
        assert sorted(set(of_tokens)) == list(range(len(set(of_tokens))))


@given(segmentations())
def test_lengths_and_offsets_are_those_of_the_groups(segmentation: tuple[Tensor, Tensor]) -> None:
    closes, mask = segmentation
    ids = macro_ids(closes, mask)
    for row, lengths, places in zip(ids, macro_lengths(ids), MacroActions(ids).offsets, strict=True):
        sizes = reference.sizes(row[row >= 0].tolist())
        assert lengths.tolist() == sizes + [0] * (len(row) - len(sizes))
        assert places[row >= 0].tolist() == [i for m in sizes for i in range(m)]


def test_holes_belong_to_no_action_and_do_not_cut_one() -> None:
    closes, mask = mask_of([[0, 0, 1, 0, 0]]), mask_of([[1, 0, 1, 0, 1]])
    assert macro_ids(closes, mask).tolist() == [[0, -1, 0, -1, 1]]


def test_closing_tokens_outside_the_response_close_nothing() -> None:
    assert macro_ids(mask_of([[0, 1, 0, 1]]), mask_of([[1, 0, 1, 0]])).tolist() == [[0, -1, 0, -1]]


@given(segmentations())
def test_sums_to_actions_and_back_keep_totals_and_dtypes(segmentation: tuple[Tensor, Tensor]) -> None:
    closes, mask = segmentation
    ids = macro_ids(closes, mask)
    x = torch.randint(0, 9, mask.shape).float().masked_fill(~mask, torch.nan)
    sums = sum_over_actions(x, ids)
    assert torch.equal(sums.sum(1), torch.where(mask, x, 0).sum(1))
    back = to_tokens(sums, ids)
    assert torch.equal(back[~mask], torch.zeros(int((~mask).sum())))
    for action in range(mask.shape[1]):
        chosen = ids == action
        assert torch.equal(torch.where(chosen, x, 0).sum(1), sums[:, action])
        assert torch.equal(back[chosen], sums[:, action : action + 1].expand_as(ids)[chosen])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16])
def test_going_back_to_tokens_keeps_the_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 0, -1]])
    back = to_tokens(torch.ones(1, 3, dtype=dtype), ids)
    assert torch.equal(back, torch.tensor([[1, 1, 0]], dtype=dtype))
    assert back.dtype == dtype


@pytest.mark.parametrize(
    ("pooling", "weights"),
    [
        ("equal", [0.2, 0.2, 0.2, 0.2, 0.2]),
        ("unit", [0, 0, 0, 0, 1]),
        ("position", [0.0876, 0.1095, 0.1460, 0.2190, 0.4380]),
        ("position_falling", [0.4380, 0.2190, 0.1460, 0.1095, 0.0876]),
    ],
)
def test_o5_weights_of_an_action_of_five_tokens(pooling: Pooling, weights: list[float]) -> None:
    """ma-rlhf.md O5: position-decayed weights rise to the last token in the paper, and fall in the official code."""
    assert pooling_weights(ids_of(5), pooling)[0].tolist() == pytest.approx(weights, abs=5e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_runs_for_every_length(pooling: Pooling) -> None:
    """ma-rlhf.md section 4 row 5: unit crashed, position was reversed, an unset pooling left a variable undefined."""
    sizes = range(1, 11)
    weights = pooling_weights(ids_of(*sizes), pooling)[0].split(list(sizes))
    for m, of_action in zip(sizes, weights, strict=True):
        assert math.isclose(of_action.sum(), 1, abs_tol=1e-6)
        assert of_action.tolist() == pytest.approx(reference.pooling(m, pooling), abs=1e-6)
        if pooling == "position":
            assert (of_action.diff() >= 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_o10_constant_values_pool_to_the_constant(pooling: Pooling) -> None:
    ids = torch.cat([torch.nn.functional.pad(ids_of(3, 3, 1), (0, 2), value=-1), ids_of(9)])
    pooled = sum_over_actions(pooling_weights(ids, pooling) * 0.7, ids)
    torch.testing.assert_close(pooled[pooled != 0], torch.full((4,), 0.7))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_without_tokens_has_no_weights(pooling: Pooling) -> None:
    assert torch.equal(pooling_weights(torch.full((2, 4), -1), pooling), torch.zeros(2, 4))
    assert pooling_weights(torch.zeros(2, 0, dtype=torch.long), pooling).shape == (2, 0)


def test_an_unknown_pooling_is_refused() -> None:
    with without_type_checks(), pytest.raises(ValueError, match="pooling is 'last'; choose 'equal', 'unit'"):
        pooling_weights(ids_of(2), "last")  # pyright: ignore
