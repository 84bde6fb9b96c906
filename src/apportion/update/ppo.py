"""One PPO update: epochs and minibatches over one rollout, blind to how its advantages came about."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion.batch import Credit, Rollout, rows
from apportion.credit.macro_actions import macro_lengths
from apportion.masked import masked_var
from apportion.microbatches import by_length, in_groups
from apportion.rollout import trim, widths
from apportion.sampling import Sampling
from apportion.update.aggregation import normaliser
from apportion.update.config import PPOConfig
from apportion.update.losses import importance_ratio, policy_loss, value_loss

VALUE_NAMES = ("value/loss", "value/clipfrac")
POLICY_NAMES = ("policy/loss", "policy/ratio_mean", "policy/clipfrac", "policy/approx_kl")


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
    critic: Learner | None,
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
    they are computed beforehand. The critic's first pass over the last group of rows that fit its budget
    (`PPOConfig.learning_tokens`) is that of the rollout, where its values have their graph.

    Args:
        policy: A `Policy` with its optimizer.
        critic: A `Critic` with its optimizer; None where advantages are estimated without one.
        rollout: This process's rows of the batch. Where its values have a graph, that of their last group at least:
            `rollout.complete` with the same `learning_budget`.
        credit: Their credit.
        config: Epochs, minibatches, clipping.
        sampling: The distribution that was sampled.
        accelerator: Devices, precision, processes.
        generator: Draws the minibatches; the same on every process.

    Returns:
        Metrics of docs/metrics.md under `policy/`, `value/` (with a critic) and `update/`, of the whole batch over all
        processes.

    A step whose loss or gradient is not finite is not taken, and counted in `update/skipped_steps`.
    """
    step = _Step(policy, critic, config, sampling, accelerator)
    step.first_values = rollout.values if rollout.values.requires_grad else None
    # Texts and entropies are for credit; minibatches need not carry them along.
    rollout = replace(rollout, values=rollout.values.detach(), entropies=None, text=None)
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
    means |= {"update/optimizer_steps": float(step.taken), "update/skipped_steps": float(step.skipped)}
    if critic is not None:
        means["value/explained_variance"] = _explained_variance(rollout, credit, accelerator)
    return means | {"policy/sampler_gap": gap}


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows that a model is given at once, without the columns where all of them are padding."""

    group: Int[Tensor, " N"]
    text: tuple[Tensor, Tensor, Tensor, Tensor]
    values: Float[Tensor, "N W"]
    credit: Credit

    @classmethod
    def of(cls, rollout: Rollout, credit: Credit, group: Int[Tensor, " N"]) -> Self:
        """Take some rows of a rollout and its credit."""
        batch, part = rows(rollout, group), rows(credit, group)
        text = _text(batch)
        width = text[2].shape[1]
        part = replace(part, **{field.name: getattr(part, field.name)[:, :width] for field in fields(part)})
        return cls(group=group, text=text, values=batch.values[:, :width], credit=part)

    @property
    def mask(self) -> Bool[Tensor, "N W"]:
        """(N, W) bool. False on padding."""
        return self.text[3]


class _Step:
    """Optimizer steps of one update, and what they share."""

    def __init__(
        self, policy: Learner, critic: Learner | None, config: PPOConfig, sampling: Sampling, accelerator: Accelerator
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
        """Take one optimizer step on some rows; fill `behaviour` where the policy has not moved yet.

        The critic is done with before the policy begins, so that the activations of one model are held at a time.
        """
        counts = self._counts(credit, index)
        if moved:
            self.first_values = None
        value = counts.new_zeros(0)
        if self.critic is not None:
            criticise = partial(self._criticise, self.critic.module, tokens=counts[1])
            value = self._accumulate(self.critic, criticise, rollout, credit, index).sum(0)
        reinforce = partial(self._reinforce, behaviour=behaviour, counts=counts, moved=moved)
        parts = self._accumulate(self.policy, reinforce, rollout, credit, index)
        totals = summed(self.accelerator, torch.cat([value, parts[:, :-1].sum(0)])).tolist()
        largest = gathered(self.accelerator, parts[:, -1].max()[None]).max()
        names = POLICY_NAMES if self.critic is None else VALUE_NAMES + POLICY_NAMES
        metrics = dict(zip(names, totals, strict=True)) | {"policy/ratio_max": float(largest)}
        return metrics | self._advance(metrics)

    def _counts(self, credit: Credit, index: Int[Tensor, " N"]) -> Float[Tensor, " 3"]:
        """Count over all processes the steps and tokens of these rows, and what the policy loss is divided by."""
        ids = credit.macro_ids[index]
        mask = ids >= 0
        steps = mask.sum() if self.config.ratio == "token" else (macro_lengths(ids) > 0).sum()
        whole = normaliser(self.config.aggregation, mask, ids, longest=self.sampling.max_new_tokens)
        return summed(self.accelerator, torch.stack([steps, mask.sum(), whole]).float()).clamp(min=1)

    def _accumulate(
        self,
        learner: Learner,
        backward: Callable[["_Piece", float], Float[Tensor, " K"]],
        rollout: Rollout,
        credit: Credit,
        index: Int[Tensor, " N"],
    ) -> Float[Tensor, "G K"]:
        """Add the gradients of one model, micro-batch by micro-batch; return what is measured of each.

        Processes average their gradients, while each loss is already a part of the mean over all of them: hence a
        weight. They exchange them with the last micro-batch; one that has no rows reads a row without weight, to keep
        step with the others. The group that the rollout read last comes first, for its activations are held already.
        """
        lengths = widths(rollout.prompt_mask, rollout.response_mask)[index]
        groups = [index[group] for group in reversed(by_length(lengths, self.config.learning_tokens))]
        if not groups:
            nothing = torch.zeros(1, dtype=torch.long, device=index.device)
            return backward(_Piece.of(rollout, credit, nothing), 0.0)[None] * 0
        parts = []
        for number, group in enumerate(groups):
            last = number + 1 == len(groups)
            with nullcontext() if last else self.accelerator.no_sync(learner.module):
                parts.append(backward(_Piece.of(rollout, credit, group), float(self.accelerator.num_processes)))
        return torch.stack(parts)

    def _criticise(
        self, critic: nn.Module, piece: "_Piece", weight: float, *, tokens: Float[Tensor, ""]
    ) -> Float[Tensor, " 2"]:
        """Add the critic's gradients; return its loss, and the share of values that its clipping holds."""
        mask, limit = piece.mask, self.config.cliprange_value
        if self.first_values is None:
            with self.accelerator.autocast():
                values = critic(*piece.text)
        else:
            values, self.first_values = self.first_values[piece.group, : mask.shape[1]], None
        error = value_loss(values, piece.values, piece.credit.returns, mask, cliprange_value=limit, denominator=tokens)
        self.accelerator.backward(self.config.vf_coef * error * weight)
        moved = (values.detach() - piece.values).abs() > (limit or torch.inf)
        return torch.stack([error.detach(), (moved & mask).sum() / tokens])

    def _reinforce(
        self, piece: "_Piece", weight: float, *, behaviour: Float[Tensor, "B T"], counts: Tensor, moved: bool
    ) -> Float[Tensor, " 5"]:
        """Add the policy's gradients; return its loss, what is measured of its ratio, and the largest ratio."""
        config, mask, ids = self.config, piece.mask, piece.credit.macro_ids
        with self.accelerator.autocast():
            logprobs = self.policy.module(*piece.text, self.sampling)
        if not moved:
            behaviour[piece.group, : mask.shape[1]] = logprobs.detach()
        old = behaviour[piece.group, : mask.shape[1]]
        surprise = policy_loss(
            logprobs,
            old,
            piece.credit.advantages,
            mask,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
            clip=config.clip,
            ratio=config.ratio,
            macro_ids=ids,
            aggregation=config.aggregation,
            denominator=counts[2],
        )
        self.accelerator.backward(surprise * weight)
        ratio, exists = importance_ratio(logprobs.detach(), old, mask, granularity=config.ratio, macro_ids=ids)
        measured = _ratio_means(ratio, exists, logprobs.detach() - old, mask, config=config, counts=counts)
        return torch.cat([surprise.detach()[None], measured, torch.where(exists, ratio, 0).max()[None]])

    def _advance(self, metrics: dict[str, float]) -> dict[str, float]:
        """Step the optimizers, unless the numbers are not finite or the policy has moved far enough."""
        learners = {"policy": self.policy} | ({} if self.critic is None else {"value": self.critic})
        norms = {
            f"{name}/grad_norm": float(
                self.accelerator.clip_grad_norm_(learner.module.parameters(), self.config.max_grad_norm)  # type: ignore[arg-type]
            )
            for name, learner in learners.items()
        }
        finite = all(map(_is_finite, (*(metrics[f"{name}/loss"] for name in learners), *norms.values())))
        far = self.config.target_kl is not None and metrics["policy/approx_kl"] > self.config.target_kl
        self.stopped = finite and far
        if finite and not far:
            for learner in learners.values():
                learner.optimizer.step()
            self.taken += 1
        for learner in learners.values():
            learner.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        return norms


def _is_finite(x: float) -> bool:
    return x - x == 0


def _text(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and responses without the columns that are padding in every row."""
    return trim(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)


def _ratio_means(
    ratio: Float[Tensor, "B N"],
    steps: Bool[Tensor, "B N"],
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    config: PPOConfig,
    counts: Float[Tensor, " 3"],
) -> Float[Tensor, " 3"]:
    """Measure these rows' part of the mean ratio, of what lies outside the clip range, and of the k3 estimate."""
    low, high = config.clip_range
    kinds = [(ratio, steps, counts[0])]
    if config.clip == "token":
        kinds.append(((log_ratio < -low) | (log_ratio > high), mask, counts[1]))
    else:
        kinds.append(((1 - ratio > low) | (ratio - 1 > high), steps, counts[0]))
    kinds.append((ratio - 1 - ratio.log(), steps, counts[0]))
    return torch.stack([torch.where(where, kind.float(), 0).sum() / count for kind, where, count in kinds])


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
