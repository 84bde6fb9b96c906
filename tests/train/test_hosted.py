import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from apportion.train.arguments import to_yaml
from apportion.train.hosted import (
    HostedRecipe,
    accepted_format,
    check_rows,
    configuration,
    load_tokenizer,
    prepared_folder,
)


def recipe(**changes: Any) -> HostedRecipe:
    settings: dict[str, Any] = {"model": "m", "output_dir": "runs/none"}
    return HostedRecipe(**settings | changes)


def test_a_folder_that_holds_something_is_refused_unless_resumed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty; resume it"):
        prepared_folder(recipe(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"holds no config.yaml: not a run folder"):
        prepared_folder(recipe(output_dir=str(tmp_path), resume=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        prepared_folder(recipe(output_dir=str(tmp_path / "file" / "run")))


def test_the_newest_checkpoint_is_found_and_one_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(recipe()))
    for step in (5, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"checkpoint-20 holds no safetensors weights"):
        prepared_folder(recipe(output_dir=str(tmp_path), resume=True))
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    assert prepared_folder(recipe(output_dir=str(tmp_path), resume=True)) == str(tmp_path / "checkpoint-20")


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1.'], ids=["missing", "empty", "cut off"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path, state: str | None) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(recipe()))
    resumed = recipe(output_dir=str(tmp_path), resume=True)
    for step in (9, 10):  # by number, not by name
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    if state is not None:
        (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(state)
    assert prepared_folder(resumed) is None
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")
    assert prepared_folder(resumed) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert prepared_folder(resumed) == str(tmp_path / "checkpoint-10")


def test_a_folder_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(recipe(learning_rate=0.5)))
    with pytest.raises(ValueError, match=r"another configuration: learning_rate is 0.5 there and 2e-05 here"):
        prepared_folder(recipe(output_dir=str(tmp_path), resume=True))


ROWS = {
    "missing text": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}],
        "row 1 has no 'completi",
    ),
    "empty text": ([{"prompt": "a", "completion": ""}], "row 0 has an empty completion"),
    "chat": (
        [{"messages": [{"role": "user", "content": "a"}]}],
        "messages hold chat messages, but the tokenizer has no",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_trl_would_fail_on_are_refused(case: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows, message = ROWS[case]
    with pytest.raises(ValueError, match=message):
        check_rows(Dataset.from_list(rows), [*rows[0]], tokenizer)


def test_a_tokenizer_without_padding_is_refused_until_a_token_is_named(
    tmp_path: Path, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy.save_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no padding token; give pad_token"):
        load_tokenizer(recipe(model=str(tmp_path)))
    with pytest.raises(ValueError, match="'<gap>' is not in the vocabulary"):
        load_tokenizer(recipe(model=str(tmp_path), pad_token="<gap>"))
    assert load_tokenizer(recipe(model=str(tmp_path), pad_token="<pad>")).pad_token_id == 0


def test_a_missing_model_folder_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(FileNotFoundError, match="model folder /nowhere/model does not exist"):
        load_tokenizer(recipe(model="/nowhere/model"))


def test_the_columns_there_are_stand_in_the_error() -> None:
    rows = Dataset.from_dict({"text": ["a"], "label": [1]})
    with pytest.raises(ValueError, match=r"'prompt' and 'completion', or 'messages'; they have text, label"):
        accepted_format(rows, (("prompt", "completion"), ("messages",)))


def test_what_extra_holds_reaches_the_configuration_over_everything_else() -> None:
    from trl.trainer.sft_config import SFTConfig

    chosen = recipe(extra={"optim": "sgd", "use_cpu": True, "neftune_noise_alpha": 5.0})
    made = configuration(SFTConfig, chosen, **chosen.arguments(evaluate=False))
    assert (made.optim, made.neftune_noise_alpha) == ("sgd", 5.0)


def test_a_name_that_trl_does_not_know_is_refused() -> None:
    from trl.trainer.sft_config import SFTConfig

    with pytest.raises(ValueError, match="extra holds warmup, which SFTConfig does not know"):
        configuration(SFTConfig, recipe(extra={"warmup": 3}))


def test_nothing_is_computed_in_bfloat16_and_nothing_is_tracked_unless_asked() -> None:
    from trl.trainer.sft_config import SFTConfig

    made = configuration(SFTConfig, recipe(), **recipe().arguments(evaluate=False))
    assert not made.bf16
    assert not made.gradient_checkpointing
    assert made.report_to == []
    assert made.use_cpu is not torch.accelerator.is_available()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio is 1\.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_train_epochs": 0.0}, r"num_train_epochs 0\.0"),
        ({"eval_steps": -1}, "eval_steps is -1"),
        ({"extra": {"max_steps": 3}}, "extra holds max_steps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**change)
