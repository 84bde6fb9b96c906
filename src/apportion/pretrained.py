"""Models from a folder or the hub: all of their weights are there, as safetensors, and no code of theirs is run.

transformers opens pickled weights, fills what a file lacks with random numbers, and asks whether to run a model's own
code. All three are refused here, in a line, before anything else is done.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from apportion.bars import quiet_bars
from apportion.models import refuse_without_classifier, score_head

MISSING_IS_NONE: dict[str, Any] = dict.fromkeys(
    ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
)
SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
HEADS = tuple(f"{head}.{part}" for head in ("score", "classifier") for part in ("weight", "bias"))


def load_policy(path: str, *, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model from a folder or a hub name.

    Args:
        path: Folder or hub name.
        dtype: "auto" for the dtype of the file, or the name of one.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: As `check_policy`.
    """
    check_policy(path)
    with quiet_bars():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **SAFE).eval()


def check_policy(path: str) -> None:
    """Refuse, without loading weights, what is no whole causal language model.

    Raises:
        ValueError: If it was saved as a classifier, which has no head that writes; if weights are missing, or would
            have to be unpickled; or if it brings code of its own.
    """
    refuse_pickles(path)
    if (base := base_of(path)) != path:
        check_policy(base)
        return
    architectures: list[str] = config_of(path).architectures or []
    if any("Classification" in name for name in architectures):
        raise ValueError(f"{path} was saved as {architectures[0]}, which writes no text; give a causal language model")
    _check_weights(AutoModelForCausalLM, path)


def load_scorer(path: str, *, dtype: str = "auto") -> PreTrainedModel:
    """Load a reward model or a critic: a sequence classifier with one label.

    A path to a causal language model gives its trunk with a new head.

    Args:
        path: Folder or hub name.
        dtype: As for `load_policy`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: As `is_scorer`.
    """
    has_head = is_scorer(path)
    with quiet_bars() if has_head else _silent():  # that a new head is not in the file is no news
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype, **SAFE)
    if not has_head:
        nn.init.zeros_(score_head(model).weight)
    return model.eval()


def is_scorer(path: str) -> bool:
    """Tell, without loading weights, whether a model was saved as a sequence classifier.

    Raises:
        ValueError: If it was saved with another number of labels than one; if weights are missing, or would have to be
            unpickled; if it brings code of its own; or as `refuse_without_classifier`.
    """
    refuse_pickles(path)
    config = config_of(path)
    refuse_without_classifier(config)
    found = any("SequenceClassification" in name for name in config.architectures or ())
    if found and config.num_labels != 1:
        raise ValueError(f"{path} has {config.num_labels} labels; give a sequence classifier with one")
    _check_weights(AutoModelForSequenceClassification, path, made_up=() if found else HEADS, num_labels=1)
    return found


def check_reward_model(path: str) -> None:
    """Refuse, without loading weights, a model that would score everything alike.

    Raises:
        ValueError: If it was not saved as a sequence classifier with one label; and as `is_scorer`.
    """
    if not is_scorer(path):
        raise ValueError(f"{path} was not saved as a sequence classifier, so it scores nothing; give a reward model")


def base_of(path: str) -> str:
    """Name the model that adapters adapt; of a model, itself."""
    adapters = cached_file(path, "adapter_config.json", **MISSING_IS_NONE)
    return (
        path if adapters is None else json.loads(Path(adapters).read_text(encoding="utf-8"))["base_model_name_or_path"]
    )


def config_of(path: str) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        ValueError: If the model brings code of its own.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} brings code of its own, which is not run; give a model that transformers knows, or load it "
            "yourself and give it to PPOTrainer"
        ) from error


def refuse_pickles(path: str) -> None:
    """Refuse what transformers would unpickle all the same: a folder without safetensors, and such adapters.

    Raises:
        ValueError: If a model's weights, or its adapters, are not safetensors.
    """
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise ValueError(f"{path} holds no weights as safetensors; save the model again, pickled files are not opened")
    index = cached_file(path, "model.safetensors.index.json", **MISSING_IS_NONE)
    files = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()) if index else set()
    if others := sorted(file for file in files if not file.endswith(".safetensors")):
        raise ValueError(f"{index} names {others[0]}; save the model again, pickled files are not opened")
    if base_of(path) != path and cached_file(path, "adapter_model.safetensors", **MISSING_IS_NONE) is None:
        raise ValueError(f"the adapters of {path} are not safetensors; save them again, pickled files are not opened")


def _check_weights(kind: Any, path: str, *, made_up: tuple[str, ...] = (), **settings: Any) -> None:
    """Refuse a model that is not whole; the heads of its files are read, on the meta device.

    Args:
        kind: The auto class that it is to be loaded by.
        path: Folder or hub name.
        made_up: Parameters that may be missing.
        **settings: Of its configuration.
    """
    with _silent():
        try:
            _, found = kind.from_pretrained(path, device_map="meta", output_loading_info=True, **SAFE, **settings)
        except RuntimeError as error:
            lines = [line for line in map(str.strip, str(error).splitlines()) if line]
            reason = next((line for line in lines if "mismatch" in line), lines[0] if lines else "no reason is given")
            raise ValueError(
                f"{path} holds weights that do not fit its config.json ({reason}); save it again"
            ) from error
    if missing := sorted(set(found["missing_keys"]) - set(made_up)):
        raise ValueError(
            f"{path} lacks {len(missing)} of its weights, such as {missing[0]}, and they are not made up; save the "
            "whole model again"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Let transformers say nothing of weights that are missing."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
