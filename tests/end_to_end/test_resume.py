"""A run that was killed at any moment ends as one that was not, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apportion.train.run import Checkpoint, latest_checkpoint
from trainers import metrics

HERE = Path(__file__).parent


def last(folder: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def state(folder: Path) -> dict:
    content = json.loads((last(folder).path / "state.json").read_text())
    content["counters"].pop("seconds")
    return content


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rounds"), [("whole policy", 6), ("adapters", 3), ("bf16", 3), ("drawing reward", 3)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not_to_the_bit(
    kind: str, rounds: int, tmp_path: Path
) -> None:
    """ma-rlhf.md section 4 row 21: there was no resume."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(HERE / "killed_trainer.py"), str(killed), kind, str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    outside, inside = map(int, result.stdout.split()[-2:])
    assert outside >= 1
    assert inside >= 1
    names = sorted(path.name for path in last(whole).path.glob("*.safetensors"))
    assert {"policy.safetensors", "critic.safetensors", "policy_optimizer.safetensors"} <= set(names)
    for name in names:
        # What is of the process a run does not draw from by itself, so there it may differ.
        if name != "random.safetensors" or kind == "drawing reward":
            assert (last(killed).path / name).read_bytes() == (last(whole).path / name).read_bytes(), name
    assert state(killed)["counters"] == state(whole)["counters"]
    assert state(killed)["score_scale"] == state(whole)["score_scale"]
    assert metrics(killed) == metrics(whole)
    assert len(metrics(whole)) == 21
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    (weights,) = (path.name for path in (whole / "model").glob("*.safetensors"))
    assert (killed / "model" / weights).read_bytes() == (whole / "model" / weights).read_bytes()
