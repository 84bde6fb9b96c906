"""Policy, critic and reference as a run begins with them, and as a checkpoint holds them."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_scheduler

from apportion.models import Critic, Policy, adapters_off, score_head, scorer_from_policy, unwrapped, without_dropout
from apportion.pretrained import base_of, config_of, load_scorer
from apportion.train.arguments import PPOArguments
from apportion.train.checkpoint import flatten_state, random_state, restore_state, set_random_state
from apportion.update.ppo import Learner


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Who plays which part.

    Attributes:
        policy: Learns to respond.
        critic: Learns what responses will earn; None where advantages are estimated without one.
        reference: What the policy is held to: a frozen copy, or the policy itself with its adapters switched off.
        as_reference: Context in which `reference` is the reference.
    """

    policy: Policy
    critic: Critic | None
    reference: Policy
    as_reference: Callable[[], AbstractContextManager]


def cast_roles(
    model: nn.Module,
    ref_model: nn.Module | None,
    value_model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOArguments,
) -> Roles:
    """Prepare the models for training.

    Args:
        model: The policy to be trained, with adapters or without.
        ref_model: The reference; by default the policy as it is now.
        value_model: The critic: a sequence classifier with one label, not shared with the reward model; None for none.
        tokenizer: The policy's.
        args: Its `gradient_checkpointing` and `zero_value_head` are read.

    Returns:
        The roles.

    Raises:
        ValueError: If the vocabularies of policy and critic differ, or the reference is the policy itself.
    """
    if ref_model is model:
        raise ValueError(
            "ref_model is the policy itself, which learns; give another, or leave it out for a frozen copy"
        )
    check_vocabulary("critic", value_model, model)
    for learner in filter(None, (model, value_model)):
        in_float32(learner)
    eos_ids = end_tokens(model, tokenizer)
    if ref_model is None and not hasattr(model, "disable_adapter"):
        ref_model = copy.deepcopy(model)
    policy = Policy(without_dropout(model), eos_ids)
    critic = None if value_model is None else Critic(without_dropout(value_model))
    if args.zero_value_head and value_model is not None:
        nn.init.zeros_(score_head(value_model).weight)
    for learner in (model, value_model) if value_model is not None else (model,):
        learner.train(args.gradient_checkpointing)  # dropout is off; transformers checkpoints only in training mode
        if args.gradient_checkpointing:
            inner: Any = unwrapped(learner)
            # The second is the name up to transformers 5.17.
            enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    reference = policy if ref_model is None else Policy(ref_model.eval().requires_grad_(False), eos_ids)
    switch = partial(adapters_off, model) if ref_model is None else torch.no_grad
    return Roles(policy=policy, critic=critic, reference=reference, as_reference=switch)


def in_float32(model: nn.Module) -> None:
    """Hold what learns in float32: in half precision a step of a usual learning rate is lost in rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            model.float()
            return


def check_room(model: nn.Module, prompt: int, new: int) -> None:
    """Refuse texts that are longer than a model has positions, on which it would fail, or ramble, later.

    Args:
        model: The policy.
        prompt: Tokens of the longest prompt.
        new: Tokens of the longest response.

    Raises:
        ValueError: With the three numbers.
    """
    positions = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt + new > positions:
        raise ValueError(
            f"prompts of up to {prompt} tokens and max_new_tokens ({new}) exceed the {positions} positions of the "
            "policy; lower max_prompt_length or sampling.max_new_tokens"
        )


def critic_model(
    value_model: str | nn.Module | None,
    reward_model: str | nn.Module | Callable,
    policy: str | nn.Module,
    *,
    same_tokens: bool,
) -> nn.Module:
    """Load or copy what the critic starts from.

    Args:
        value_model: The user's choice: a model to be used as it is, or a path.
        reward_model: What the critic starts from otherwise, if it is a model of the policy's vocabulary.
        policy: What its trunk starts from if not.
        same_tokens: Whether reward model and policy have one vocabulary.

    Returns:
        A sequence classifier; one that is made here learns in float32.

    Raises:
        ValueError: If the critic is the reward model itself, which would change as the critic learns.
    """
    if isinstance(value_model, nn.Module):
        if value_model is reward_model:
            raise ValueError("value_model is the reward model itself, which must not learn; leave it out for a copy")
        return value_model
    start = value_model or (reward_model if same_tokens else None)
    if isinstance(start, nn.Module):
        return copy.deepcopy(start).float().requires_grad_(True)
    if isinstance(start, str):
        return load_scorer(start, dtype="float32")
    return load_scorer(policy, dtype="float32") if isinstance(policy, str) else scorer_from_policy(policy).float()


def with_adapters(model: nn.Module, config: Any, seed: int) -> nn.Module:
    """Put PEFT's adapters into a model; their random beginning is a function of the run's seed."""
    from peft import get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own call
        torch.manual_seed(seed)
        inner: Any = model
        return get_peft_model(inner, config)


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Args:
        model: A model, or a path to one.

    Raises:
        ValueError: If there is none that can be read.
    """
    path = model if isinstance(model, str) else getattr(unwrapped(model).config, "_name_or_path", "")
    if not path:
        raise ValueError("the model came without a path; give its tokenizer as processing_class")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"{path} has no tokenizer that can be read; save one beside the model ({reason})") from error


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """List the tokens that end a response: the tokenizer's, and those that the model's generation settings name."""
    named = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return tuple(sorted({int(token) for token in [tokenizer.eos_token_id, *named] if token is not None}))


