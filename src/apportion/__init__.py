"""Credit assignment in RLHF: which tokens, and which macro actions, earned the score of a response.

Five lines put it into any trainer that takes an advantage and a return for each token:

    rollout = Rollout(prompt_ids=..., prompt_mask=..., response_ids=..., response_mask=...,
                      old_logprobs=..., ref_logprobs=..., values=...)
    credit = assign_credit(rollout, Scores(scores=scores), CreditConfig(termination=FixedNgram(n=5)))
    loss = policy_loss(logprobs, rollout.old_logprobs, credit.advantages, rollout.response_mask, cliprange=0.2)
    loss = loss + value_loss(values, rollout.values, credit.returns, rollout.response_mask, cliprange_value=0.2)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apportion.batch import AttentionRequest, Credit, Needs, ResponseTexts, Rollout, Scores
    from apportion.credit.advantages import GAE, AdvantageEstimator, gae
    from apportion.credit.assign import CreditConfig, assign_credit
    from apportion.credit.attention import Attention, PolicyAttention
    from apportion.credit.delimiter import Delimiter
    from apportion.credit.error_line import ErrorLine
    from apportion.credit.groups import GRPO, RLOO, DrGRPO
    from apportion.credit.macro_actions import macro_ids, macro_lengths, pooling_weights, sum_over_actions, to_tokens
    from apportion.credit.mixture import Mixture, Shuffled, Weighted
    from apportion.credit.parse import ParseTree
    from apportion.credit.redistribution import PrefixDifference, Redistribution, Terminal, Uniform
    from apportion.credit.reinforce import ReinforcePlusPlus
    from apportion.credit.rewards import token_level_rewards
    from apportion.credit.termination import (
        Entropy,
        EveryToken,
        FixedNgram,
        LowProbability,
        Perplexity,
        RandomizedNgram,
        ShuffledBoundaries,
        TerminationCondition,
        WholeResponse,
    )
    from apportion.credit.token_weights import token_weights
    from apportion.data.problems import Problem, Tests
    from apportion.masked import masked_mean, masked_var, masked_whiten
    from apportion.parsing.conditions import CodeParse, ConstituencyParse
    from apportion.parsing.parsers import Benepar, Parser, Stanza
    from apportion.sampling import Sampling
    from apportion.score.attention_columns import capture_attention
    from apportion.score.function_reward import ScoringFunction
    from apportion.score.program_tests import ProgramTests
    from apportion.score.programs import Outcome, program_reward, run_many, run_tests
    from apportion.score.sandbox import Bubblewrap, Limits, SandboxError, UnsafeSubprocess
    from apportion.score.text import with_text
    from apportion.train.arguments import PPOArguments
    from apportion.train.ppo import PPOTrainer
    from apportion.update.config import PPOConfig
    from apportion.update.losses import importance_ratio, policy_loss, value_loss

__all__ = [
    "GAE",
    "GRPO",
    "RLOO",
    "AdvantageEstimator",
    "Attention",
    "AttentionRequest",
    "Benepar",
    "Bubblewrap",
    "CodeParse",
    "ConstituencyParse",
    "Credit",
    "CreditConfig",
    "Delimiter",
    "DrGRPO",
    "Entropy",
    "ErrorLine",
    "EveryToken",
    "FixedNgram",
    "Limits",
    "LowProbability",
    "Mixture",
    "Needs",
    "Outcome",
    "PPOArguments",
    "PPOConfig",
    "PPOTrainer",
    "ParseTree",
    "Parser",
    "Perplexity",
    "PolicyAttention",
    "PrefixDifference",
    "Problem",
    "ProgramTests",
    "RandomizedNgram",
    "Redistribution",
    "ReinforcePlusPlus",
    "ResponseTexts",
    "Rollout",
    "Sampling",
    "SandboxError",
    "Scores",
    "ScoringFunction",
    "Shuffled",
    "ShuffledBoundaries",
    "Stanza",
    "Terminal",
    "TerminationCondition",
    "Tests",
    "Uniform",
    "UnsafeSubprocess",
    "Weighted",
    "WholeResponse",
    "assign_credit",
    "capture_attention",
    "gae",
    "importance_ratio",
    "macro_ids",
    "macro_lengths",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "policy_loss",
    "pooling_weights",
    "program_reward",
    "run_many",
    "run_tests",
    "sum_over_actions",
    "to_tokens",
    "token_level_rewards",
    "token_weights",
    "value_loss",
    "with_text",
]

# From light to heavy, the first without PyTorch: a name is imported from the first that has it.
_HOMES = (
    "credit.parse",
    "parsing.parsers",
    "data.problems",
    "score.sandbox",
    "score.programs",
    "masked",
    "batch",
    "credit.macro_actions",
    "credit.advantages",
    "credit.groups",
    "credit.reinforce",
    "credit.redistribution",
    "credit.attention",
    "credit.mixture",
    "credit.rewards",
    "credit.termination",
    "credit.delimiter",
    "credit.error_line",
    "credit.token_weights",
    "credit.assign",
    "parsing.conditions",
    "update.losses",
    "sampling",
    "score.text",
    "score.attention_columns",
    "score.function_reward",
    "score.program_tests",
    "update.config",
    "update.ppo",
    "train.arguments",
    "train.ppo",
)


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `apportion --help` need not wait for torch."""
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"apportion.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'apportion' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
