"""The method in a dozen lines: from one score a response to advantages and returns for each token."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.batch import Credit, Rollout, Scores
from apportion.checks import check_instance, is_number
from apportion.credit.advantages import GAE, AdvantageEstimator, Earnings
from apportion.credit.attention import Attention, PolicyAttention
from apportion.credit.error_line import ErrorLine
from apportion.credit.groups import GRPO, RLOO, DrGRPO
from apportion.credit.macro_actions import MacroActions, Pooling, macro_ids
from apportion.credit.mixture import Mixture, Shuffled
from apportion.credit.redistribution import (
    PrefixDifference,
    Redistribution,
    Terminal,
    Uniform,
    check_redistribution,
    needs_of,
    place,
)
from apportion.credit.reinforce import ReinforcePlusPlus
from apportion.credit.rewards import token_level_rewards
from apportion.credit.termination import (
    FixedNgram,
    Perplexity,
    RandomizedNgram,
    ShuffledBoundaries,
    TerminationCondition,
    check_condition,
    closes_of,
)
from apportion.credit.token_weights import token_weights
from apportion.masked import Reduce, alone, is_last, masked_whiten, zero_outside

ESTIMATORS: tuple[type[AdvantageEstimator], ...] = (GAE, RLOO, GRPO, DrGRPO, ReinforcePlusPlus)
"""What `advantage` knows by a short name; estimators of your own are chosen by their dotted path."""

Condition = TerminationCondition | Callable
REDISTRIBUTIONS: tuple[type[Redistribution], ...] = (
    *(Terminal, Uniform, Attention, PolicyAttention, PrefixDifference, ErrorLine, Shuffled, Mixture),
)
"""What `redistribution` knows by a short name; your own are chosen by their dotted path."""


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How credit is assigned: one choice on each axis. The defaults are MA-PPO with actions of five tokens.

    Attributes:
        termination: Which tokens close a macro action; one of ours, or any callable from a rollout to (B, T) bool (on
            the command line, a class or function by its dotted path).
        redistribution: Where the score lands; one of ours, or any callable `(rollout, scores, *, gamma, steps)` that
            returns (B, T) float (on the command line, a class or function by its dotted path). With an estimator that
            adds up a response's rewards (RLOO, GRPO, Dr.GRPO, REINFORCE++ with groups), how much each token weighs
            (`token_weights`).
        advantage: From rewards, and values where it has a critic, to advantages.
        macro_value: How the values inside a macro action are pooled (`pooling_weights`).
        macro_reward: Whether rewards inside a macro action are summed, or averaged with the weights of `macro_value`,
            which divides the KL penalty by about n, and the score by the length of the last action. In the official
            code that length is 1 (`last_token_apart`), and the score stays whole.
        kl_coef: Price of a nat of divergence from the reference, at least 0.
        score_clamp: Scores are clamped to [-score_clamp, score_clamp] before they are redistributed; None for not at
            all.
        last_token_apart: Whether the last valid token is a macro action of its own, as in the official code.
        value_smoothing: Actions over which values are averaged before anything else, and shared by their tokens; None
            for not at all. With `EveryToken` it is what macro actions do to values, alone: a control.
        whiten_advantages: Whether advantages are shifted and scaled to mean 0 and variance 1 over the batch's tokens;
            those of `ReinforcePlusPlus` always are.

    Raises:
        ValueError: If a number is out of range, a name is unknown, or a choice has no meaning beside another.
    """

    termination: Condition = field(default_factory=FixedNgram)
    redistribution: Redistribution | Callable = field(default_factory=Terminal)
    advantage: AdvantageEstimator = field(default_factory=GAE)
    macro_value: Pooling = "equal"
    macro_reward: Literal["sum", "mean"] = "sum"
    kl_coef: float = 0.05
    score_clamp: float | None = None
    last_token_apart: bool = False
    value_smoothing: Condition | None = None
    whiten_advantages: bool = False

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        self._check_kinds()
        poolings = ("equal", "unit", "position", "position_falling")
        for name, choices in (("macro_value", poolings), ("macro_reward", ("sum", "mean"))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
        if not (is_number(self.kl_coef) and 0 <= self.kl_coef < float("inf")):
            raise ValueError(f"kl_coef is {self.kl_coef!r}; choose a number of at least 0 (0 switches the penalty off)")
        if self.score_clamp is not None and not (is_number(self.score_clamp) and self.score_clamp > 0):
            raise ValueError(f"score_clamp is {self.score_clamp!r}; choose a positive number, or None for no clamp")
        check_redistribution(self.redistribution)
        self._check_together()

    def _check_kinds(self) -> None:
        """Refuse a name or a class where one of its instances belongs."""
        check_condition("termination", self.termination)
        if self.value_smoothing is not None:
            check_condition("value_smoothing", self.value_smoothing)
        check_instance("advantage", self.advantage)
        if not isinstance(self.advantage, AdvantageEstimator):
            raise ValueError(f"advantage is {self.advantage!r}; give GAE(...), or another AdvantageEstimator")

    def _check_together(self) -> None:
        """Refuse choices that have no meaning beside the estimator."""
        estimator = type(self.advantage).__name__
        unread = self.advantage.ignores | ({"value_smoothing"} if not self.advantage.needs_critic else set())
        for f in fields(self):
            if f.name in unread and (value := getattr(self, f.name)) != f.default:
                raise ValueError(f"{f.name} is {value!r}, which {estimator} here does not read; leave it out")
        if self.advantage.sums_rewards and needs_of(self.redistribution).prefix_scores:
            raise ValueError(
                f"redistribution is {type(self.redistribution).__name__}, whose differences may be negative and cannot "
                f"weigh the tokens of {estimator}, which adds up rewards; choose Attention or Uniform, or an estimator "
                "that keeps the reward of each token: GAE, or ReinforcePlusPlus without groups"
            )

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """MA-PPO as the paper describes it (ma-rlhf.md section 2, column `paper`), with changes by keyword."""
        return replace(cls(), **changes)

    @classmethod
    def official(cls, **changes: Any) -> Self:
        """MA-PPO as its official code computes it, less what can only crash, with changes by keyword.

        What the code computes otherwise than the paper is adapted in the changes too: `position` pools with falling
        weights, `RandomizedNgram` with its default lengths gets (1, 2, 3, 5, 10), and `Perplexity()` closes early, also
        inside of `ShuffledBoundaries`. For the paper's form of one of these, `dataclasses.replace` the preset.
        """
        if changes.get("macro_value") == "position":
            changes["macro_value"] = "position_falling"
        if "termination" in changes:
            changes["termination"] = _official_termination(changes["termination"])
        preset = cls(macro_reward="mean", score_clamp=2.5, last_token_apart=True)
        return replace(preset, **changes)


@torch.no_grad()
def assign_credit(rollout: Rollout, scores: Scores, config: CreditConfig, *, reduce: Reduce = alone) -> Credit:
    r"""Decide which tokens and which macro actions earned the scores.

        token_level_rewards = redistribute(scores) - kl_coef * (old_logprobs - ref_logprobs)
        macro_rewards_k     = sum of token_level_rewards in action k
        macro_values_k      = weighted mean of values in action k
        delta_k             = macro_rewards_k + gamma * macro_values_{k+1} - macro_values_k
        A_k                 = delta_k + gamma * lambda * A_{k+1}
        advantages_t, returns_t = A_k, A_k + macro_values_k        for every token t of action k

    The last four lines are those of `GAE`; other estimators have their own.

    Args:
        rollout: B responses of up to T tokens, in any floating dtype; computed in float32.
        scores: Their scores, with what the redistribution needs.
        config: The choice on each axis.
        reduce: Sums a tensor over the processes that share the batch; only whitening asks for it.

    Returns:
        Credit of shape (B, T), zero outside the responses, without gradient. A row depends on that row alone, or on its
        group where the estimator has groups, unless advantages are whitened.

    Raises:
        ValueError: If `scores` lacks what the redistribution needs or has other rows, the condition answers in another
            form than (B, T) bool, the redistribution in another than (B, T) float, or the rows are no whole groups.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3; ABC (https://arxiv.org/abs/2402.00782), section 3.
    """
    mask, estimator = rollout.response_mask, config.advantage
    ids = segment(rollout, config)
    scores = scores if config.score_clamp is None else scores.map(_clamp(config.score_clamp))
    gamma, steps = estimator.discounting(ids)
    # What is added up anyway stays whole: parts of equal scores would differ by rounding, which GRPO would magnify.
    placed = Terminal() if estimator.sums_rewards else config.redistribution
    token_scores = place(placed, rollout, scores, gamma=gamma, steps=steps)
    rewards = token_level_rewards(
        token_scores, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef=config.kl_coef
    )
    earned = Earnings(
        rewards=rewards,
        values=_values(rollout, config.value_smoothing),
        ids=ids,
        macro_value=config.macro_value,
        macro_reward=config.macro_reward,
    )
    advantages, returns = estimator(earned)
    if config.whiten_advantages or estimator.whitens:
        advantages = masked_whiten(advantages, mask, reduce=reduce)
    if estimator.sums_rewards:
        advantages = advantages * token_weights(config.redistribution, rollout, scores, ids)
    return Credit(
        token_level_scores=token_scores,
        token_level_rewards=rewards,
        macro_ids=ids,
        advantages=advantages,
        returns=returns,
    )


def segment(rollout: Rollout, config: CreditConfig) -> Int[Tensor, "B T"]:
    """Number the macro actions of each response.

    Args:
        rollout: The responses.
        config: Its termination condition and `last_token_apart` are read.

    Returns:
        (B, T) int64. -1 outside the response.

    Raises:
        ValueError: If the condition answers in another form than (B, T) bool.
    """
    mask = rollout.response_mask
    closes = closes_of(config.termination, rollout)
    return macro_ids(closes | _second_to_last(mask) if config.last_token_apart else closes, mask)


def _values(rollout: Rollout, smoothing: Condition | None) -> Float[Tensor, "B T"]:
    """Take the critic's values, averaged over the actions of a condition if one is given; 0 outside the responses."""
    values = zero_outside(rollout.values, rollout.response_mask)
    if smoothing is None:
        return values
    actions = MacroActions(macro_ids(closes_of(smoothing, rollout), rollout.response_mask))
    return actions.to_tokens(actions.sum(actions.weights("equal") * values))


def _official_termination(termination: Condition) -> Condition:
    """Give a condition the defaults that it has in the official code."""
    if isinstance(termination, RandomizedNgram) and termination.lengths == RandomizedNgram.lengths:
        return replace(termination, lengths=(1, 2, 3, 5, 10))
    if isinstance(termination, ShuffledBoundaries):
        return replace(termination, inner=_official_termination(termination.inner))
    return Perplexity(early=True) if termination == Perplexity() else termination


def _second_to_last(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Mark the valid token before the last one: where it closes, the last is an action of its own."""
    return is_last(mask & ~is_last(mask))


def _clamp(bound: float) -> Callable[[Tensor], Tensor]:
    """Cut what lies outside [-bound, bound]."""
    return lambda x: x.clamp(-bound, bound)
