"""Kill a PPO run with SIGKILL again and again and resume it until it is done; run by test_resume.py.

Each round forks a child that trains with `resume=True`. It is killed after an update or two at a random moment, and in
every other round in the middle of writing a checkpoint. The parent prints how often it was killed outside of one, and
how often inside.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from apportion import CreditConfig, PPOConfig, RandomizedNgram, Sampling
from apportion.train.run import latest_checkpoint
from families import classifier
from trainers import HELD_OUT, data, run

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# Everything that has a state: schedules with warm-up, a score scale, minibatches, random segments, evaluation.
SETTINGS: dict[str, Any] = {
    "num_steps": 20,
    "batch_size": 6,
    "save_steps": 1,
    "eval_steps": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "scale_scores": True,
    "sampling": Sampling(max_new_tokens=12, temperature=0.9, top_k=20),
    "credit": CreditConfig(termination=RandomizedNgram(seed=5), whiten_advantages=True),
    "ppo": PPOConfig(num_ppo_epochs=2, num_mini_batches=2),
}


sync = os.fsync


def slow_sync(descriptor: int) -> None:
    """Sync as a slow disk does: a checkpoint of a large model takes its time."""
    time.sleep(0.003)
    sync(descriptor)


def drawing(completions: list[str], **_: Any) -> list[float]:
    """A reward that draws from every generator of the process."""
    return [len(text) + random.random() + np.random.rand() + float(torch.rand(())) for text in completions]


def train(folder: Path, kind: str) -> None:
    reward = drawing if kind == "drawing reward" else classifier("llama")
    roles: dict[str, Any] = {"reward_model": reward, "eval_dataset": data(HELD_OUT)}
    roles |= {"peft_config": LORA} if kind == "adapters" else {}
    run(folder, roles=roles, resume=True, **SETTINGS | ({"bf16": True} if kind == "bf16" else {}))


def forked(folder: Path, kind: str) -> int:
    child = os.fork()
    if child:
        return child
    try:
        # A run may depend on its own seed alone, and on the process where its reward does.
        seed = 0 if kind == "drawing reward" else os.getpid()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        os.fsync = slow_sync
        train(folder, kind)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status):
        sys.exit(f"training failed with status {status}")
    return bool(done)


def writing(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".tmp-step-*"))


def step(folder: Path) -> int:
    checkpoint = latest_checkpoint(folder)
    return -1 if checkpoint is None else checkpoint.step


def until_killed(folder: Path, kind: str, chance: random.Random, inside: bool) -> str:
    """Train one or two updates further and kill, outside or inside of a checkpoint; `done` if training was faster.

    Updates are counted, not seconds, for a quiet machine trains in a second what a busy one does in ten.
    """
    goal = step(folder) + chance.randint(1, 2)
    child = forked(folder, kind)
    while not ended(child):
        if step(folder) >= goal:
            time.sleep(0 if inside else chance.uniform(0, 0.03))
            if writing(folder) is inside:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "inside" if inside and writing(folder) else "outside"
        else:
            time.sleep(0.002)
    return "done"


def main(folder: Path, kind: str, rounds: int) -> None:
    chance, kills = random.Random(0), {"inside": 0, "outside": 0, "done": 0}
    for number in range(rounds):
        kills[until_killed(folder, kind, chance, inside=number % 2 == 1)] += 1
        if kills["done"]:
            break
    for target in (folder, folder.with_name("whole")):
        child = forked(target, kind)
        while not ended(child):
            time.sleep(0.01)
    print(kills["outside"], kills["inside"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