def check_vocabulary(name: str, other: str | nn.Module | None, policy: str | nn.Module) -> None:
    """Refuse a model that does not know the policy's tokens; of a path, only the configuration is read.

    Raises:
        ValueError: With both numbers.
    """
    if other is None:
        return
    theirs, ours = _vocabulary(other), _vocabulary(policy)
    if theirs != ours:
        raise ValueError(
            f"the {name} has a vocabulary of {theirs} tokens, the policy of {ours}; use models that share one"
        )


def _vocabulary(model: str | nn.Module) -> int:
    """Count the tokens that a model knows."""
    if not isinstance(model, str):
        return unwrapped(model).config.get_text_config().vocab_size
    return config_of(base_of(model)).get_text_config().vocab_size


def open_accelerator(args: PPOArguments) -> Accelerator:
    """Open the devices that accelerate was launched with; on a machine without any, the CPU.

    Raises:
        ValueError: If it was launched with something else than one process or DDP, or the tracker is not installed.
    """
    trackers = sorted(str(tracker) for tracker in get_available_trackers())
    if args.log_with is not None and args.log_with not in trackers:
        known = ", ".join(trackers) or "none"
        raise ValueError(f"log_with is {args.log_with!r}, which is not installed (these are: {known}); install it")
    precision = "bf16" if args.bf16 else "no"
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        # The precision of an earlier trainer of this process; accelerate would hold on to it, and refuse ours.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=args.log_with,
        project_dir=args.output_dir,
        cpu=not torch.accelerator.is_available(),
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(
            f"accelerate was launched with {accelerator.distributed_type.value}; PPOTrainer runs on one process or "
            "with DDP (torchrun, accelerate launch --multi_gpu)"
        )
    return accelerator


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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while: gradient checkpointing would switch its cache off."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a checkpoint holds beside the counters: the learners and their schedules.

    Attributes:
        learners: `policy` and, where there is one, `critic`.
        schedules: Their learning rates.
        accelerator: Devices and processes.
    """

    learners: dict[str, Learner]
    schedules: dict[str, LRScheduler]
    accelerator: Accelerator

    @classmethod
    def begin(cls, roles: Roles, args: PPOArguments, accelerator: Accelerator) -> Self:
        """Give the policy and, where there is one, the critic an optimizer and a schedule."""
        learners = {"policy": make_learner(roles.policy, args.learning_rate, args, accelerator)}
        if roles.critic is not None:
            learners["critic"] = make_learner(roles.critic, args.critic_learning_rate, args, accelerator)
        schedules = {name: make_schedule(learner, args) for name, learner in learners.items()}
        return cls(learners=learners, schedules=schedules, accelerator=accelerator)

    def advance(self) -> dict[str, float]:
        """Move the learning rates on by one update; return those that it had, as `policy/lr` and `value/lr`."""
        rates = {}
        for name, schedule in self.schedules.items():
            rates["value/lr" if name == "critic" else "policy/lr"] = float(schedule.get_last_lr()[0])
            schedule.step()
        return rates

    def lost(self) -> str | None:
        """Name a model with a parameter that is not finite; None where all are."""
        for name, learner in self.learners.items():
            if not all(bool(tensor.isfinite().all()) for tensor in trained_tensors(learner.module).values()):
                return name
        return None

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
