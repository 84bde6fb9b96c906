"""What PPO on the task `reviews` starts from, too small to learn anything."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apportion.data.reviews import ReviewsData, write_reviews


def tiny_start(folder: Path, seed: int) -> Path:
    """Write the task with few rows, and a fine-tuned model and a reward model that learned nothing."""
    sizes = {"sft": 4, "pairs": 4, "pairs_test": 4, "prompts": 32, "prompts_eval": 4}
    task = write_reviews(folder / "task", ReviewsData(seed=seed, **sizes))
    shutil.copytree(task / "base", folder / "sft")
    torch.manual_seed(seed)
    scorer = AutoModelForSequenceClassification.from_pretrained(task / "base", num_labels=1)
    scorer.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(task / "base").save_pretrained(folder / "reward")
    (folder / "sft" / "metrics.json").write_text("{}")
    (folder / "reward" / "metrics.json").write_text('{"eval_accuracy": 0.5}')
    return folder
