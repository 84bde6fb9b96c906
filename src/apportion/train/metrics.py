"""What is measured of each batch; every key is defined in docs/metrics.md."""

import torch
from torch import Tensor

from apportion.batch import Credit, Rollout, Scores
from apportion.credit.attention import attention_fallbacks
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
        args: Its `credit` is read, and its termination asked for the rows that it could not parse.
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
        lowest, highest = scores.scores.view(-1, group).aminmax(dim=1)
        more["score/flat_groups"] = mean(lowest == highest, torch.ones_like(lowest, dtype=torch.bool))
    parse_fallbacks = getattr(innermost(args.credit.termination), "fallbacks", lambda _: ~everyone)(rollout)
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
        "credit/parse_fallbacks": float(reduce(parse_fallbacks.sum().float())),
    } | more
