import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from apportion.data.files import Files
from apportion.train.sft import SFTRecipe, sft, sft_trainer

ROWS = [
    {"prompt": "the film is", "completion": " very good ."},
    {"prompt": "the plot", "completion": " was not bad and dull ."},
    {"prompt": "the film was", "completion": " dull ."},
    {"prompt": "the", "completion": " plot is good ."},
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' </s>' }}"
    "{% endgeneration %}{{ ' ' }}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def model(tmp_path: Path, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model with its tokenizer, saved as any other."""
    policy.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(
    model: Path, rows: list[dict[str, Any]], name: str = "run", folder: Path | None = None, **changes: Any
) -> SFTRecipe:
    folder = folder or model.parent
    settings: dict[str, Any] = {
        "model": str(model),
        "data": Files(path=write(folder / f"{name}.jsonl", rows)),
        "output_dir": str(folder / name),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 0,
        "logging_steps": 1,
    }
    return SFTRecipe(**settings | changes)


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_model_learns_and_loads_as_any_other_with_its_tokenizer(model: Path) -> None:
    out = sft(recipe(model, ROWS, max_steps=40))
    assert isinstance(AutoModelForCausalLM.from_pretrained(out), LlamaForCausalLM)
    tuned = LlamaForCausalLM.from_pretrained(out, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    said = ids = tokenizer("the film was", return_tensors="pt")["input_ids"]
    for _ in range(3):
        said = torch.cat([said, tuned(said).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(said[0, ids.shape[1] :]) == "dull . </s>"
    assert tuned.config.use_cache


def nll_of_completions(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean over the completion tokens of all rows, each row by itself, so that there is neither padding nor a batch."""
    losses = []
    for row in ROWS:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        logprobs = policy(ids).logits[0, :-1].log_softmax(-1)
        losses += (-logprobs[torch.arange(len(ids[0]) - 1), ids[0, 1:]])[len(prompt) - 1 :].tolist()
    return sum(losses) / len(losses)


def test_the_loss_does_not_change_with_the_labels_of_prompts_and_padding(
    model: Path, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Defect 10 of ma-rlhf.md, section 4: prompts and padding were trained on."""
    out = sft(recipe(model, ROWS, max_steps=1))
    assert metrics(out)["train_loss"] == pytest.approx(nll_of_completions(policy, tokenizer), abs=1e-4)


def test_only_the_turns_of_the_assistant_are_labelled(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "the film"},
        {"role": "assistant", "content": "is good"},
        {"role": "user", "content": "the plot"},
        {"role": "assistant", "content": "is bad"},
    ]
    talker = AutoTokenizer.from_pretrained(model)
    talker.chat_template = TEMPLATE
    trainer = sft_trainer(recipe(model, [{"messages": turns}] * 2), talker)
    row = trainer.train_dataset[0]
    labelled = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(labelled) == "is good </s> is bad </s>"


def test_an_input_has_exactly_one_beginning_and_one_end(shared: Path, tmp_path: Path) -> None:
    """Defect 3 of abc.md, section 10: the beginning was decoded with the text and then added again."""
    model = shared / "data" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{"prompt": "the plot", "completion": " was dull ."}, {"prompt": "a", "completion": " cast .</s>"}]
    settings = recipe(model, rows, folder=tmp_path)
    for row in sft_trainer(settings, tokenizer).train_dataset:
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1
        assert row["labels"][-1] == tokenizer.eos_token_id


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(model: Path) -> None:
    settings = recipe(model, ROWS * 4, "whole", max_steps=6, save_steps=3, save_total_limit=2)
    whole = sft(settings)
    stopped = model.parent / "stopped"
    shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-6", stopped / "checkpoint-6")
    # As if killed while it wrote the second: transformers' trainer writes its state last.
    (stopped / "checkpoint-6" / "trainer_state.json").unlink()
    (stopped / "checkpoint-6" / "model.safetensors").write_bytes(b"cut off")
    shutil.copy(whole / "config.yaml", stopped)
    sft(replace(settings, output_dir=str(stopped), resume=True))
    ours, theirs = weights(stopped), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Trap:
    """What an unpickler that calls functions would run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_with_a_pickled_call_in_it_is_refused_and_not_run(model: Path) -> None:
    out = sft(recipe(model, ROWS, max_steps=2, save_steps=2))
    (out / "checkpoint-2" / "optimizer.pt").write_bytes(pickle.dumps(Trap(out / "sprung"), protocol=2))
    with pytest.raises(ValueError, match="checkpoint-2 holds more than tensors"):
        sft(recipe(model, ROWS, max_steps=2, save_steps=2, resume=True))
    assert not (out / "sprung").exists()


def test_held_out_rows_are_evaluated(model: Path) -> None:
    held_out = [{"prompt": "the cast", "completion": " is bad ."}]
    data = Files(path=write(model.parent / "a.jsonl", ROWS), eval_path=write(model.parent / "b.jsonl", held_out))
    assert metrics(sft(recipe(model, ROWS, data=data)))["eval_loss"] > 0


def test_a_terminal_is_not_written_to_where_there_is_none(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    out = sft(recipe(model, ROWS, logging_steps=1))
    said = capfd.readouterr()
    assert said.out == ""
    assert "it/s" not in said.err
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]


def test_rows_of_another_format_are_refused_with_their_columns(model: Path) -> None:
    with pytest.raises(ValueError, match="they have text"):
        sft(recipe(model, [{"text": "the film"}]))
