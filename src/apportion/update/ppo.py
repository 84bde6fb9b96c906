"""One PPO update: epochs and minibatches over one rollout, blind to how its advantages came about."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion.batch import Batch, Credit, Rollout, rows
from apportion.credit.macro_actions import macro_lengths
from apportion.masked import masked_var
from apportion.microbatches import by_length, in_groups
from apportion.rollout import trim, widths
from apportion.sampling import Sampling
from apportion.update.losses import Granularity, importance_ratio, policy_loss, value_loss


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How the policy and the critic learn from a rollout.

    Attributes:
        num_ppo_epochs: Passes over each rollout.
        num_mini_batches: Optimizer steps a pass.
        micro_batch_tokens: Tokens that a model is given at once, padding included; changes memory, not results.
        ratio: What is clipped: the ratio of a `token`, of a `macro` action, or its geometric mean (`macro_mean`).
        cliprange: Largest step of the ratio from 1.
        cliprange_value: Largest step of a value from its old one; None for no clipping.
        vf_coef: Weight of the value loss; the critic has an optimizer of its own, so it only acts on the clipping of
            its gradient.
        max_grad_norm: Gradients are scaled down to this norm, policy and critic apart.
        target_kl: The update stops early when the policy has moved this far (mean k3 estimate a token, nats); None for
            never.
        max_skipped_steps: A run stops when updates in a row took no step, and more steps than this had a loss or
            gradient that was not finite.

    Raises:
        ValueError: If a number is out of range or the ratio unknown.
    """

    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    micro_batch_tokens: int = 16_384
    ratio: Granularity = "token"
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 1.0
    max_grad_norm: float = 1.0
    target_kl: float | None = None
    max_skipped_steps: int = 5

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("num_ppo_epochs", "num_mini_batches", "micro_batch_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")
        for name in ("cliprange", "cliprange_value", "vf_coef", "max_grad_norm", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; choose a positive number")
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps is {self.max_skipped_steps}; choose at least 0")
        if self.ratio not in ("token", "macro", "macro_mean"):
            raise ValueError(f"ratio is {self.ratio!r}; choose 'token', 'macro' or 'macro_mean'")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Clip the ratio of a macro action, as MA-RLHF's paper describes it, with changes by keyword."""
        return replace(cls(ratio="macro"), **changes)

    @classmethod
    def official(cls, **changes: Any) -> Self:
        """Clip the ratio of a token, as MA-RLHF's official code does, with changes by keyword."""
        return replace(cls(ratio="token"), **changes)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model that learns, as accelerate has prepared it, with its optimizer."""

    module: nn.Module
    optimizer: Optimizer


def summed(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Sum a tensor over processes."""
    total: Any = accelerator.reduce(x, "sum")
    return total


def gathered(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Join the rows that processes hold."""
    everyone: Any = accelerator.gather(x)
    return everyone


def update(
    policy: Learner,
    critic: Learner,
    rollout: Rollout,
    credit: Credit,
    config: PPOConfig,
    *,
    sampling: Sampling,
    accelerator: Accelerator,
    generator: torch.Generator,
) -> dict[str, float]:
    """Improve the policy and the critic on one rollout.

    On its first pass the policy is the one that sampled, so the ratio there is 1 by definition, and it is made so to
    the bit, in every dtype: the log-probabilities of that pass are the old ones (`policy/sampler_gap` tells how far
    those gathered while sampling lie from them). With several minibatches the policy moves within the first pass; then
    they are computed beforehand. The critic's first pass is that of the rollout where its values still have their graph
    and all rows are read at once, otherwise it is made again.

    Args:
        policy: A `Policy` with its optimizer.
        critic: A `Critic` with its optimizer.
        rollout: This process's rows of the batch.
        credit: Their credit.
        config: Epochs, minibatches, clipping.
        sampling: The distribution that was sampled.
        accelerator: Devices, precision, processes.
        generator: Draws the minibatches; the same on every process.

    Returns:
        Metrics of docs/metrics.md under `policy/`, `value/` and `update/`, of the whole batch over all processes.

    A step whose loss or gradient is not finite is not taken, and counted in `update/skipped_steps`.
    """
    step = _Step(policy, critic, config, sampling, accelerator)
    step.first_values = rollout.values if rollout.values.requires_grad else None
    rollout = replace(rollout, values=rollout.values.detach())
    behaviour = rollout.old_logprobs.clone() if config.num_mini_batches == 1 else step.logprobs(rollout)
    gap = 0.0
    tally: dict[str, list[float]] = {}
    for epoch in range(config.num_ppo_epochs):
        moved = epoch > 0 or config.num_mini_batches > 1
        for index in _minibatches(len(rollout.response_ids), config.num_mini_batches, accelerator, generator):
            metrics = step(rollout, credit, index, behaviour, moved=moved)
            for name, value in metrics.items():
                tally.setdefault(name, []).append(value)
            if step.stopped:
                break
        if epoch == 0:
            gap = _largest_gap(behaviour, rollout, accelerator)
        if step.stopped:
            break
    means = {name: sum(values) / len(values) for name, values in tally.items()}
    means |= {name: max(tally[name]) for name in ("policy/ratio_max",)}
    counts = {"update/optimizer_steps": float(step.taken), "update/skipped_steps": float(step.skipped)}
    explained = _explained_variance(rollout, credit, accelerator)
    return means | counts | {"policy/sampler_gap": gap, "value/explained_variance": explained}


class _Step:
    """Optimizer steps of one update, and what they share."""

    def __init__(
        self, policy: Learner, critic: Learner, config: PPOConfig, sampling: Sampling, accelerator: Accelerator
    ) -> None:
        self.policy, self.critic = policy, critic
        self.config, self.sampling, self.accelerator = config, sampling, accelerator
        self.first_values: Float[Tensor, "B T"] | None = None
        self.taken = self.skipped = 0
        self.stopped = False

    def logprobs(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Compute the policy's log-probabilities as its training pass does."""
        width = rollout.response_ids.shape[1]

        def read(group: Int[Tensor, " N"]) -> tuple[Tensor]:
            with self.accelerator.autocast(), torch.no_grad():
                return (self.policy.module(*_text(rows(rollout, group)), self.sampling),)

        lengths = widths(rollout.prompt_mask, rollout.response_mask)
        return in_groups(read, lengths, self.config.micro_batch_tokens, width)[0]

    def __call__(
        self,
        rollout: Rollout,
        credit: Credit,
        index: Int[Tensor, " N"],
        behaviour: Float[Tensor, "B T"],
        *,
        moved: bool,
    ) -> dict[str, float]:
        """Take one optimizer step on some rows; fill `behaviour` where the policy has not moved yet."""
        counts = self._counts(credit, index)
        lengths = widths(rollout.prompt_mask, rollout.response_mask)[index]
        groups = [index[group] for group in by_length(lengths, self.config.micro_batch_tokens)]
        if moved or len(groups) != 1:
            self.first_values = None
        # Processes average their gradients; each loss is already a part of the mean over all of them. A process that
        # has no rows reads one without weight, to keep step with the others.
        weight = float(self.accelerator.num_processes) if groups else 0.0
        sums = torch.zeros(6, device=rollout.response_ids.device)
        largest = torch.zeros((), device=sums.device)
        for number, group in enumerate(groups or [torch.zeros(1, dtype=torch.long, device=sums.device)]):
            with self._syncing(number + 1 >= len(groups)):
                part, peak = self._backward(rollout, credit, group, behaviour, counts, moved=moved, weight=weight)
            if groups:
                sums, largest = sums + part, torch.maximum(largest, peak)
        totals, largest = summed(self.accelerator, sums), gathered(self.accelerator, largest[None]).max()
        names = (
            "policy/loss",
            "value/loss",
            "policy/ratio_mean",
            "policy/clipfrac",
            "policy/approx_kl",
            "value/clipfrac",
        )
        metrics = dict(zip(names, totals.tolist(), strict=True)) | {"policy/ratio_max": float(largest)}
        return metrics | self._advance(metrics)

    def _counts(self, credit: Credit, index: Int[Tensor, " N"]) -> Float[Tensor, " 2"]:
        """Count the steps of the policy loss and the tokens of these rows over all processes."""
        ids = credit.macro_ids[index]
        tokens = (ids >= 0).sum()
        steps = tokens if self.config.ratio == "token" else (macro_lengths(ids) > 0).sum()
        return summed(self.accelerator, torch.stack([steps, tokens]).float()).clamp(min=1)

    def _syncing(self, last: bool) -> AbstractContextManager:
        """Let processes exchange gradients only with the last micro-batch of a step."""
        stack = ExitStack()
        if not last:
            for learner in (self.policy, self.critic):
                stack.enter_context(self.accelerator.no_sync(learner.module))
        return stack

    def _backward(
        self,
        rollout: Rollout,
        credit: Credit,
        group: Int[Tensor, " N"],
        behaviour: Float[Tensor, "B T"],
        counts: Float[Tensor, " 2"],
        *,
        moved: bool,
        weight: float,
    ) -> tuple[Float[Tensor, " 6"], Float[Tensor, ""]]:
        """Add the gradients of some rows, times a weight; return what is summed over rows, and the largest ratio.

        The critic is done with before the policy begins, so that the activations of one model are held at a time.
        """
        batch, part = rows(rollout, group), rows(credit, group)
        text = _text(batch)
        width = text[2].shape[1]
        part = _narrow(part, width)
        error, clipped = self._criticise(batch, part, text, group, counts[1], weight)
        config, ids, mask = self.config, part.macro_ids, text[3]
        with self.accelerator.autocast():
            logprobs = self.policy.module(*text, self.sampling)
        if not moved:
            behaviour[group, :width] = logprobs.detach()
        old, granularity = behaviour[group, :width], config.ratio
        surprise = policy_loss(
            logprobs,
            old,
            part.advantages,
            mask,
            cliprange=config.cliprange,
            ratio=granularity,
            macro_ids=ids,
            denominator=counts[0],
        )
        self.accelerator.backward(surprise * weight)
        ratio, steps = importance_ratio(logprobs.detach(), old, mask, granularity=granularity, macro_ids=ids)
        stats = _ratio_sums(ratio, steps, config.cliprange) / counts[0]
        return torch.cat([surprise.detach()[None], error, stats, clipped]), torch.where(steps, ratio, 0).max()

    def _criticise(
        self,
        batch: Rollout,
        part: Credit,
        text: tuple[Tensor, Tensor, Tensor, Tensor],
        group: Int[Tensor, " N"],
        tokens: Float[Tensor, ""],
        weight: float,
    ) -> tuple[Float[Tensor, " 1"], Float[Tensor, " 1"]]:
        """Add the critic's gradients; return its loss, and the share of values that its clipping holds."""
        mask, limit = text[3], self.config.cliprange_value
        old = batch.values[:, : mask.shape[1]]
        if self.first_values is None:
            with self.accelerator.autocast():
                values = self.critic.module(*text)
        else:
            values, self.first_values = self.first_values[group, : mask.shape[1]], None
        error = value_loss(values, old, part.returns, mask, cliprange_value=limit, denominator=tokens)
        self.accelerator.backward(self.config.vf_coef * error * weight)
        moved = (values.detach() - old).abs() > (limit or torch.inf)
        return error.detach()[None], (moved & mask).sum()[None] / tokens

    def _advance(self, metrics: dict[str, float]) -> dict[str, float]:
        """Step both optimizers, unless the numbers are not finite or the policy has moved far enough."""
        norms = {
            f"{name}/grad_norm": float(
                self.accelerator.clip_grad_norm_(learner.module.parameters(), self.config.max_grad_norm)  # type: ignore[arg-type]
            )
            for name, learner in (("policy", self.policy), ("value", self.critic))
        }
        finite = all(map(_is_finite, (metrics["policy/loss"], metrics["value/loss"], *norms.values())))
        far = self.config.target_kl is not None and metrics["policy/approx_kl"] > self.config.target_kl
        self.stopped = finite and far
        if finite and not far:
            self.policy.optimizer.step()
            self.critic.optimizer.step()
            self.taken += 1
        for learner in (self.policy, self.critic):
            learner.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        return norms


def _is_finite(x: float) -> bool:
    return x - x == 0


def _text(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and responses without the columns that are padding in every row."""
    return trim(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)


def _narrow(batch: Batch, width: int) -> Batch:
    """Cut every tensor of a batch to its first columns."""
    return replace(batch, **{f.name: getattr(batch, f.name)[:, :width] for f in fields(batch)})


def _ratio_sums(ratio: Float[Tensor, "B N"], steps: torch.Tensor, cliprange: float) -> Float[Tensor, " 3"]:
    """Sum the ratio, whether it would be clipped, and the k3 estimate of the divergence, over steps that exist."""
    kinds = (ratio, ((ratio - 1).abs() > cliprange).float(), ratio - 1 - ratio.log())
    return torch.stack([torch.where(steps, kind, 0).sum() for kind in kinds])


def _minibatches(
    local_rows: int, parts: int, accelerator: Accelerator, generator: torch.Generator
) -> Iterator[Int[Tensor, " N"]]:
    """Deal the rows of the whole batch to minibatches, whatever the processes; yield those of this one."""
    total = local_rows * accelerator.num_processes
    if parts > total:
        raise ValueError(f"num_mini_batches is {parts}, more than the {total} responses of a batch; lower it")
    first = local_rows * accelerator.process_index
    order = torch.randperm(total, generator=generator).to(accelerator.device) if parts > 1 else None
    for part in range(parts):
        if order is None:
            yield torch.arange(local_rows, device=accelerator.device)
            return
        chosen = order[part * total // parts : (part + 1) * total // parts]
        yield chosen[(chosen >= first) & (chosen < first + local_rows)] - first


def _largest_gap(behaviour: Float[Tensor, "B T"], rollout: Rollout, accelerator: Accelerator) -> float:
    """Largest difference between the log-probabilities of sampling and of training, over all processes."""
    gap = torch.where(rollout.response_mask, behaviour - rollout.old_logprobs, 0).abs().max()
    return float(gathered(accelerator, gap[None]).max())


def _explained_variance(rollout: Rollout, credit: Credit, accelerator: Accelerator) -> float:
    """1 - Var(returns - values) / Var(returns) over valid tokens; 0 where returns do not vary."""
    reduce, mask = partial(summed, accelerator), rollout.response_mask
    spread = masked_var(credit.returns, mask, reduce=reduce)
    left = masked_var(credit.returns - rollout.values, mask, reduce=reduce)
    return float(torch.where(spread > 0, 1 - left / spread.clamp(min=1e-12), 0))
