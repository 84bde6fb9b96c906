"""The KL penalty, token by token."""

import torch

from apportion import token_level_rewards
from batches import mask_of


def test_each_token_pays_for_its_own_log_ratio() -> None:
    scores, old, ref = torch.tensor([[[0.0, 2.0, 9.0]], [[-1.0, -2.0, torch.nan]], [[-3.0, -1.0, 0.0]]])
    rewards = token_level_rewards(scores, old, ref, mask_of([[1, 1, 0]]), kl_coef=0.5)
    assert rewards.tolist() == [[-1.0, 2.5, 0.0]]  # -0.5 * 2, 2 + 0.5 * 1


def test_no_penalty_leaves_the_scores() -> None:
    scores = torch.tensor([[1.0, -2.0]])
    assert torch.equal(token_level_rewards(scores, scores, -scores, mask_of([[1, 1]]), kl_coef=0.0), scores)


def test_no_penalty_is_none_where_the_reference_holds_a_token_for_impossible() -> None:
    scores, ref = torch.tensor([[1.0, -2.0]]), torch.tensor([[-torch.inf, torch.nan]])
    assert torch.equal(token_level_rewards(scores, scores, ref, mask_of([[1, 1]]), kl_coef=0.0), scores)


def test_half_precision_log_probabilities_are_subtracted_in_float32() -> None:
    old, ref = torch.tensor([[-0.1]], dtype=torch.bfloat16), torch.tensor([[-20.0]], dtype=torch.bfloat16)
    rewards = token_level_rewards(torch.zeros(1, 1), old, ref, mask_of([[1]]), kl_coef=1.0)
    assert rewards.dtype == torch.float32
    assert rewards.item() == old.item() * -1 - 20.0 or abs(rewards.item() + 19.9) < 1e-3
