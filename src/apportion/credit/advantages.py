"""From rewards and values to advantages and returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.checks import check_unit_interval
from apportion.credit.macro_actions import MacroActions, Pooling
from apportion.masked import ranks, zero_outside

Per = Literal["action", "token", "boundary"]


def suffix_sums(x: Float[Tensor, "B N"], decay: float | Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Sum what comes after each step, decayed: `y_t = x_t + decay_t * y_{t+1}`.

    A scan by doubling: after k rounds y_t holds the sum over 2^k steps, so log2 N rounds of whole-tensor arithmetic
    replace N of them.

    Args:
        x: (B, N) float.
        decay: One number for all steps, or (B, N) float, each in [0, 1].

    Returns:
        (B, N) same dtype.
    """
    y, span = x.clone(), 1
    while span < x.shape[1]:
        if isinstance(decay, Tensor):
            y[:, :-span].add_(decay[:, :-span] * y[:, span:])  # `+=` would copy the sums onto themselves
            decay = torch.nn.functional.pad(decay[:, :-span] * decay[:, span:], (0, span))
        else:
            y[:, :-span].add_(decay * y[:, span:])
            decay = decay * decay
        span *= 2
    return y


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "B N"],
    values: Float[Tensor, "B N"],
    mask: Bool[Tensor, "B N"],
    *,
    gamma: float | Float[Tensor, "B N"],
    lam: float | Float[Tensor, "B N"],
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]:
    r"""Estimate advantages and returns by GAE(gamma, lambda).

    The step axis N is tokens or macro actions; nothing here depends on which.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lambda * A_{t+1}
        R_t     = A_t + V_t

    Args:
        rewards: (B, N) float. Reward received after each step.
        values: (B, N) float. Critic before each step.
        mask: (B, N) bool. True on the steps of an episode, contiguous; the value after the last is zero, also where
            the response was truncated.
        gamma: Discount of a step, in [0, 1]; (B, N) where steps last unequally long.
        lam: Weight of longer returns, in [0, 1]; (B, N) likewise.

    Returns:
        advantages: (B, N) float32. Not normalised, zero outside the mask, no gradient.
        returns: (B, N) float32. Critic targets, zero outside the mask, no gradient.

    Raises:
        ValueError: If gamma or lam is a number outside [0, 1], or the shapes differ.

    Source:
        Schulman et al., 2016 (https://arxiv.org/abs/1506.02438), equation 16.
    """
    if not rewards.shape == values.shape == mask.shape:
        shapes = f"{tuple(rewards.shape)}, {tuple(values.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"rewards, values and mask have shapes {shapes}; give all (B, N)")
    for name, number in (("gamma", gamma), ("lam", lam)):
        _check_unit_interval(name, number)
    values = zero_outside(values, mask)
    following = torch.nn.functional.pad(values[:, 1:], (0, min(1, values.shape[1])))
    delta = zero_outside((gamma * following).add_(rewards).sub_(values), mask)
    advantages = zero_outside(suffix_sums(delta, gamma * lam), mask)
    return advantages, advantages + values


def _check_unit_interval(name: str, number: float | Tensor) -> None:
    """Refuse a number outside [0, 1]; a tensor is trusted, for to read it would stall the device."""
    if not isinstance(number, Tensor):
        check_unit_interval(name, number)


@dataclass(frozen=True, kw_only=True)
class Earnings:
    """What was earned, token by token, and which tokens act together: all that an estimator reads.

    Attributes:
        rewards: (B, T) float32. Token-level rewards; 0 outside the response.
        values: (B, T) float32. Critic before each token; 0 outside the response, and where there is no critic.
        ids: (B, T) int64. Macro action of each token, -1 outside the response.
        macro_value: How the values inside a macro action are pooled (`pooling_weights`).
        macro_reward: Whether rewards inside a macro action are summed, or averaged with the weights of `macro_value`.
    """

    rewards: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    ids: Int[Tensor, "B T"]
    macro_value: Pooling = "equal"
    macro_reward: Literal["sum", "mean"] = "sum"

    @cached_property
    def actions(self) -> MacroActions:
        """The macro actions, to be asked for sums and lengths."""
        return MacroActions(self.ids)

    def macro_rewards(self, inside: float = 1.0) -> Float[Tensor, "B M"]:
        """Pool the rewards of each macro action.

        Args:
            inside: Discount of a token inside of its action.

        Returns:
            (B, M) float32. 0 where no such action exists.
        """
        weights = 1.0 if self.macro_reward == "sum" else self._weights
        if inside != 1.0:
            weights = weights * torch.pow(inside, torch.where(self.ids >= 0, self.actions.offsets, 0).float())
        return self.actions.sum(self.rewards * weights)

    def macro_values(self) -> Float[Tensor, "B M"]:
        """(B, M) float32. The pooled values of each macro action; 0 where no such action exists."""
        return self.actions.sum(self._weights * self.values)

    @cached_property
    def _weights(self) -> Float[Tensor, "B T"]:
        return self.actions.weights(self.macro_value)


