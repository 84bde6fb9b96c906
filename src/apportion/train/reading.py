"""What is read of a rollout before credit is assigned, by passes that the update can learn from."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor, nn

from apportion.batch import Rollout, Scores
from apportion.credit.redistribution import needs_of
from apportion.microbatches import by_length
from apportion.rollout import widths
from apportion.score.policy_attention import read_policy
from apportion.train.arguments import PPOArguments
from apportion.update.ppo import PPOConfig, summed


def begins_with_last(
    prompt_mask: Bool[Tensor, "B P"],
    response_mask: Bool[Tensor, "B T"],
    config: PPOConfig,
    accelerator: Accelerator,
) -> bool:
    """Tell whether the update can begin with the rows that a model reads last in the rollout.

    A process by itself can where all rows are one minibatch; several, which keep step, where each reads all at once.

    Args:
        prompt_mask: (B, P) bool. Left-padded.
        response_mask: (B, T) bool. Right-padded.
        config: How the update reads.
        accelerator: Every process has to ask.
    """
    if config.num_mini_batches > 1 or accelerator.num_processes == 1:
        return config.num_mini_batches == 1
    groups = by_length(widths(prompt_mask, response_mask), config.learning_tokens)
    at_once = summed(accelerator, torch.tensor(len(groups) == 1, device=prompt_mask.device).float())
    return int(at_once) == accelerator.num_processes


def with_policy_attention(
    policy: nn.Module, rollout: Rollout, scores: Scores, args: PPOArguments, accelerator: Accelerator
) -> tuple[Scores, Tensor | None]:
    """Add the policy's attention to the scores, where credit follows it.

    It is read in a pass that the update would make: its first, or the one before several minibatches. Where a rollout
    is read in parts, all but the last of them are read once more, up to the layer that is asked for.

    Args:
        policy: As accelerate has prepared it.
        rollout: The responses.
        scores: Their scores.
        args: The redistribution, the sampled distribution, and how the update reads.
        accelerator: Precision and processes.

    Returns:
        scores: With the attention.
        logprobs: (B, T) float32. What the policy said in that pass, for the update (`PolicyReading`); None where it was
            not asked.
    """
    request, config = needs_of(args.credit.redistribution).policy_attention, args.ppo
    if request is None:
        return scores, None
    first = begins_with_last(rollout.prompt_mask, rollout.response_mask, config, accelerator)
    module: Any = policy
    with accelerator.autocast():
        reading = read_policy(
            module if first else accelerator.unwrap_model(module),
            rollout,
            request,
            sampling=args.sampling,
            budget=config.learning_tokens if first else config.micro_batch_tokens,
            logprobs="last" if first else "all" if config.num_mini_batches > 1 else None,
        )
    return replace(scores, policy_attention=reading.attention), reading.logprobs
