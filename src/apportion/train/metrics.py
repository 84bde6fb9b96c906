"""What is measured of each batch; every key is defined in docs/metrics.md."""

import torch
from jaxtyping import Bool
from torch import Tensor

from apportion.batch import Credit, Rollout, Scores
from apportion.credit.attention import attention_fallbacks
from apportion.credit.groups import Groups
from apportion.masked import Reduce, masked_mean, masked_var
from apportion.train.arguments import PPOArguments
from apportion.train.termination import innermost


def batch_metrics(
    rollout: Rollout, scores: Scores, credit: Credit, ended: Tensor, *, scale: float, args: PPOArguments, reduce: Reduce
) -> dict[str, float]:
    """Measure a rollout and its credit over all processes.

    Args:
        rollout: Responses, before the update.
        scores: What the reward said, in its own units.
        credit: Who earned it.
        ended: (B) bool. Whether each response has ended by itself.
        scale: Factor from the reward's units to those that are trained on.
        args: Its `credit` is read, and its conditions are asked for the rows that they could not parse.
        reduce: Sums a tensor over processes.

    Returns:
        Metrics under `rollout/`, `score/` and `credit/`.
    """
    mask = rollout.response_mask
    everyone = torch.ones_like(ended)

    def mean(x: Tensor, where: Tensor = everyone) -> float:
        return float(masked_mean(x.float(), where, reduce=reduce))

    actions = credit.macro_ids.amax(1) + 1
    estimator, more = args.credit.advantage, {}
    if estimator.needs_critic:
        more["credit/value_mean"] = mean(rollout.values.detach(), mask)
    if (group := estimator.responses_per_prompt) > 1:
        flat = Groups.of(credit.token_level_scores.sum(1), mask.any(1), group).flat
        more["score/flat_groups"] = mean(flat, torch.ones_like(flat))
    kl_sequence, score = mean(rollout.kl.sum(1)), mean(scores.scores)
    return {
        "rollout/length": mean(rollout.lengths),
        "rollout/eos_rate": mean(ended),
        "rollout/kl": mean(rollout.kl, mask),
        "rollout/kl_sequence": kl_sequence,
        "rollout/entropy": mean(-rollout.old_logprobs, mask),
        "score/mean": score,
        "score/std": float(masked_var(scores.scores, everyone, reduce=reduce).sqrt()),
        "score/scale": scale,
        "score/objective": score * scale - args.credit.kl_coef * kl_sequence,
        "credit/actions": mean(actions),
        "credit/action_length": mean(rollout.lengths) / max(mean(actions), 1e-9),
        "credit/advantage_mean": mean(credit.advantages, mask),
        "credit/advantage_std": float(masked_var(credit.advantages, mask, reduce=reduce).sqrt()),
        "credit/return_mean": mean(credit.returns, mask),
        "credit/attention_fallbacks": float(reduce(attention_fallbacks(rollout, scores).float())),
        "credit/parse_fallbacks": float(reduce(_parse_fallbacks(rollout, args).sum().float())),
    } | more


def _parse_fallbacks(rollout: Rollout, args: PPOArguments) -> Bool[Tensor, " B"]:
    """Mark the responses that a condition could not parse, for macro actions or for the smoothing of values."""
    fallen = torch.zeros_like(rollout.lengths, dtype=torch.bool)
    for condition in (args.credit.termination, args.credit.value_smoothing):
        count = getattr(innermost(condition), "fallbacks", None) if condition is not None else None
        fallen = fallen if count is None else fallen | count(rollout)
    return fallen