@dataclass(frozen=True)
class AdvantageEstimator(ABC):
    """Turn rewards into advantages; derive from it to choose one by name on the command line."""

    @property
    def needs_critic(self) -> bool:
        """Whether it reads values; without, no critic is loaded, trained or saved."""
        return False

    @property
    def responses_per_prompt(self) -> int:
        """Responses that are compared with each other; their rows are adjacent, and a batch holds whole groups."""
        return 1

    @property
    def whitens(self) -> bool:
        """Whether its advantages are to be whitened over the batch, whatever `whiten_advantages` says."""
        return False

    @property
    def sums_rewards(self) -> bool:
        """Whether it adds up the rewards of a response, so that a redistribution can only enter as a token weight."""
        return False

    @property
    def varies_inside_actions(self) -> bool:
        """Whether tokens of one macro action have different advantages, so that only a ratio of tokens fits."""
        return False

    @property
    def ignores(self) -> frozenset[str]:
        """Settings of `CreditConfig` without an effect, which are refused where they are not left at the default."""
        return frozenset()

    def discounting(self, ids: Int[Tensor, "B T"]) -> tuple[float, Int[Tensor, "B T"]]:
        """Say how a redistribution is to discount what it pays before the end.

        Args:
            ids: (B, T) int64. Macro action of each token, -1 outside the response.

        Returns:
            gamma: Discount of a step; 1 unless the estimator discounts.
            steps: (B, T) int64. The step in which each token is paid.
        """
        return 1.0, ids

    @abstractmethod
    def __call__(self, earned: Earnings) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Estimate the advantage and the return of each token.

        Args:
            earned: Rewards, values and macro actions of B responses.

        Returns:
            advantages: (B, T) float32. Not whitened; 0 outside the response.
            returns: (B, T) float32. Targets of the critic, or what is earned from the token on; 0 outside the response.
        """


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalised advantage estimation, over macro actions or between them.

    With `per="action"` a macro action is one step, however long it is; so are the papers' settings. With `per="token"`
    an action of m tokens is discounted by gamma^m and lam^m, and rewards inside of it by gamma^i: the semi-Markov form,
    and the control that tells whether macro actions are more than a larger lambda.

    With `per="boundary"` every token is a step with a value of its own, and lambda acts at the ends of actions only:

        A_t = delta_t + gamma * lam_t * A_{t+1},     lam_t = lam where token t closes its action, 1 inside of it

    so that the critic is trusted at boundaries, and what happens between them is taken as it was. Nothing is pooled,
    and advantages differ inside an action. With `EveryToken` it is GAE over tokens; with `WholeResponse`, or lam = 1,
    the sum telescopes to the return less the value.

    Attributes:
        gamma: Discount, in [0, 1].
        lam: Weight of longer returns, in [0, 1].
        per: Whether gamma and lam count actions or tokens, or gamma tokens and lam boundaries of actions.

    Raises:
        ValueError: If gamma or lam lies outside [0, 1], or `per` is none of the three.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2 (`per="action"`); Sutton, Precup and Singh, 1999,
        for the semi-Markov form; SAE (https://arxiv.org/abs/2601.07320) for boundaries, where lambda's form is ours.
    """

    gamma: float = 1.0
    lam: float = 0.95
    per: Per = "action"

    def __post_init__(self) -> None:
        """Refuse numbers that are not weights."""
        _check_unit_interval("gamma", self.gamma)
        _check_unit_interval("lam", self.lam)
        if self.per not in ("action", "token", "boundary"):
            raise ValueError(f"per is {self.per!r}; choose 'action', 'token' or 'boundary'")

    @property
    def needs_critic(self) -> bool:
        """It does."""
        return True

    @property
    def varies_inside_actions(self) -> bool:
        """They do between boundaries."""
        return self.per == "boundary"

    @property
    def ignores(self) -> frozenset[str]:
        """Between boundaries nothing is pooled."""
        return frozenset({"macro_value", "macro_reward"} if self.per == "boundary" else ())

    def discounting(self, ids: Int[Tensor, "B T"]) -> tuple[float, Int[Tensor, "B T"]]:
        """Discount by gamma for each action, or for each token."""
        return self.gamma, ids if self.per == "action" else every_token(ids)

    def __call__(self, earned: Earnings) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Estimate the advantage and the return of each token; see `AdvantageEstimator.__call__`."""
        steps, gamma, lam = earned.actions, self.gamma, self.lam
        if self.per == "token":
            gamma, lam = (torch.pow(number, steps.lengths.float()) for number in (gamma, lam))
        if self.per == "boundary":
            closes = steps.offsets + 1 == steps.to_tokens(steps.lengths)
            earned = replace(earned, ids=every_token(earned.ids))
            steps = earned.actions
            lam = torch.where(steps.sum(closes.long()) > 0, lam, 1.0)
        rewards = earned.macro_rewards(self.gamma if self.per == "token" else 1.0)
        advantages, returns = gae(rewards, earned.macro_values(), steps.lengths.bool(), gamma=gamma, lam=lam)
        return steps.to_tokens(advantages), steps.to_tokens(returns)


def every_token(ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Make every valid token a step of its own.

    Args:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, T) int64. 0, 1, 2, ... on the valid tokens of a row; -1 outside the response.
    """
    return torch.where(ids >= 0, ranks(ids >= 0), -1)
