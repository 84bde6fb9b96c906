"""What a run was given beside its settings, recognised again when it is resumed."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from apportion.data.prompts import PromptSet
from apportion.score.reward_model import FunctionReward, Reward

SAMPLED = 64
"""Numbers of each parameter that are looked at, evenly spread."""


def prints_of(
    prompts: PromptSet, eval_prompts: PromptSet | None, reference: nn.Module, reward: Reward
) -> dict[str, str]:
    """Take a fingerprint of the data and of the models that do not learn.

    Models that learn need none: a checkpoint holds them. Of a policy with adapters, which is its own reference, the
    base model is looked at; of a reward function its name.

    Returns:
        By the name of the trainer's argument; equal where the same was given.
    """
    held = ((name, parameter) for name, parameter in reference.named_parameters() if not parameter.requires_grad)
    found = {"train_dataset": _of_prompts(prompts), "ref_model": _of_parameters(held)}
    if eval_prompts is not None:
        found["eval_dataset"] = _of_prompts(eval_prompts)
    if isinstance(reward, FunctionReward):
        found["reward_model"] = reward.name
    elif isinstance(model := getattr(reward, "model", None), nn.Module):
        found["reward_model"] = _of_parameters(model.named_parameters())
    return found


def check_prints(saved: Mapping[str, Any], given: Mapping[str, str], folder: str) -> None:
    """Refuse to go on with other data or models than a run began with.

    Raises:
        ValueError: If something is not what it was; with its name.
    """
    names = [name for name in {**saved, **given} if saved.get(name) != given.get(name)]
    if names:
        raise ValueError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not what the run in {folder} was given; give "
            "the same again, or choose another output_dir"
        )


def _of_prompts(prompts: PromptSet) -> str:
    return _digest(repr((prompts.ids, prompts.columns)).encode())


def _of_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Names, shapes and some numbers."""
    parts = []
    for name, parameter in parameters:
        numbers = parameter.detach().flatten()
        some = numbers[:: max(1, len(numbers) // SAMPLED)].float().cpu()
        parts.append((name, tuple(parameter.shape), some.tolist()))
    return _digest(repr(parts).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
