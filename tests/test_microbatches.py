"""Groups of rows stay within their budget, hold every row once, and give rows back in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.microbatches import by_length, in_groups

widths = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=20)


def tokens(lengths: Tensor) -> int:
    """Tokens that a model is given for these rows: prompts padded to the longest, and responses to theirs."""
    return len(lengths) * int(lengths.amax(0).sum())


@given(rows=widths, budget=st.integers(1, 200))
def test_every_row_is_in_one_group_and_no_group_exceeds_the_budget_with_its_padding(
    rows: list[tuple[int, int]], budget: int
) -> None:
    lengths = torch.tensor(rows)
    groups = by_length(lengths, budget)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or tokens(lengths[group]) <= budget


@given(rows=widths)
def test_a_budget_that_holds_everything_gives_one_group(rows: list[tuple[int, int]]) -> None:
    lengths = torch.tensor(rows)
    assert len(by_length(lengths, tokens(lengths))) == 1


def test_the_longest_rows_come_first_and_like_lengths_together() -> None:
    lengths = torch.tensor([[1, 1], [4, 6], [1, 2], [5, 5]])
    assert [group.tolist() for group in by_length(lengths, 22)] == [[1, 3], [2, 0]]


def test_groups_of_one_number_a_row() -> None:
    assert [group.tolist() for group in by_length(torch.tensor([2, 9, 3, 4]), 9)] == [[1], [3, 2], [0]]


@given(rows=widths, budget=st.integers(1, 200))
def test_rows_come_back_in_order_whatever_the_budget(rows: list[tuple[int, int]], budget: int) -> None:
    lengths = torch.tensor(rows)
    width = int(lengths[:, 1].max())

    def function(group: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.arange(int(lengths[group, 1].max()))
        return torch.where(columns < lengths[group, 1:], group[:, None] + 1, 0), group

    wide, flat = in_groups(function, lengths, budget, width)
    assert flat.tolist() == list(range(len(rows)))
    expected = torch.where(torch.arange(width) < lengths[:, 1:], torch.arange(1, len(rows) + 1)[:, None], 0)
    assert torch.equal(wide, expected)
