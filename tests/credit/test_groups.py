"""Advantages against a group: by hand, at the limits, and where there is nothing to compare."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from apportion import (
    GRPO,
    RLOO,
    CreditConfig,
    DrGRPO,
    PrefixDifference,
    ReinforcePlusPlus,
    Scores,
    Shuffled,
    assign_credit,
)
from apportion.credit.advantages import AdvantageEstimator, Earnings
from apportion.credit.groups import GroupEstimator
from batches import mask_of_lengths, random_rollout, random_scores, without_type_checks

ESTIMATORS: tuple[type[GroupEstimator], ...] = (RLOO, GRPO, DrGRPO)
NAMES = {RLOO: "rloo", GRPO: "grpo", DrGRPO: "drgrpo"}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def earned(totals: list[float], lengths: list[int] | None = None) -> Earnings:
    """Responses of some tokens, paid at their ends."""
    mask = mask_of_lengths(*(lengths or [2] * len(totals)))
    ids = torch.where(mask, 0, -1)
    ends = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.where(ends, torch.tensor(totals)[:, None], 0)
    return Earnings(rewards=rewards, values=torch.zeros_like(rewards), ids=ids)


def advantages(estimator: AdvantageEstimator, totals: list[float], lengths: list[int] | None = None) -> list[float]:
    """One number a response; every token has it."""
    given_rewards = earned(totals, lengths)
    found, returns = estimator(given_rewards)
    valid = given_rewards.ids >= 0
    first = found[:, 0]
    assert torch.equal(found, torch.where(valid, first[:, None], 0))
    assert torch.equal(returns, torch.where(valid, given_rewards.rewards.sum(1, keepdim=True), 0))
    return first.tolist()


def test_groups_by_hand() -> None:
    """1, 2, 6 has mean 3; without itself each has 4, 3.5, 1.5; squares 4 + 1 + 9 over 2 are 7. 5, 5, 5 is even."""
    totals = [1.0, 2.0, 6.0, 5.0, 5.0, 5.0]
    assert advantages(DrGRPO(3), totals) == pytest.approx([-2, -1, 3, 0, 0, 0])
    assert advantages(RLOO(3), totals) == pytest.approx([-3, -1.5, 4.5, 0, 0, 0])
    assert advantages(GRPO(3), totals) == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0, 0, 0])


@every_estimator
@pytest.mark.parametrize("value", [0.0, 0.7, -1 / 3, 1e-8, 1e6])
@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_a_group_that_earned_the_same_has_advantage_0_to_the_bit(
    estimator: type[GroupEstimator], size: int, value: float
) -> None:
    assert advantages(estimator(size), [value] * size) == [0.0] * size


@pytest.mark.parametrize("estimator", [*(kind(2) for kind in ESTIMATORS), ReinforcePlusPlus(group_size=2)])
def test_a_group_that_earned_the_same_but_for_rounding_has_advantage_0(estimator: AdvantageEstimator) -> None:
    """Sums of the same terms in another order; beside a group that differs by little."""
    found = advantages(estimator, [0.04999997, 0.04999999, 0.05, 0.0501])
    assert found[:2] == [0, 0]
    assert found[2] < 0 < found[3]


@every_estimator
def test_rounding_is_not_whitened_to_one_either(estimator: type[GroupEstimator]) -> None:
    scores = torch.tensor([1000.0, 1000.0 + 2**-12])  # four units in the last place
    config = CreditConfig(advantage=estimator(2), whiten_advantages=True, kl_coef=0.0)
    credit = assign_credit(random_rollout(mask_of_lengths(3, 5)), Scores(scores=scores), config)
    assert not credit.advantages.any()


@every_estimator
def test_a_small_difference_of_large_scores_counts(estimator: type[GroupEstimator]) -> None:
    """Half of a hundred-thousandth is far above the rounding of float32, and no reason to learn nothing."""
    for totals in ([-2000, -1999.99, -1999.985, -1999.995], [1.0, 1.0, 1.000009, 1.000009]):
        numbers = torch.tensor(totals).tolist()  # as float32 has them
        wanted = reference.group_advantages(NAMES[estimator], numbers, 4)
        assert all(wanted)
        assert advantages(estimator(4), numbers) == pytest.approx(wanted, rel=1e-3)


@every_estimator
def test_what_is_not_finite_is_not_hidden(estimator: type[GroupEstimator]) -> None:
    assert not estimator(2)(earned([1.0, torch.inf]))[0].isfinite().any()


@every_estimator
def test_a_response_without_tokens_is_left_out_of_its_group(estimator: type[GroupEstimator]) -> None:
    found = advantages(estimator(3), [1.0, 9.0, 2.0], [2, 0, 1])
    wanted = advantages(estimator(2), [1.0, 2.0], [2, 1])
    assert found == pytest.approx([wanted[0], 0, wanted[1]])


@every_estimator
def test_what_is_alone_in_its_group_has_nothing_to_be_compared_with(estimator: type[GroupEstimator]) -> None:
    assert advantages(estimator(2), [1.0, 2.0, 3.0, 4.0], [2, 0, 0, 0]) == [0.0] * 4


@every_estimator
@given(
    scores=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=24),
    size=st.integers(2, 6),
    empty=st.integers(0, 3),
)
def test_any_group_is_that_of_the_slow_loops(
    estimator: type[GroupEstimator], scores: list[float], size: int, empty: int
) -> None:
    totals = (scores * size)[: len(scores) // size * size] or scores[:1] * size
    lengths = [0 if empty and i % (empty + 1) == 0 else 1 + i % 3 for i in range(len(totals))]
    found = advantages(estimator(size), totals, lengths)
    told = [x if n else None for x, n in zip(totals, lengths, strict=True)]
    wanted = reference.group_advantages(NAMES[estimator], told, size)
    assert found == pytest.approx(wanted, abs=2e-3, rel=2e-3)  # of GRPO where a group is nearly even


@every_estimator
def test_a_baseline_that_all_of_a_group_share_changes_nothing(estimator: type[GroupEstimator]) -> None:
    totals = [0.5, -1.0, 2.0, 3.0]
    shifted = [total + shift for total, shift in zip(totals, [8.0, 8.0, -4.0, -4.0], strict=True)]
    assert advantages(estimator(2), shifted) == pytest.approx(advantages(estimator(2), totals))


def test_grpo_does_not_depend_on_the_unit_of_the_score() -> None:
    totals = [0.5, -1.0, 2.0, 3.0]
    assert advantages(GRPO(4), [100 * x for x in totals]) == pytest.approx(advantages(GRPO(4), totals), abs=1e-4)


@every_estimator
def test_the_penalty_is_part_of_what_a_response_earned(estimator: type[GroupEstimator]) -> None:
    """Two equal scores; the response that left the reference by a nat more a token is the worse one."""
    mask = mask_of_lengths(3, 3)
    rollout = random_rollout(mask)
    kl = rollout.kl.sum(1)
    scores = Scores(scores=torch.zeros(2))
    free = assign_credit(rollout, scores, CreditConfig(advantage=estimator(2), kl_coef=0.0))
    paid = assign_credit(rollout, scores, CreditConfig(advantage=estimator(2), kl_coef=0.5))
    assert (free.advantages == 0).all()
    wanted = reference.group_advantages(NAMES[estimator], (-0.5 * kl).tolist(), 2)
    assert paid.advantages[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)


@every_estimator
def test_a_batch_that_is_no_whole_groups_is_refused(estimator: type[GroupEstimator]) -> None:
    mask = mask_of_lengths(3, 3, 3)
    config = CreditConfig(advantage=estimator(2))
    with pytest.raises(ValueError, match=r"the batch has 3 rows, not a multiple of group_size \(2\); give every"):
        assign_credit(random_rollout(mask), random_scores(mask), config)


@every_estimator
@pytest.mark.parametrize("size", [1, 0, -2, 2.5, True])
def test_a_group_without_another_is_refused(estimator: type[GroupEstimator], size: Any) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=f"group_size is {size!r}; give a whole number of at l"):
        estimator(size)


@pytest.mark.parametrize("redistribution", [PrefixDifference(), Shuffled(PrefixDifference())])
@every_estimator
def test_differences_that_may_be_negative_are_refused_as_weights(
    estimator: type[GroupEstimator], redistribution: Any
) -> None:
    with pytest.raises(ValueError, match=r"whose differences may be negative .*choose Attention or Uniform, or an est"):
        CreditConfig(advantage=estimator(4), redistribution=redistribution)


@every_estimator
@pytest.mark.parametrize("changes", [{"macro_value": "unit"}, {"macro_reward": "mean"}])
def test_settings_that_are_not_read_are_refused(estimator: type[GroupEstimator], changes: dict[str, Any]) -> None:
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}', which {estimator.__name__} here does not read"):
        CreditConfig(advantage=estimator(4), **changes)


def test_groups_are_adjacent_rows() -> None:
    """The same four numbers, dealt to groups otherwise, compare otherwise."""
    assert advantages(DrGRPO(2), [0.0, 0.0, 4.0, 4.0]) == [0.0] * 4
    assert advantages(DrGRPO(2), [0.0, 4.0, 0.0, 4.0]) == [-2.0, 2.0, -2.0, 2.0]
