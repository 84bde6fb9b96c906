"""What every test shares: shape checks, one thread, repeatable properties, and tiny models made on the spot."""

import os
import sys
from pathlib import Path
from typing import TypeVar

import datasets
import huggingface_hub.constants
import hypothesis
import pytest
import torch
import transformers.utils.logging
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

# Every annotation of apportion is checked while tests run, and only then. Comes before its first import.
install_import_hook("apportion", "shape_checks.check")

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()

hypothesis.settings.register_profile(
    "apportion",
    deadline=None,
    max_examples=60,
    derandomize="CI" in os.environ,
    # A busy machine is no reason to fail.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("apportion")

ROOT = Path(__file__).parent.parent
Model = TypeVar("Model", bound=torch.nn.Module)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("the", "film", "plot", "is", "was", "not", "very", "good", "bad", "dull", "and", ".")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.fail(f"tests on real data need {path}, which is not there: put or link it beside the checkout")
    return path


@pytest.fixture(scope="session")
def task(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models and files for the commands, see `command_line.write_task`."""
    from command_line import write_task  # imports apportion, which the hook above has to come before

    return write_task(tmp_path_factory.mktemp("task"), shared / "data" / "stories260k")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory without a network; what commands add to the import path is taken back."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 16 tokens, pad apart from EOS, padding on the left."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    """A Llama with grouped queries, small enough that a forward pass takes about a millisecond."""
    return LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )


@pytest.fixture
def policy(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    """A tiny random policy, the same in every test, in eval mode."""
    return seeded(LlamaForCausalLM, tiny_config, seed=0)


@pytest.fixture
def reward_model(tiny_config: LlamaConfig) -> LlamaForSequenceClassification:
    """A tiny random reward model with one label, in eval mode."""
    config = LlamaConfig.from_dict(tiny_config.to_dict() | {"num_labels": 1})
    return seeded(LlamaForSequenceClassification, config, seed=1)


def seeded(make: type[Model], config: LlamaConfig, seed: int) -> Model:
    """Make a model from a config without touching the generator that the test uses."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(config).eval()
