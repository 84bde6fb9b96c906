"""The settings of a PPO run."""

from dataclasses import dataclass, field, fields, is_dataclass
from math import isfinite
from typing import Any

import yaml

from apportion.credit.assign import CreditConfig
from apportion.credit.delimiter import Delimiter
from apportion.parsing.conditions import CodeParse, ConstituencyParse
from apportion.parsing.parsers import Benepar, Stanza
from apportion.sampling import Sampling
from apportion.update.config import PPOConfig

KNOWN = (Delimiter, ConstituencyParse, CodeParse, Stanza, Benepar)
"""What the command line knows by a short name besides the classes that `CreditConfig` names: it has to be imported."""

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Schedules of transformers that need nothing besides the warm-up and the number of updates."""


@dataclass(frozen=True, kw_only=True)
class PPOArguments:
    """How `PPOTrainer` runs. The names are those of Hugging Face's and TRL's trainers where they have one.

    Attributes:
        output_dir: The run folder; it has to be empty, or `resume` set.
        resume: Continue from the newest checkpoint of the run folder, bit for bit.
        seed: Decides the order of prompts and what is sampled.
        num_steps: Updates, one rollout each.
        batch_size: Responses an update, over all processes; with an estimator that compares g responses to a prompt, a
            multiple of g, and batch_size / g prompts.
        credit: How credit is assigned.
        sampling: What responses are drawn from.
        ppo: How the policy and the critic learn from a rollout.
        learning_rate: Of the policy.
        critic_learning_rate: Of the critic; without effect, as all settings of the critic, where advantages are
            estimated without one.
        lr_scheduler_type: A schedule of `transformers.get_scheduler` without further settings, counted in updates.
        warmup_steps: Updates over which the learning rates rise from zero.
        warmup_ratio: The same as a part of `num_steps`; give one of the two.
        adam_beta1: AdamW's first decay.
        adam_beta2: AdamW's second decay.
        weight_decay: AdamW's weight decay.
        scale_scores: Divide scores by their standard deviation over the first rollout, so that kl_coef and the clip
            ranges mean the same for every reward.
        missing_eos_penalty: Subtracted from the (scaled) score of a response that did not end; None for nothing.
        zero_value_head: Start the critic's head at zero instead of at the reward model's.
        max_prompt_length: Prompts of more tokens are dropped and counted.
        strict: Refuse prompts that are too long instead of dropping them.
        eval_steps: Evaluate on held-out prompts every so many updates, at the start and at the end; 0 for never.
        eval_batch_size: Responses that are sampled at once in evaluation; None for `batch_size`.
        num_logged_samples: Evaluation responses written to samples.jsonl.
        save_steps: Write a checkpoint every so many updates and at the end; 0 for the end only.
        save_total_limit: Checkpoints kept.
        bf16: Compute in bfloat16 where it is safe (autocast); parameters stay as they are.
        gradient_checkpointing: Trade time for memory.
        log_with: Trackers of accelerate ("tensorboard", "trackio", "wandb", ...); metrics.jsonl is always written.

    Raises:
        ValueError: If a number is out of range, or the schedule unknown.
    """

    output_dir: str = "runs/ppo"
    resume: bool = False
    seed: int = 0
    num_steps: int = 100
    batch_size: int = 32
    credit: CreditConfig = field(default_factory=CreditConfig)
    sampling: Sampling = field(default_factory=Sampling)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    learning_rate: float = 1.5e-5
    critic_learning_rate: float = 1.5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    scale_scores: bool = False
    missing_eos_penalty: float | None = None
    zero_value_head: bool = False
    max_prompt_length: int = 512
    strict: bool = False
    eval_steps: int = 10
    eval_batch_size: int | None = None
    num_logged_samples: int = 4
    save_steps: int = 50
    save_total_limit: int = 2
    bf16: bool = False
    gradient_checkpointing: bool = False
    log_with: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not self.output_dir:
            raise ValueError("output_dir is empty; name the folder of the run")
        for name in ("num_steps", "batch_size", "max_prompt_length", "save_total_limit"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size is {self.eval_batch_size}; choose at least 1, or None for batch_size")
        for name in ("eval_steps", "save_steps", "warmup_steps", "num_logged_samples", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} is {value}; choose a number of at least 0")
        self._check_optimizer()
        self._check_together()

    def _check_optimizer(self) -> None:
        """Refuse what no optimizer or schedule can use."""
        for name in ("learning_rate", "critic_learning_rate"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} is {value}; choose a positive number")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; choose a number in [0, 1)")
        if self.missing_eos_penalty is not None and not isfinite(self.missing_eos_penalty):
            raise ValueError(f"missing_eos_penalty is {self.missing_eos_penalty}; choose a number, or None for none")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; choose a number in [0, 1)")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}; choose one of {', '.join(SCHEDULES)}")

    def _check_together(self) -> None:
        """Refuse settings that do not fit each other."""
        if self.ppo.num_mini_batches > self.batch_size:
            raise ValueError(
                f"ppo.num_mini_batches is {self.ppo.num_mini_batches}, more than the {self.batch_size} responses of "
                "batch_size; lower it"
            )
        group, estimator = self.credit.advantage.responses_per_prompt, type(self.credit.advantage).__name__
        if self.batch_size % group:
            raise ValueError(
                f"batch_size is {self.batch_size} responses, not a multiple of the {group} that {estimator} compares "
                "(group_size); change one of them"
            )
        if self.credit.advantage.varies_inside_actions and self.ppo.ratio != "token":
            raise ValueError(
                f"ppo.ratio is {self.ppo.ratio!r}, but the advantages of {estimator} differ inside a macro action; "
                "choose 'token'"
            )
        if self.warmup_steps and self.warmup_ratio:
            both = f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}"
            raise ValueError(f"{both}; give one of them")

    @property
    def warmup(self) -> int:
        """Updates of warm-up, from whichever of the two settings is given."""
        return self.warmup_steps or round(self.warmup_ratio * self.num_steps)


def check_shares(args: PPOArguments, processes: int) -> None:
    """Refuse a batch that processes cannot share in whole groups of responses to a prompt.

    Args:
        args: Its `batch_size` and the groups of `credit.advantage` are read.
        processes: Number of processes.

    Raises:
        ValueError: With the numbers, and what to choose.
    """
    group, total = args.credit.advantage.responses_per_prompt, args.batch_size
    if total % processes:
        raise ValueError(f"batch_size is {total}, not a multiple of the {processes} processes")
    if total % (processes * group):
        raise ValueError(
            f"batch_size is {total}, of which each of the {processes} processes would have {total // processes}, not a "
            f"multiple of the {group} responses of a group; choose a multiple of {processes * group}"
        )


def to_yaml(settings: Any) -> str:
    """Write settings as the command line reads them: a class that was chosen among several stands with its path.

    Args:
        settings: A configuration dataclass.

    Returns:
        YAML text; the same settings give the same text.
    """
    return yaml.safe_dump(_plain(settings, top=True), sort_keys=False)


def _plain(value: Any, *, top: bool = False) -> Any:
    """Turn dataclasses into mappings, and other things that are called into their dotted path."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value):
        content = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        is_group = top or type(value).__name__ in ("CreditConfig", "Sampling", "PPOConfig", "Weighted", "Limits")
        return content if is_group else {"class_path": path, "init_args": content}
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value
