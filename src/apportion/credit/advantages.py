"""From rewards and values to advantages and returns."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Per = Literal["action", "token"]


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
            y[:, :-span] += decay[:, :-span] * y[:, span:]
            decay = torch.nn.functional.pad(decay[:, :-span] * decay[:, span:], (0, span))
        else:
            y[:, :-span] += decay * y[:, span:]
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
    values = torch.where(mask, values.float(), 0)
    following = torch.nn.functional.pad(values[:, 1:], (0, min(1, values.shape[1])))
    delta = torch.where(mask, rewards.float() + gamma * following - values, 0)
    advantages = torch.where(mask, suffix_sums(delta, gamma * lam), 0)
    return advantages, advantages + values


def _check_unit_interval(name: str, number: float | Tensor) -> None:
    """Refuse a number outside [0, 1]; a tensor is trusted, for to read it would stall the device."""
    if not isinstance(number, Tensor) and not 0 <= number <= 1:
        raise ValueError(f"{name} is {number}; choose a number in [0, 1]")


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation over macro actions.

    With `per="action"` a macro action is one step, however long it is; so are the papers' settings. With `per="token"`
    an action of m tokens is discounted by gamma^m and lam^m, and rewards inside of it by gamma^i: the semi-Markov form,
    and the control that tells whether macro actions are more than a larger lambda.

    Attributes:
        gamma: Discount, in [0, 1].
        lam: Weight of longer returns, in [0, 1].
        per: Whether gamma and lam count actions or tokens.

    Raises:
        ValueError: If gamma or lam lies outside [0, 1], or `per` is neither of the two.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2 (`per="action"`); Sutton, Precup and Singh, 1999,
        for the semi-Markov form.
    """

    gamma: float = 1.0
    lam: float = 0.95
    per: Per = "action"

    def __post_init__(self) -> None:
        """Refuse numbers that are not weights."""
        _check_unit_interval("gamma", self.gamma)
        _check_unit_interval("lam", self.lam)
        if self.per not in ("action", "token"):
            raise ValueError(f"per is {self.per!r}; choose 'action' or 'token'")

    def __call__(
        self, rewards: Float[Tensor, "B M"], values: Float[Tensor, "B M"], lengths: Int[Tensor, "B M"]
    ) -> tuple[Float[Tensor, "B M"], Float[Tensor, "B M"]]:
        """Estimate the advantage and the return of each macro action.

        Args:
            rewards: (B, M) float. Reward of each macro action.
            values: (B, M) float. Critic before each macro action.
            lengths: (B, M) int64. Tokens of each macro action, 0 where no such action exists.

        Returns:
            advantages: (B, M) float32. Zero where no such action exists.
            returns: (B, M) float32. Likewise.
        """
        if self.per == "action":
            return gae(rewards, values, lengths > 0, gamma=self.gamma, lam=self.lam)
        gamma, lam = (torch.pow(number, lengths.float()) for number in (self.gamma, self.lam))
        return gae(rewards, values, lengths > 0, gamma=gamma, lam=lam)
