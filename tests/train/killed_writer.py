"""Kill a process that writes a run folder, again and again at random moments; run by test_run.py.

Each round forks a child that opens the folder, continues from the newest checkpoint and writes lines and checkpoints as
fast as it can, until SIGKILL. Then the folder must hold the checkpoint and exactly the lines up to it.
"""

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from apportion.train.run import Run

CONFIG = "seed: 1\n"


def opened(folder: Path) -> tuple[Run, int]:
    run = Run.open(folder, CONFIG, resume=True, keep_checkpoints=1)
    checkpoint = run.latest_checkpoint()
    step = checkpoint.step if checkpoint else -1
    run.truncate_after(step)
    return run, step


def write_parts(path: Path, text: str) -> None:
    for part in range(3):
        time.sleep(0.002)  # a large model takes its time: many kills fall between its files
        (path / f"part-{part}").write_text(text)


def write_until_killed(folder: Path) -> None:
    run, step = opened(folder)
    while True:
        step += 1
        run.log(step, {"score/mean": step / 3})
        run.log_samples(step, [{"prompt": "p" * 5000, "score": 1.0}] * 2)
        run.save_checkpoint(
            step,
            {"first": {"w": torch.full((50_000,), step)}, "second": {"w": torch.full((10,), step)}},
            {"step": step},
            write=partial(write_parts, text=str(step)),
        )


def check(folder: Path) -> int:
    run, step = opened(folder)
    lines = run.folder.joinpath("metrics.jsonl").read_text().splitlines() if step >= 0 else []
    samples = run.folder.joinpath("samples.jsonl").read_text().splitlines() if step >= 0 else []
    assert len(lines) == step + 1, (len(lines), step)
    assert len(samples) == 2 * (step + 1), (len(samples), step)
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        tensors, state = checkpoint.load()
        assert state == {"step": step}
        assert all(bool((named["w"] == step).all()) for named in tensors.values())
        assert sorted(tensors) == ["first", "second"]
        assert [path.read_text() for path in sorted(checkpoint.path.glob("part-*"))] == [str(step)] * 3
    return step


def main(folder: Path, rounds: int) -> None:
    delays, last, done = random.Random(0), -1, 0
    while done < rounds or (last <= 10 and done < 20 * rounds):  # a busy machine lets a child write less before its end
        done += 1
        child = os.fork()
        if child == 0:
            write_until_killed(folder)
        time.sleep(delays.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = check(folder)
    print(last)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
