"""What is read of a rollout before credit is assigned, by a pass that the update can learn from."""

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor

from apportion.microbatches import by_length
from apportion.rollout import widths
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
