"""Random numbers that belong to a row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.batch import rows
from apportion.credit.row_keys import (
    _FIRST,
    _GOLDEN,
    _keys,
    _mix,
    _mix_unsigned,
    _order,
    _signed,
    permutations,
    row_keys,
)
from apportion.masked import Packing
from batches import mask_of_lengths, padded, random_rollout, without_type_checks


def test_keys_belong_to_the_row_and_not_to_the_batch_or_its_padding() -> None:
    rollout = random_rollout(mask_of_lengths(5, 3, 0))
    keys = row_keys(rollout, 8, seed=1)
    assert torch.equal(row_keys(padded(rollout, left=2, right=3, prompt_left=4), 8, seed=1), keys)
    assert torch.equal(row_keys(rows(rollout, slice(1, 2)), 8, seed=1), keys[1:2])


def test_fewer_numbers_are_the_first_of_more() -> None:
    rollout = random_rollout(mask_of_lengths(5, 3))
    assert torch.equal(row_keys(rollout, 3, seed=1), row_keys(rollout, 9, seed=1)[:, :3])


def test_the_seed_and_every_token_and_its_place_count() -> None:
    rollout = random_rollout(mask_of_lengths(5, 5))
    swapped = replace(rollout, response_ids=rollout.response_ids.flip(1))
    longer_prompt = replace(rollout, prompt_ids=rollout.prompt_ids + 1)
    keys = [row_keys(r, 4, seed=1) for r in (rollout, swapped, longer_prompt)] + [row_keys(rollout, 4, seed=-(2**70))]
    assert len(torch.cat(keys).unique()) == 4 * 2 * 4


def test_a_token_moved_from_prompt_to_response_gives_other_keys() -> None:
    rollout = random_rollout(mask_of_lengths(5))
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    mask = torch.ones(1, 9, dtype=torch.bool)
    wide = torch.zeros(1, 5)
    splits = [
        replace(
            rollout,
            prompt_ids=ids[:, :cut],
            prompt_mask=mask[:, :cut],
            response_ids=ids[:, cut:],
            response_mask=mask[:, cut:],
            **{name: wide.new_zeros(1, 9 - cut) for name in ("old_logprobs", "ref_logprobs", "values", "entropies")},
        )
        for cut in (3, 4)
    ]
    assert (row_keys(splits[0], 4, seed=0) != row_keys(splits[1], 4, seed=0)).all()


def test_keys_are_spread_evenly() -> None:
    """Each of 64 bits is set in half of 64,000 numbers, within five standard deviations."""
    keys = row_keys(random_rollout(mask_of_lengths(*[3] * 1000)), 64, seed=0)
    assert len(keys.unique()) == keys.numel()
    set_bits = torch.stack([((keys >> bit) & 1).double().mean() for bit in range(64)])
    assert ((set_bits - 0.5).abs() < 5 * 0.5 / 64000**0.5).all()


@given(st.lists(st.lists(st.integers(-5, 5) | st.sampled_from([-(2**23), 2**23 - 1]), min_size=6, max_size=6)))
def test_keys_are_sorted_as_by_torch_and_equal_ones_keep_their_order(drawn: list) -> None:
    keys = torch.tensor(drawn, dtype=torch.long).view(-1, 6)
    mask = keys % 3 > 0
    ranked = keys.clamp(max=2**23 - 2).masked_fill(~mask, 2**23 - 1)  # what is masked out comes last
    assert torch.equal(_order(keys, mask), ranked.argsort(dim=1, stable=True))


@given(
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    count=st.integers(0, 5),
    seed=st.integers(-(2**70), 2**70),
)
def test_the_keys_of_a_cpu_are_those_of_other_devices(lengths: tuple[int, int], count: int, seed: int) -> None:
    """Where integers have no sign, and where they have one."""
    rollout = random_rollout(mask_of_lengths(*lengths))
    texts = [
        packed.pack(ids + 1)
        for ids, packed in ((rollout.prompt_ids, Packing(rollout.prompt_mask)), (rollout.response_ids, rollout.packing))
    ]
    elsewhere = _keys(texts, count, _signed(seed * _GOLDEN + _FIRST), _GOLDEN, torch.arange, _mix)
    assert torch.equal(row_keys(rollout, count, seed), elsewhere)


def test_a_seed_of_numpy_is_that_number() -> None:
    rollout = random_rollout(mask_of_lengths(5, 3))
    with without_type_checks():
        assert torch.equal(row_keys(rollout, 3, seed=np.int64(2)), row_keys(rollout, 3, seed=2))  # pyright: ignore


def test_keys_are_those_of_splitmix64() -> None:
    """The first outputs of the generator seeded with 1234567, as its authors' reference program prints them."""
    numbers = torch.arange(1, 6) * _GOLDEN + 1234567
    printed = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _mix(numbers).tolist() == [_signed(number) for number in printed]
    assert _mix_unsigned(numbers.numpy().view(np.uint64)).tolist() == printed


@pytest.mark.parametrize("count", [1, 64, 65, 128, 129, 300])
def test_a_row_is_permuted_alike_alone_and_among_many(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    mask = torch.rand(count, 512, generator=generator) < torch.rand(count, 1, generator=generator)
    rollout = random_rollout(mask)
    drawn = permutations(rollout, seed=3)
    for row in range(0, count, 1 + count // 8):
        alone = permutations(rows(rollout, slice(row, row + 1)), seed=3)
        columns = mask[row].nonzero()[:, 0]
        assert torch.equal(drawn[row, columns], alone[0, columns])
        assert torch.equal(drawn[row, columns].sort().values, columns)  # each once


def test_permutations_are_spread_evenly() -> None:
    """Each of 24 orders of four tokens comes in 1 / 24 of 24,000 rows, within five standard deviations."""
    drawn = permutations(random_rollout(mask_of_lengths(*[4] * 24000)), seed=0)[:, :4]
    orders, counts = drawn.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
