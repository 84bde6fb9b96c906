"""Policy, critic and reference as a run begins with them, and as a checkpoint holds them."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_scheduler

from apportion.models import Critic, Policy, adapters_off, score_head, unwrapped, without_dropout
from apportion.train.arguments import PPOArguments
from apportion.train.checkpoint import flatten_state, random_state, restore_state, set_random_state
from apportion.update.ppo import Learner


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Who plays which part.

    Attributes:
        policy: Learns to respond.
        critic: Learns what responses will earn.
        reference: What the policy is held to: a frozen copy, or the policy itself with its adapters switched off.
        as_reference: Context in which `reference` is the reference.
    """

    policy: Policy
    critic: Critic
    reference: Policy
    as_reference: Callable[[], AbstractContextManager]


def cast_roles(
    model: nn.Module,
    ref_model: nn.Module | None,
    value_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOArguments,
) -> Roles:
    """Prepare the models for training.

    Args:
        model: The policy to be trained, with adapters or without.
        ref_model: The reference; by default the policy as it is now.
        value_model: The critic: a sequence classifier with one label, not shared with the reward model.
        tokenizer: The policy's.
        args: Its `gradient_checkpointing` and `zero_value_head` are read.

    Returns:
        The roles.

    Raises:
        ValueError: If the vocabularies of policy and reference, or of policy and critic, differ.
    """
    _check_vocabulary("reference", ref_model, model)
    _check_vocabulary("critic", value_model, model)
    eos_ids = end_tokens(model, tokenizer)
    with_adapters = hasattr(model, "disable_adapter")
    if ref_model is None and not with_adapters:
        ref_model = copy.deepcopy(model)
    policy, critic = Policy(without_dropout(model), eos_ids), Critic(without_dropout(value_model))
    if args.zero_value_head:
        nn.init.zeros_(score_head(value_model).weight)
    for learner in (model, value_model):
        learner.train(args.gradient_checkpointing)  # dropout is off; transformers checkpoints only in training mode
        if args.gradient_checkpointing:
            unwrapped(learner).activation_checkpointing_enable({"use_reentrant": False})
    reference = policy if ref_model is None else Policy(ref_model.eval().requires_grad_(False), eos_ids)
    switch = partial(adapters_off, model) if ref_model is None else torch.no_grad
    return Roles(policy=policy, critic=critic, reference=reference, as_reference=switch)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """List the tokens that end a response: the tokenizer's, and those that the model's generation settings name."""
    named = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return tuple(sorted({int(token) for token in [tokenizer.eos_token_id, *named] if token is not None}))


def _check_vocabulary(name: str, other: nn.Module | None, policy: nn.Module) -> None:
    """Refuse a model that does not know the policy's tokens."""
    if other is None:
        return
    theirs, ours = (unwrapped(m).config.get_text_config().vocab_size for m in (other, policy))
    if theirs != ours:
        raise ValueError(
            f"the {name} has a vocabulary of {theirs} tokens, the policy of {ours}; use models that share one"
        )


def make_learner(module: nn.Module, learning_rate: float, args: PPOArguments, accelerator: Accelerator) -> Learner:
    """Give a model its optimizer and put both where accelerate wants them."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )
    module, optimizer = accelerator.prepare(module, optimizer)
    return Learner(module=module, optimizer=optimizer)


def make_schedule(learner: Learner, args: PPOArguments) -> LRScheduler:
    """Give an optimizer its learning-rate schedule, counted in updates."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=getattr(learner.optimizer, "optimizer", learner.optimizer),
        num_warmup_steps=args.warmup,
        num_training_steps=args.num_steps,
    )


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name what training changes: the parameters that learn. Shared ones appear once."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a checkpoint holds beside the counters: two learners and their schedules."""

    learners: dict[str, Learner]
    schedules: dict[str, LRScheduler]
    accelerator: Accelerator

    def save(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Return tensors by file and name, and the rest as something JSON can hold."""
        tensors, trees = {}, {}
        for name, learner in self.learners.items():
            module = self.accelerator.unwrap_model(learner.module)
            tensors[name] = {key: value.cpu().contiguous() for key, value in trained_tensors(module).items()}
            optimizer = getattr(learner.optimizer, "optimizer", learner.optimizer)
            tensors[f"{name}_optimizer"], trees[f"{name}_optimizer"] = flatten_state(optimizer.state_dict())
            _, trees[f"{name}_schedule"] = flatten_state(_without_functions(self.schedules[name].state_dict()))
        tensors["random"], trees["random"] = flatten_state(random_state())
        return tensors, trees

    def load(self, tensors: dict[str, dict[str, Tensor]], trees: dict) -> None:
        """Put everything back to the bit."""
        for name, learner in self.learners.items():
            module = self.accelerator.unwrap_model(learner.module)
            for key, value in trained_tensors(module).items():
                value.copy_(tensors[name][key])
            optimizer = getattr(learner.optimizer, "optimizer", learner.optimizer)
            optimizer.load_state_dict(restore_state(tensors[f"{name}_optimizer"], trees[f"{name}_optimizer"]))
            schedule = self.schedules[name]
            functions = {"lr_lambdas": [None] * len(schedule.base_lrs)} if hasattr(schedule, "lr_lambdas") else {}
            schedule.load_state_dict(restore_state({}, trees[f"{name}_schedule"]) | functions)
        set_random_state(restore_state(tensors["random"], trees["random"]))


def _without_functions(state: dict) -> dict:
    """Leave out what a schedule computes with; only where it stands is state."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"}
