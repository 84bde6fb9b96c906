"""Blame for the line of an error: by hand, and through macro actions."""

import pytest
import torch

from apportion import CreditConfig, ErrorLine, FixedNgram, Scores, assign_credit
from batches import mask_of, mask_of_lengths, random_rollout


def scores_of(score: list[float], blamed: list[list[int]]) -> Scores:
    return Scores(scores=torch.tensor(score), error_tokens=mask_of(blamed))


def test_the_line_is_paid_evenly_and_the_rest_stays_at_the_end() -> None:
    mask = mask_of_lengths(4, 3, 2)
    scores = scores_of([-0.6, -1.0, 1.0], [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    placed = ErrorLine(beta=0.5)(random_rollout(mask), scores)
    wanted = torch.tensor([[0, -0.15, -0.15, -0.3], [0, 0, -1.0, 0], [0, 1.0, 0, 0]])
    torch.testing.assert_close(placed, wanted)


def test_actions_are_blamed_by_the_tokens_of_the_line_that_they_hold() -> None:
    rollout, scores = random_rollout(mask_of_lengths(6)), scores_of([-0.6], [[0, 1, 1, 1, 0, 0]])
    config = CreditConfig(termination=FixedNgram(n=2), redistribution=ErrorLine(), kl_coef=0.0)
    credit = assign_credit(rollout, scores, config)
    sums = credit.token_level_rewards.view(3, 2).sum(1)
    torch.testing.assert_close(sums, torch.tensor([-0.2, -0.4, 0.0]))


def test_gamma_keeps_the_discounted_sum() -> None:
    rollout, scores = random_rollout(mask_of_lengths(5)), scores_of([-1.0], [[0, 1, 0, 0, 0]])
    placed = ErrorLine()(rollout, scores, gamma=0.9)
    assert float((placed[0] * 0.9 ** torch.arange(5)).sum()) == pytest.approx(-(0.9**4))


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_a_beta_that_is_no_weight_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta is {beta}; choose a number in"):
        ErrorLine(beta=beta)
