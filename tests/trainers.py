"""Tiny PPO runs: a policy of 48 words, a reward that counts one of them, and what a run leaves behind."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from apportion import CreditConfig, PPOArguments, PPOTrainer, Sampling
from apportion.train.run import checkpoints, read_records
from families import VOCABULARY, causal

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PROMPTS = ["w5 w6 w8", "w9", "w10 w11", "w12 w13 w14 w15", "w20 w21"]
HELD_OUT = ["w30 w31", "w32", "w33 w34 w35"]
TIMES = ("time/", "seconds")


def words() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: the token of id 7 is written w7."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL)}
    vocabulary |= {f"w{index}": index for index in range(len(SPECIAL), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def count_w7(completions: list[str], **_: Any) -> list[float]:
    """Count a word; no response can hold too many of them."""
    return [float(text.split().count("w7")) for text in completions]


def data(texts: list, **columns: list) -> Dataset:
    return Dataset.from_dict({"prompt": texts} | columns)


def arguments(folder: Path, **changes: Any) -> PPOArguments:
    """Three updates of eight short responses at learning rates that show."""
    settings: dict[str, Any] = {
        "num_steps": 3,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "critic_learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "sampling": Sampling(max_new_tokens=8),
        "credit": CreditConfig(kl_coef=0.05),
        "save_steps": 0,
        "eval_steps": 0,
    }
    return PPOArguments(output_dir=str(folder), **settings | changes)


def trainer(folder: Path, *, roles: dict[str, Any] | None = None, **changes: Any) -> PPOTrainer:
    """A trainer of a tiny policy; `roles` are its keyword arguments, `changes` those of its settings."""
    given: dict[str, Any] = {
        "reward_model": count_w7,
        "train_dataset": data(PROMPTS),
        "processing_class": words(),
    }
    given |= roles or {}
    given.setdefault("model", causal("llama", initializer_range=0.08))
    return PPOTrainer(arguments(folder, **changes), **given)


def run(folder: Path, **options: Any) -> PPOTrainer:
    """Train to the end."""
    made = trainer(folder, **options)
    made.train()
    return made


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMES)}
        for record in read_records(folder / "metrics.jsonl")
    ]


def learned(made: PPOTrainer) -> list[Tensor]:
    """Everything that learns, policy first."""
    return [p.detach() for learner in made.state.learners.values() for p in learner.module.parameters()]


def left_behind(folder: Path, made: PPOTrainer) -> dict[str, Any]:
    """What two equal runs have in common, and two different ones have not."""
    samples = folder / "samples.jsonl"
    return {
        "metrics": repr(metrics(folder)),
        "samples": samples.read_text() if samples.exists() else "",
        "checkpoints": [checkpoint.step for checkpoint in checkpoints(folder)],
        "files": sorted(path.name for path in folder.iterdir()),
        "learned": torch.cat([x.flatten() for x in learned(made)]).tolist(),
    }
