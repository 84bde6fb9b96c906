"""Run folders for the tests of `evaluate`, written as a training run writes them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apportion.train.run import Run


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    method: str = "token",
    score: Callable[[int], float] = lambda step: float(step),
    steps: int = 8,
    every: int = 2,
    evaluated: Mapping[str, Callable[[int], float]] | None = None,
    pace: float = 2.0,
) -> Path:
    """Write a run that is evaluated every so many of its updates; an update takes `pace` seconds and 4 samples."""
    run = Run.open(folder, f"seed: {seed}\noutput_dir: {folder}\nmethod: {method}\n")
    for step in range(steps + 1):
        metrics: dict[str, Any] = {"samples": 4 * step, "tokens": 40 * step, "seconds": pace * step}
        if step > 0:
            metrics |= {"score/mean": score(step) / 2, "rollout/length": 10.0 + step, "rollout/kl_sequence": 0.1 * step}
        if step % every == 0:
            metrics |= {"eval/score": score(step), "eval/kl_sequence": 0.2 * step, "eval/length": 12.0}
            metrics |= {f"eval/{name}": value(step) for name, value in (evaluated or {}).items()}
            texts = [("the film", f"was {method} {step}"), ("a plot", "is good")]
            run.log_samples(
                step, [{"prompt": p, "response": r, "score": score(step), "kl": math.nan} for p, r in texts]
            )
        run.log(step, metrics)
    return folder
