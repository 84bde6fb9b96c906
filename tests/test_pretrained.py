"""Models from a folder: whole, without pickles, and without code of their own."""

import json
import os
import pty
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from apportion.models import Critic, hidden_states
from apportion.pretrained import check_policy, check_reward_model, load_policy, load_scorer
from families import causal, classifier

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
TEXTS = (IDS, torch.ones_like(IDS, dtype=torch.bool), IDS + 3, torch.ones_like(IDS, dtype=torch.bool))


def test_a_saved_classifier_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = classifier("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(Critic(load_scorer(str(tmp_path)))(*TEXTS), Critic(model)(*TEXTS))


def test_a_saved_language_model_is_loaded_as_a_scorer_that_says_zero(tmp_path: Path) -> None:
    policy = causal("llama")
    policy.save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path))
    assert (Critic(scorer)(*TEXTS) == 0).all()
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(hidden_states(scorer, ids, mask), hidden_states(policy, ids, mask))


def test_a_family_without_a_classifier_is_refused(tmp_path: Path) -> None:
    causal("llama4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no sequence classifier of the family llama4_text, .*RLOO"):
        load_scorer(str(tmp_path))


def test_a_classifier_of_two_labels_is_refused(tmp_path: Path, tiny_config: LlamaConfig) -> None:
    LlamaForSequenceClassification(LlamaConfig.from_dict(tiny_config.to_dict() | {"num_labels": 2})).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="has 2 labels; give a sequence classifier with one"):
        load_scorer(str(tmp_path))


@pytest.mark.parametrize("load", [load_policy, load_scorer])
def test_weights_that_would_have_to_be_unpickled_are_refused_in_a_line(load: Any, tmp_path: Path) -> None:
    model = causal("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors") as refusal:
        load(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_adapters_that_would_have_to_be_unpickled_are_refused(tmp_path: Path) -> None:
    causal("llama").save_pretrained(tmp_path / "base")
    base = load_policy(str(tmp_path / "base"))
    get_peft_model(base, LORA).save_pretrained(str(tmp_path / "adapters"))
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    load_policy(str(tmp_path / "adapters"))
    torch.save({"x": torch.ones(1)}, weights.with_name("adapter_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_policy(str(tmp_path / "adapters"))


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def changed(kind: Callable[[str], Any], folder: Path, change: Change) -> str:
    """Save a model whose file of weights is another one."""
    kind("llama").save_pretrained(folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without(part: str) -> Change:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            causal,
            without("layers.0.self_attn.q_proj"),
            "lacks 1 of its weights, such as model.layers.0.self_attn.q",
        ),
        (
            causal,
            lambda w: {f"foo.{name}": weight for name, weight in w.items()},
            "lacks .* such as .*; save the whole",
        ),
        (
            causal,
            lambda w: {name: x[:, :-1].clone() if x.ndim == 2 else x for name, x in w.items()},
            "do not fit its conf",
        ),
        (classifier, without("score"), "lacks 1 of its weights, such as score.weight"),
    ],
)
def test_what_is_missing_is_not_made_up(kind: Any, change: Change, message: str, tmp_path: Path, capfd: Any) -> None:
    """transformers fills it with random numbers, and no seed is set by then."""
    path = changed(kind, tmp_path / "model", change)
    load, check = (load_policy, check_policy) if kind is causal else (load_scorer, check_reward_model)
    for refused in (load, check):
        with pytest.raises(ValueError, match=message) as refusal:
            refused(path)
        assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_the_trunk_of_a_scorer_is_not_made_up_either(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks 1 of its weights"):
        load_scorer(changed(causal, tmp_path / "model", without("layers.1.mlp.up_proj")))


def test_an_index_that_names_a_pickle_is_refused(tmp_path: Path) -> None:
    model = causal("llama")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model-1.bin")
    names = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "pytorch_model-1.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for load in (load_policy, load_scorer):
        with pytest.raises(ValueError, match=r"index.json names pytorch_model-1.bin; .* pickled files are not opened"):
            load(str(tmp_path))


def test_code_of_a_model_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal transformers asks, and runs it after a `y`."""
    causal("llama").save_pretrained(tmp_path / "model")
    ran = tmp_path / "ran"
    (tmp_path / "model" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = {"model_type": "zzz", "architectures": ["Model"], "auto_map": auto_map}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    master, terminal = pty.openpty()
    os.write(master, b"y\n")
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        for load in (load_policy, load_scorer):
            with pytest.raises(ValueError, match="brings code of its own, which is not run; give a model"):
                load(str(tmp_path / "model"))
    os.close(master)
    assert not ran.exists()


def test_shards_are_whole(tmp_path: Path) -> None:
    model = causal("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    loaded = load_policy(str(tmp_path / "model"))
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ValueError, match="lacks"):
        check_policy(str(tmp_path / "model"))
