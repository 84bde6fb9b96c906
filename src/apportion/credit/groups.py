"""Advantages of whole responses against the others to the same prompt: RLOO, GRPO, Dr.GRPO. There is no critic.

What a response earned is the sum of its token-level rewards: its score less the KL penalty of its tokens. A group is g
adjacent rows, the responses to one prompt. Rows without tokens are left out of their group. A group that earned the
same everywhere, but for float32's rounding of sums, has advantage 0, to the bit: GRPO, or whitening, would scale
rounding up. So has a response that is alone in its group.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.checks import is_whole
from apportion.credit.advantages import AdvantageEstimator, Earnings
from apportion.masked import ROUNDING


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What responses earned above the mean of their group.

    Attributes:
        centred: (G, g) float32. 0 where a response does not count, and in flat groups.
        sizes: (G, 1) float32. Responses of each group that count.
        flat: (G, 1) bool. Whether what its responses earned differs by no more than rounding, `masked.ROUNDING` of the
            largest.
    """

    centred: Float[Tensor, "G g"]
    sizes: Float[Tensor, "G 1"]
    flat: Bool[Tensor, "G 1"]

    @classmethod
    def of(cls, totals: Float[Tensor, " B"], exists: Bool[Tensor, " B"], group_size: int) -> Self:
        """Subtract from each response what its group earned on average.

            c_i = R_i - mean over the group of R

        Args:
            totals: (B) float. What each response earned; groups are adjacent rows.
            exists: (B) bool. Responses that count; the others may hold anything.
            group_size: Responses of a group, g.

        Returns:
            G = B / g groups.

        Raises:
            ValueError: If B is not a multiple of g.
        """
        if len(totals) % group_size:
            raise ValueError(
                f"the batch has {len(totals)} rows, not a multiple of group_size ({group_size}); give every prompt "
                f"{group_size} adjacent rows"
            )
        there, totals = exists.view(-1, group_size), totals.float().view(-1, group_size)
        sizes = there.sum(1, keepdim=True).float()
        # Measured from the lowest, equal numbers are zeros, and their mean is one too: it never rounds.
        lowest = torch.where(there, totals, torch.inf).amin(1, keepdim=True)
        above = torch.where(there, totals - lowest, 0)
        size = torch.where(there, totals, 0).abs().amax(1, keepdim=True)
        flat = (above.amax(1, keepdim=True) <= ROUNDING * size) & size.isfinite()
        above = torch.where(flat, 0, above)
        mean = above.sum(1, keepdim=True) / sizes.clamp(min=1)
        return cls(centred=torch.where(there, above - mean, 0), sizes=sizes, flat=flat)

    @property
    def deviation(self) -> Float[Tensor, "G 1"]:
        """(G, 1) float32. Standard deviation with Bessel's correction; 0 for fewer than two responses."""
        return (self.centred.square().sum(1, keepdim=True) / (self.sizes - 1).clamp(min=1)).sqrt()


def check_group_size(group_size: int, least: int) -> None:
    """Refuse groups in which there is nothing to compare.

    Raises:
        ValueError: If `group_size` is not a whole number, or less than the least.
    """
    if not (is_whole(group_size) and group_size >= least):
        raise ValueError(f"group_size is {group_size!r}; give a whole number of at least {least}, such as 8")


def of_responses(earned: Earnings) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Add up what each response earned.

    Returns:
        totals: (B) float32.
        exists: (B) bool. Responses with tokens.
    """
    valid = earned.ids >= 0
    return torch.where(valid, earned.rewards, 0).sum(1), valid.any(1)


@dataclass(frozen=True)
class GroupEstimator(AdvantageEstimator):
    """Compare what each response earned with what the others to its prompt did; every token shares the answer.

    Attributes:
        group_size: Responses to a prompt, at least 2.

    Raises:
        ValueError: If there is nothing to compare.
    """

    group_size: int = 8

    def __post_init__(self) -> None:
        """Refuse groups of one."""
        check_group_size(self.group_size, 2)

    @property
    def responses_per_prompt(self) -> int:
        """The size of a group."""
        return self.group_size

    @property
    def sums_rewards(self) -> bool:
        """It does: redistributions enter as token weights."""
        return True

    @property
    def ignores(self) -> frozenset[str]:
        """Nothing is pooled over macro actions."""
        return frozenset({"macro_value", "macro_reward"})

    def __call__(self, earned: Earnings) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Give every token the advantage of its response, and as return what the response earned."""
        totals, exists = of_responses(earned)
        advantages = self.normalised(Groups.of(totals, exists, self.group_size)).reshape(-1, 1)
        valid = earned.ids >= 0
        return torch.where(valid, advantages, 0), torch.where(valid, totals[:, None], 0)

    @abstractmethod
    def normalised(self, groups: Groups) -> Float[Tensor, "G g"]:
        """Scale what each response earned above its group's mean.

        Args:
            groups: G groups of g responses.

        Returns:
            (G, g) float32. The advantages.
        """


@dataclass(frozen=True)
class RLOO(GroupEstimator):
    r"""REINFORCE with the mean of the other responses as baseline.

        A_i = R_i - mean over j != i of R_j = g / (g - 1) * (R_i - mean over the group of R)

    Source:
        Ahmadian et al., 2024 (https://arxiv.org/abs/2402.14740), section 3.
    """

    def normalised(self, groups: Groups) -> Float[Tensor, "G g"]:
        """Leave each response out of its own baseline."""
        return groups.centred * (groups.sizes / (groups.sizes - 1).clamp(min=1))


@dataclass(frozen=True)
class GRPO(GroupEstimator):
    r"""Group relative policy optimisation: in units of the group's deviation.

        A_i = (R_i - mean over the group of R) / (std over the group of R + 1e-6)

    The deviation has Bessel's correction. The KL penalty is part of R (`kl_coef`), while the paper adds it to the loss.

    Source:
        Shao et al., 2024 (https://arxiv.org/abs/2402.03300), section 4.1.
    """

    def normalised(self, groups: Groups) -> Float[Tensor, "G g"]:
        """Divide by the group's deviation."""
        return groups.centred / (groups.deviation + 1e-6)


@dataclass(frozen=True)
class DrGRPO(GroupEstimator):
    r"""GRPO done right: without the deviation, which makes much of questions that are nearly settled.

        A_i = R_i - mean over the group of R

    The other half of the method, a loss that is not divided by the response's own length, is
    `PPOConfig(loss_aggregation="constant")`.

    Source:
        Liu et al., 2025 (https://arxiv.org/abs/2503.20783), section 3.
    """

    def normalised(self, groups: Groups) -> Float[Tensor, "G g"]:
        """Leave it at that."""
        return groups.centred
