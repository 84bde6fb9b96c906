"""Token weights: how a redistribution speaks where rewards are added up."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.batch import Rollout, Scores
from apportion.credit.macro_actions import MacroActions
from apportion.credit.mixture import Mixture
from apportion.credit.redistribution import Redistribution, shares_of
from apportion.masked import is_last, zero_outside


@torch.no_grad()
def token_weights(
    redistribution: Redistribution | Callable, rollout: Rollout, scores: Scores, ids: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    r"""Weigh the tokens of a response by what a redistribution would pay each, for estimators that add up rewards.

    RLOO, GRPO and Dr.GRPO see only the sum of a response's rewards, which every redistribution keeps: it would have no
    effect. So it enters as a weight on the advantage. With beta the part that is spread and n the number of tokens,

        w_t = (1 - beta) + beta * n * share_t / sum_i share_i,      then averaged over each macro action

    so that the mean over the response is 1, and the weights are no learning rate. What is not spread weighs all tokens
    alike; so does a row whose shares all lie on its last token, which is `Terminal`, or `Attention` without any: it
    redistributes nothing. Shares are those of a score of 1, for a score of 0 has none, and its sign is that of the
    advantage. A share below 0 weighs nothing. With `WholeResponse` all weights are 1.

    Args:
        redistribution: Whose shares; of a callable of your own all that it pays, of a mixture the mean of its parts'
            weights. One of prefix differences has none that weigh (see `CreditConfig`).
        rollout: The responses.
        scores: Their scores, with what the redistribution needs.
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, T) float32. Not negative, of mean 1 over the tokens of each row; 0 outside the response.

    Raises:
        ValueError: If `scores` lacks what the redistribution needs, or its shape does not fit the responses.

    Source:
        Token weights on the advantage of a group as in OAR (https://arxiv.org/abs/2601.07408), there by attribution.
    """
    if isinstance(redistribution, Mixture):
        weights = [p.weight * token_weights(p.redistribution, rollout, scores, ids) for p in redistribution.parts]
        return torch.stack(weights).sum(0)
    mask, unit = rollout.response_mask, replace(scores, scores=torch.ones_like(scores.scores, dtype=torch.float32))
    shares, weight = shares_of(redistribution, rollout, unit)
    shares = zero_outside(shares, mask).clamp(min=0)
    total, count = shares.sum(1, keepdim=True), mask.sum(1, keepdim=True)
    before_end = torch.where(is_last(mask), 0, shares).sum(1, keepdim=True)
    spread = torch.where(before_end > 0, count * shares / torch.where(total > 0, total, 1), 1)
    weights = (1 - weight) + weight * spread
    actions = MacroActions(ids)
    return actions.to_tokens(actions.mean(weights))
