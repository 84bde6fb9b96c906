import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from apportion.data.problems import Problem, Tests
from apportion.evaluate.contents import PIECE, PIECES, digest_of_model, digest_of_problems

TESTS = Tests(inputs=["1"], outputs=["2"])
PROBLEM = Problem(task_id="a", prompt="Add.", tests=TESTS)


@pytest.mark.parametrize(
    "other",
    [
        replace(PROBLEM, task_id="b"),
        replace(PROBLEM, tests=replace(TESTS, outputs=["3"])),
        replace(PROBLEM, tests=replace(TESTS, prelude="import math\n")),
        replace(PROBLEM, head="def f():\n"),
    ],
)
def test_problems_that_test_otherwise_are_others(other: Problem) -> None:
    assert digest_of_problems([PROBLEM], asked=False) != digest_of_problems([other], asked=False)


def test_prompts_matter_where_a_model_is_asked_and_solutions_never() -> None:
    again = replace(PROBLEM, prompt="Subtract.", solutions=("1",))
    assert digest_of_problems([PROBLEM], asked=False) == digest_of_problems([again], asked=False)
    assert digest_of_problems([PROBLEM], asked=True) != digest_of_problems([again], asked=True)
    assert digest_of_problems([PROBLEM], asked=True) == digest_of_problems([replace(again, prompt="Add.")], asked=True)


def model(folder: Path, changed: str = "", by: float = 1.0) -> str:
    """Write a large tensor, of which pieces are read, and a small one behind it; return the digest."""
    folder.mkdir(exist_ok=True)
    tensors = {"large": torch.zeros(PIECE * PIECES * 4), "small": torch.zeros(3)}
    if changed:
        tensors[changed] += by
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return digest_of_model(str(folder))


def test_a_model_is_recognised_by_each_of_its_tensors_and_files(tmp_path: Path) -> None:
    digests = [model(tmp_path / str(place), changed) for place, changed in enumerate(("", "", "large", "small"))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    (tmp_path / "1" / "trainer_state.json").write_text("{}")
    assert digest_of_model(str(tmp_path / "1")) == digests[0]
    (tmp_path / "1" / "tokenizer.json").write_text("{}")
    assert digest_of_model(str(tmp_path / "1")) != digests[0]


def test_adapters_are_recognised_with_the_model_below_them(tmp_path: Path) -> None:
    model(tmp_path / "below")
    folder = tmp_path / "adapters"
    model(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "below")}))
    before = digest_of_model(str(folder))
    model(tmp_path / "below", "small")
    assert digest_of_model(str(folder)) != before


def test_a_model_of_the_hub_is_recognised_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no hub here: the cache is filled as huggingface_hub fills it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    digests = []
    for commit in ("0" * 40, "1" * 40):
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        digests.append(digest_of_model("owner/model"))
    assert digests[0] != digests[1]
    with pytest.raises(OSError, match="owner/other"):
        digest_of_model("owner/other")
