"""The command line as tests call it: in this process, with small models and files in a folder."""

import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from apportion.cli import main

PROMPTS = ("Once upon a time", "The dog", "A girl", "Tom was", "One day", "Lily saw")
HELD_OUT = ("Once there", "The cat", "A boy")
LONG = "Once upon a time there was a little dog and a little cat and a little bird"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind in a terminal."""

    code: int
    out: str
    err: str


def apportion(*argv: object) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:  # --help and --print_config
            code = int(end.code or 0)
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def refusal(outcome: Outcome) -> str:
    """Check that a command was refused as a user is to see it, and return the line."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.endswith("\n")
    assert re.match(r"apportion \S+: error: \S", outcome.err), outcome.err
    assert not outcome.out
    return outcome.err


def words(line: str, task: Path) -> list[str]:
    """Split a command line in which TASK stands for the folder of `write_task`, and STORIES for its policy."""
    line = line.replace("TASK", str(task)).replace("STORIES", str(task / "stories"))
    return shlex.split(line)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_but_times(run: Path) -> list[dict[str, Any]]:
    records = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "seconds" and not k.startswith("time/")} for record in records]


def write_task(folder: Path, stories: Path) -> Path:
    """Write models and data, good ones and one of each kind that is to be refused."""
    (folder / "stories").symlink_to(stories)
    _write_data(folder)
    _write_models(folder, stories, AutoTokenizer.from_pretrained(stories))
    return folder


def _write_data(folder: Path) -> None:
    rows = {
        "prompts": [{"prompt": text, "mood": len(text)} for text in PROMPTS],
        "held_out": [{"prompt": text, "mood": 0} for text in HELD_OUT],
        "pairs": [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in PROMPTS],
        "texts": [{"text": "a film", "label": 1}],
        "empty_prompt": [{"prompt": "a film"}, {"prompt": ""}],
        "long": [{"prompt": "Once upon"}, {"prompt": LONG}],
        "nothing": [],
    }
    for name, content in rows.items():
        write_jsonl(folder / f"{name}.jsonl", content)


def _write_models(folder: Path, stories: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    scorer, classifier = (AutoModelForSequenceClassification.from_pretrained(stories, num_labels=n) for n in (1, 2))
    _save(scorer, tokenizer, folder / "reward")
    _save(classifier, tokenizer, folder / "two_labels")
    torch.nn.init.constant_(scorer.score.weight, float("nan"))
    _save(scorer, tokenizer, folder / "nan_reward")
    policy = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        policy.model.norm.weight *= 1.2  # another temperature
    _save(policy, tokenizer, folder / "moved")
    _save(policy, tokenizer, folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(policy.state_dict(), folder / "pickled" / "pytorch_model.bin")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=1, **sizes))
    _save(other, tokenizer, folder / "other_vocabulary")
    policy.save_pretrained(folder / "no_tokenizer")
    _save(policy, tokenizer, folder / "damaged")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tokenizer.pad_token = None
    _save(policy, tokenizer, folder / "no_padding")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
