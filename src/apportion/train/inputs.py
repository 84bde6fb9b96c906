"""What a run was given beside its settings, recognised again when it is resumed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from apportion.credit.assign import CreditConfig
from apportion.data.prompts import PromptSet
from apportion.score.function_reward import FunctionReward, ScoringFunction
from apportion.score.reward_model import Reward, RewardModel, name_of
from apportion.train.objects import is_named, made_of, own_objects

SAMPLED = 64
"""Numbers of each parameter that are looked at, evenly spread."""


def prints_of(
    prompts: PromptSet,
    eval_prompts: PromptSet | None,
    reference: nn.Module,
    reward: Reward,
    credit: CreditConfig,
    peft_config: Any = None,
) -> dict[str, str]:
    """Take a fingerprint of the data and of the models that do not learn.

    Models that learn need none: a checkpoint holds them. Of a policy with adapters, which is its own reference, the
    base model is looked at (`model`); of functions, the reward and the template, their names, and what objects that are
    called are made of (`made_of`), which the settings of `credit` do not hold; of columns what JSON can hold, or else
    their type.

    Returns:
        By the name of the trainer's argument; equal where the same was given.
    """
    held = ((name, parameter) for name, parameter in reference.named_parameters() if not parameter.requires_grad)
    role = "ref_model" if peft_config is None else "model"
    found = {"train_dataset": _of_prompts(prompts), role: _of_parameters(held)}
    if peft_config is not None:
        found["peft_config"] = _digest(_text_of(peft_config.to_dict()))
    if eval_prompts is not None:
        found["eval_dataset"] = _of_prompts(eval_prompts)
    if isinstance(reward, FunctionReward):
        is_setting = isinstance(reward.function, ScoringFunction)
        found["reward_model"] = repr(reward.function) if is_setting else reward.name
        if not is_setting and not is_named(reward.function):
            found["reward_model"] += f" {_digest(made_of(reward.function))}"
    elif isinstance(reward, RewardModel):
        found["reward_model"] = _of_parameters(reward.model.named_parameters())
        found["reward_template"] = "" if reward.template is None else name_of(reward.template)
    if own := [*own_objects(credit)]:
        found["credit"] = _digest(repr([*map(made_of, own)]))
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
    return _digest(_text_of([prompts.ids, prompts.columns]))


def _of_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Names, shapes and some numbers."""
    parts = []
    for name, parameter in parameters:
        numbers = parameter.detach().flatten()
        some = numbers[:: max(1, len(numbers) // SAMPLED)].float().cpu()
        parts.append((name, tuple(parameter.shape), some.tolist()))
    return _digest(repr(parts))


def _text_of(value: Any) -> str:
    """Write as JSON what it can hold, arrays as lists and sets in order; of anything else the type."""

    def other(thing: Any) -> Any:
        if isinstance(thing, set | frozenset):
            return sorted(map(str, thing))
        return thing.tolist() if hasattr(thing, "tolist") else type(thing).__name__

    return json.dumps(value, default=other, sort_keys=True)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]
