"""What `sft` and `reward` share: the settings under their usual names, the folder, and the call of TRL's trainer.

Nothing here unpickles a file that it was given: models load from safetensors. To resume, transformers' trainer reads
its own optimizer.pt, scheduler.pt and rng_state.pth by `torch.load(weights_only=True)`, which builds tensors and plain
containers and refuses everything else; a checkpoint whose weights are not safetensors is refused before that.
"""

import json
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer import TRAINER_STATE_NAME

from apportion.data.files import Files, Source
from apportion.train.arguments import to_yaml
from apportion.train.launch import check_model
from apportion.train.learner import tokenizer_of
from apportion.train.run import CONFIG, check_run_folder, write_atomically


@dataclass(frozen=True, kw_only=True)
class HostedRecipe:
    """How one of TRL's trainers runs. The names are those of `transformers.TrainingArguments` and TRL's configurations.

    Attributes:
        model: A folder or a hub name; safetensors only.
        data: The rows, and those held out. Files of your own, or a class by name.
        output_dir: Where the model, its tokenizer, metrics.jsonl (what was logged) and metrics.json (how it ended) go;
            it has to be empty, or `resume` set.
        resume: Continue from the newest complete checkpoint in `output_dir`; without one, start.
        seed: Decides the order of rows and the weights of a new head.
        pad_token: Sets the tokenizer's padding token where it has none.
        learning_rate: Peak.
        lr_scheduler_type: Any schedule of `transformers.get_scheduler`.
        warmup_ratio: Part of the steps over which the learning rate rises from zero.
        num_train_epochs: Passes over the rows.
        max_steps: Steps, whatever the epochs; -1 to go by epochs.
        per_device_train_batch_size: Rows a step, device and accumulation.
        per_device_eval_batch_size: Rows at once in evaluation.
        gradient_accumulation_steps: Batches a step.
        max_length: Longest sequence in tokens, prompt included; None for no limit.
        weight_decay: AdamW's.
        adam_beta1: AdamW's first decay.
        adam_beta2: AdamW's second decay.
        max_grad_norm: Gradients are clipped to this norm.
        bf16: Compute in bfloat16 where it is safe (autocast).
        gradient_checkpointing: Trade time for memory.
        logging_steps: Log the loss every so many steps.
        eval_steps: Evaluate on the held-out rows every so many steps; 0 for the end only.
        save_steps: Write a checkpoint every so many steps; 0 for none.
        save_total_limit: Checkpoints kept.
        log_with: Tracker ("tensorboard", "trackio", "wandb", ...); None for none.
        extra: Anything else that TRL's configuration knows, by its name there.

    Raises:
        ValueError: If a number is out of range.
    """

    model: str
    data: Source = field(default_factory=Files)
    output_dir: str
    resume: bool = False
    seed: int = 0
    pad_token: str | None = None
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int | None = 1024
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 500
    save_total_limit: int = 1
    log_with: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_total_limit",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("eval_steps", "save_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 for never, or a number of steps")
        self._check_optimizer()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; give at least 1, or None for no limit")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps is {self.max_steps} and num_train_epochs {self.num_train_epochs}; give one above 0"
            )
        if taken := sorted({f.name for f in fields(self)} & self.extra.keys()):
            raise ValueError(
                f"extra holds {', '.join(taken)}, which are settings of their own; give them outside of extra"
            )

    def _check_optimizer(self) -> None:
        """Refuse what no optimizer or schedule can use."""
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; give a part of the steps in [0, 1)")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; give a number above 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number in [0, 1)")

    def arguments(self, *, evaluate: bool) -> dict[str, Any]:
        """Translate the settings into the arguments of TRL's configurations.

        Args:
            evaluate: Whether there are held-out rows.
        """
        same = ("output_dir", "seed", "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps")
        same += (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_length",
        )
        same += (
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "max_grad_norm",
            "bf16",
            "logging_steps",
            "save_total_limit",
        )
        on_cpu = not torch.accelerator.is_available()
        return {name: getattr(self, name) for name in same} | {
            # A float below 1 is a part of the steps; `warmup_ratio` is gone from transformers 5.
            "warmup_steps": self.warmup_ratio,
            "save_strategy": "steps" if self.save_steps else "no",
            "save_steps": self.save_steps or 1,
            "eval_strategy": "steps" if evaluate and self.eval_steps else "no",
            "eval_steps": self.eval_steps or None,
            "report_to": self.log_with or "none",
            "use_cpu": on_cpu,
            "dataloader_pin_memory": not on_cpu,
            "disable_tqdm": not sys.stderr.isatty(),
            "model_init_kwargs": {"use_safetensors": True},
            **self.extra,
        }


