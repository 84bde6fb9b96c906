"""REINFORCE++: reward-to-go, or a group's baseline, whitened over the whole batch. There is no critic."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.checks import check_unit_interval
from apportion.credit.advantages import AdvantageEstimator, Earnings, every_token, gae
from apportion.credit.groups import Groups, check_group_size, of_responses


@dataclass(frozen=True)
class ReinforcePlusPlus(AdvantageEstimator):
    r"""REINFORCE++, whitened over the tokens of the batch, over all processes.

        group_size = 1    A = whiten( sum over j >= k of gamma^(j - k) * macro_rewards_j )
        group_size > 1    A = whiten( R_i - mean over the group of R ),   R the sum of a response's rewards

    The first keeps what a redistribution pays to each token, and gamma counts macro actions (tokens under `EveryToken`)
    or, with `per="token"`, tokens: an action of m tokens is then discounted by gamma^m, and rewards inside of it by
    gamma^i. The second is the variant with a baseline: it adds up the rewards of a response, so that a redistribution
    enters as a token weight, after the whitening.

    Attributes:
        gamma: Discount, in [0, 1]; 1 with groups.
        group_size: Responses to a prompt; 1 for no group.
        per: Whether gamma counts actions or tokens.

    Raises:
        ValueError: If gamma lies outside [0, 1], `per` is neither of the two, one of them is given with groups, or
            `group_size` is not a whole number of at least 1.

    Source:
        Hu, 2025 (https://arxiv.org/abs/2501.03262), section 3; verl, `compute_reinforce_plus_plus_*`.
    """

    gamma: float = 1.0
    group_size: int = 1
    per: Literal["action", "token"] = "action"

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_group_size(self.group_size, 1)
        check_unit_interval("gamma", self.gamma)
        if self.per not in ("action", "token"):
            raise ValueError(f"per is {self.per!r}; choose 'action' or 'token'")
        if self.group_size > 1 and self.gamma != 1.0:
            raise ValueError(f"gamma is {self.gamma} with group_size {self.group_size}, which discounts nothing; use 1")
        if self.group_size > 1 and self.per != "action":
            raise ValueError(
                f"per is {self.per!r} with group_size {self.group_size}, which has no discount; leave it out"
            )

    @property
    def responses_per_prompt(self) -> int:
        """The size of a group."""
        return self.group_size

    @property
    def whitens(self) -> bool:
        """Always."""
        return True

    @property
    def sums_rewards(self) -> bool:
        """With a group's baseline it does."""
        return self.group_size > 1

    @property
    def ignores(self) -> frozenset[str]:
        """There are no values to pool, and rewards are summed."""
        return frozenset({"macro_value", "macro_reward"})

    def discounting(self, ids: Int[Tensor, "B T"]) -> tuple[float, Int[Tensor, "B T"]]:
        """Discount by gamma for each action, or for each token."""
        return self.gamma, ids if self.per == "action" else every_token(ids)

    def __call__(self, earned: Earnings) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Give every token what its response earns from its action on, or above its group; see the base class."""
        if self.sums_rewards:
            totals, exists = of_responses(earned)
            centred = Groups.of(totals, exists, self.group_size).centred
            valid = earned.ids >= 0
            return torch.where(valid, centred.reshape(-1, 1), 0), torch.where(valid, totals[:, None], 0)
        actions = earned.actions
        by_token = self.per == "token"
        gamma = torch.pow(self.gamma, actions.lengths.float()) if by_token else self.gamma
        rewards = earned.macro_rewards(self.gamma if by_token else 1.0)
        _, returns = gae(rewards, torch.zeros_like(rewards), actions.lengths.bool(), gamma=gamma, lam=1.0)
        returns = actions.to_tokens(returns)
        return returns, returns.clone()
