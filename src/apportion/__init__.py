"""Credit assignment in RLHF: which tokens, and which macro actions, earned the score of a response.

Five lines put it into any trainer that takes an advantage and a return for each token:

    rollout = Rollout(prompt_ids=..., prompt_mask=..., response_ids=..., response_mask=...,
                      old_logprobs=..., ref_logprobs=..., values=...)
    credit = assign_credit(rollout, Scores(scores=scores), CreditConfig(termination=FixedNgram(n=5)))
    loss = policy_loss(logprobs, rollout.old_logprobs, credit.advantages, rollout.response_mask, cliprange=0.2)
    loss = loss + value_loss(values, rollout.values, credit.returns, rollout.response_mask, cliprange_value=0.2)
"""

from apportion.batch import Credit, Rollout, Scores
from apportion.credit.advantages import GAE, gae
from apportion.credit.assign import CreditConfig, assign_credit
from apportion.credit.macro_actions import macro_ids, macro_lengths, pooling_weights, sum_over_actions, to_tokens
from apportion.credit.redistribution import (
    Attention,
    PrefixDifference,
    Redistribution,
    Shuffled,
    Terminal,
    Uniform,
)
from apportion.credit.rewards import token_level_rewards
from apportion.credit.termination import (
    EveryToken,
    FixedNgram,
    Perplexity,
    RandomizedNgram,
    TerminationCondition,
    WholeResponse,
)
from apportion.update.losses import importance_ratio, policy_loss, value_loss

__all__ = [
    "GAE",
    "Attention",
    "Credit",
    "CreditConfig",
    "EveryToken",
    "FixedNgram",
    "Perplexity",
    "PrefixDifference",
    "RandomizedNgram",
    "Redistribution",
    "Rollout",
    "Scores",
    "Shuffled",
    "Terminal",
    "TerminationCondition",
    "Uniform",
    "WholeResponse",
    "assign_credit",
    "gae",
    "importance_ratio",
    "macro_ids",
    "macro_lengths",
    "policy_loss",
    "pooling_weights",
    "sum_over_actions",
    "to_tokens",
    "token_level_rewards",
    "value_loss",
]
