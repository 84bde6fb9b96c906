"""The settings of an update."""

from dataclasses import dataclass, replace
from math import inf
from typing import Any, Self

from apportion.checks import is_number, is_whole
from apportion.update.aggregation import AGGREGATIONS, Aggregation
from apportion.update.losses import Clip, Granularity, aggregation_of


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How the policy and the critic learn from a rollout.

    Attributes:
        num_ppo_epochs: Passes over each rollout.
        num_mini_batches: Optimizer steps a pass.
        micro_batch_tokens: Tokens that a model which only reads is given at once, padding included; one that learns is
            given half (`learning_tokens`). Changes memory, not results.
        ratio: What is clipped: the ratio of a `token`, of a `macro` action, or its geometric mean (`macro_mean`).
        clip: Whether the pooled ratio is clipped, or the log ratio of each token before it is pooled, in nats, where
            going further would raise the objective (`policy_loss`).
        cliprange: Largest step of the ratio down from 1, and up where `cliprange_high` is None.
        cliprange_high: Largest step of the ratio up.
        loss_aggregation: Whose mean the policy loss is: that of all tokens (`token_mean`), of macro actions
            (`action_mean`) or of responses (`sequence_mean`), each over the mean of their tokens; or the sum over the
            tokens of a response, divided by `max_new_tokens` (`constant`). None for `token_mean` where `ratio` is
            `token`, for `action_mean` otherwise.
        cliprange_value: Largest step of a value from its old one; None for no clipping.
        vf_coef: Weight of the value loss; the critic has an optimizer of its own, so it only acts on the clipping of
            its gradient.
        max_grad_norm: Gradients are scaled down to this norm, policy and critic apart.
        target_kl: The update stops early when the policy has moved this far (mean k3 estimate a token, nats); None for
            never.
        max_skipped_steps: A run stops when updates in a row took no step, and more steps than this had a loss or
            gradient that was not finite.

    Raises:
        ValueError: If a number is out of range or a name unknown.
    """

    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    micro_batch_tokens: int = 16_384
    ratio: Granularity = "token"
    clip: Clip = "pooled"
    cliprange: float = 0.2
    cliprange_high: float | None = None
    loss_aggregation: Aggregation | None = None
    cliprange_value: float | None = 0.2
    vf_coef: float = 1.0
    max_grad_norm: float = 1.0
    target_kl: float | None = None
    max_skipped_steps: int = 5

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("num_ppo_epochs", "num_mini_batches", "micro_batch_tokens"):
            if not (is_whole(value := getattr(self, name)) and value >= 1):
                raise ValueError(f"{name} is {value!r}; choose a whole number of at least 1")
        for name in ("cliprange", "cliprange_high", "cliprange_value", "vf_coef", "max_grad_norm", "target_kl"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; choose a positive number")
        if self.vf_coef == inf:
            raise ValueError("vf_coef is inf; choose a finite number")
        if not (is_whole(self.max_skipped_steps) and self.max_skipped_steps >= 0):
            raise ValueError(f"max_skipped_steps is {self.max_skipped_steps!r}; choose a whole number of at least 0")
        if self.ratio not in ("token", "macro", "macro_mean"):
            raise ValueError(f"ratio is {self.ratio!r}; choose 'token', 'macro' or 'macro_mean'")
        if self.clip not in ("pooled", "token"):
            raise ValueError(f"clip is {self.clip!r}; choose 'pooled' or 'token'")
        if self.loss_aggregation not in (None, *AGGREGATIONS):
            known = ", ".join(map(repr, AGGREGATIONS))
            raise ValueError(f"loss_aggregation is {self.loss_aggregation!r}; choose one of {known}, or None")

    @property
    def aggregation(self) -> Aggregation:
        """`loss_aggregation`, or what stands for None."""
        return aggregation_of(self.ratio, self.loss_aggregation)

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may go down and up; with `clip="token"` the log ratio of a token, in nats."""
        return self.cliprange, self.cliprange if self.cliprange_high is None else self.cliprange_high

    @property
    def learning_tokens(self) -> int:
        """Tokens that a model is given at once while it learns: half, for what is kept of each until it has learnt."""
        return self.micro_batch_tokens // 2

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Clip the ratio of a macro action, as MA-RLHF's paper describes it, with changes by keyword."""
        return replace(cls(ratio="macro"), **changes)

    @classmethod
    def official(cls, **changes: Any) -> Self:
        """Clip the ratio of a token, as MA-RLHF's official code does, with changes by keyword."""
        return replace(cls(ratio="token"), **changes)