def configuration(kind: type, recipe: HostedRecipe, **arguments: Any) -> Any:
    """Make TRL's configuration, and let it say what it refuses.

    Args:
        kind: `SFTConfig` or `RewardConfig`.
        recipe: The settings.
        **arguments: Arguments of `kind`; `recipe.extra` goes over them.

    Raises:
        ValueError: If `extra` holds a name or a value that TRL does not accept.
    """
    names = {f.name for f in fields(kind)}
    if unknown := sorted(recipe.extra.keys() - names):
        raise ValueError(f"extra holds {', '.join(unknown)}, which {kind.__name__} does not know")
    # Renamed in transformers 5.20; the old name, whose default TRL sets to true, warns.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return kind(**({checkpointing: recipe.gradient_checkpointing} | arguments | recipe.extra))


def prepared_folder(recipe: HostedRecipe) -> str | None:
    """Check the output folder, and find the checkpoint to go on from.

    Returns:
        A checkpoint, or None to start.

    Raises:
        ValueError: If the folder is not empty and `resume` is off, was made by another configuration, cannot be
            written, or its checkpoint holds weights that are not safetensors.
    """
    folder = Path(recipe.output_dir)
    check_run_folder(folder, to_yaml(recipe), resume=recipe.resume)
    if not folder.is_dir():
        return None  # made when there is something to write
    checkpoint = _latest_complete(folder) if recipe.resume else None
    if checkpoint and not list(checkpoint.glob("*.safetensors")):
        raise ValueError(f"checkpoint {checkpoint} holds no safetensors weights; others are not loaded")
    return str(checkpoint) if checkpoint else None


def _latest_complete(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end.

    transformers' trainer writes its state last: where a kill came before, that file is missing or cut off. It deletes
    older checkpoints only after that, and writes the incomplete one again when the run comes to its step.
    """
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir() if path.is_dir()}
    steps = {int(number[1]): path for path, number in numbers.items() if number}
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_complete(steps[step])), None)


def _is_complete(checkpoint: Path) -> bool:
    """Tell whether the file that is written last can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def load_tokenizer(recipe: HostedRecipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model.

    Raises:
        FileNotFoundError: If there is no such model folder.
        ValueError: If there is no tokenizer, or it has no padding token and the recipe sets none.
    """
    check_model(recipe.model)
    tokenizer = tokenizer_of(recipe.model)
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token {recipe.pad_token!r} is not in the vocabulary of {recipe.model}")
        tokenizer.pad_token = recipe.pad_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {recipe.model} has no padding token; give pad_token, a token it knows")
    return tokenizer


def train(trainer: Any, recipe: HostedRecipe, checkpoint: str | None, held_out: Mapping[str, Any]) -> dict[str, float]:
    """Run one of TRL's trainers, save the model with its tokenizer, config.yaml, metrics.jsonl and metrics.json.

    Args:
        trainer: Ready to train.
        recipe: The settings, which config.yaml keeps.
        checkpoint: Where to go on, or None.
        held_out: Further numbers for metrics.json.

    Returns:
        What was written: `train_...` and, with held-out rows, `eval_...`, as transformers' trainer names them.

    Raises:
        ValueError: If a checkpoint holds anything but tensors and plain containers.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, to_yaml(recipe))
    trainer.remove_callback(PrinterCallback)  # it would print the lines of metrics.jsonl
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {checkpoint} holds more than tensors and numbers; it is not loaded") from error
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    # transformers' trainer switches the cache off; saved like that, the model would generate in quadratic time.
    trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True
    trainer.save_model()
    metrics = {**result, **evaluation, **held_out}
    if trainer.is_world_process_zero():
        lines = map(json.dumps, trainer.state.log_history)
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def accepted_format(rows: Dataset, formats: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Find the first of several formats whose columns are all there.

    Raises:
        ValueError: If there is none; with the columns there are.
    """
    for columns in formats:
        if set(columns) <= set(rows.column_names):
            return columns
    wanted = ", or ".join(" and ".join(map(repr, columns)) for columns in formats)
    raise ValueError(f"the data need the columns {wanted}; they have {', '.join(rows.column_names)}")


def check_rows(rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows that TRL would fail on, after it has begun.

    Args:
        rows: At least one.
        columns: Those that are read.
        tokenizer: The model's.

    Raises:
        ValueError: If a value is missing or a completion empty; with its row. If rows are chat messages and the
            tokenizer has no template.
    """
    for name in columns:
        if rows.data.column(name).null_count and None in (values := rows[name][:]):
            raise ValueError(f"row {values.index(None)} has no {name!r}; fill it in, or drop the row")
    if "completion" in columns and "" in (values := rows["completion"][:]):
        raise ValueError(f"row {values.index('')} has an empty completion; fill it in, or drop the row")
    if any(isinstance(rows[0][name], list) for name in columns) and tokenizer.chat_template is None:
        raise ValueError(
            f"{' and '.join(columns)} hold chat messages, but the tokenizer has no chat template; give text, or set one"
        )
