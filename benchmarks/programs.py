"""Run the recipe `programs-small`: a small model learns to write functions from the tests that they pass.

    python benchmarks/programs.py [--folder runs/functions] [--seeds 0 1 2] [--jobs 2] [--write]

Every stage is an ordinary command of `apportion`, printed; what is complete is not done again. All runs share one
fine-tuned model. With `--write` the report goes to `benchmarks/results/programs-small-DATE.md`; what stands under its
last heading is written by hand and kept.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console

from apportion.data.tasks import Task, write_task
from apportion.evaluate.report import compare
from apportion.evaluate.statistics import estimate
from apportion.stages import Stage, run_stages
from apportion.train.run import read_records

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
READING = "## What it says"
METHODS: dict[str, tuple[str, ...]] = {
    "ppo": ("--credit.termination=EveryToken",),
    "ma-ppo": ("--credit.termination=FixedNgram", "--credit.termination.n=10"),
    "code-parse": ("--credit.termination=CodeParse",),
    "error-line": ("--credit.termination=CodeParse", "--credit.redistribution=ErrorLine"),
}
STEPS = 40  # of the recipe
COLUMNS = {
    "pass@1": "eval/all_passed",
    "compiled": "eval/compiled",
    "score": "eval/score",
    "KL": "eval/kl_sequence",
    "tokens": "eval/length",
}


def stages(folder: Path, seeds: list[int]) -> Iterator[list[Stage]]:
    """List the commands in waves; those of a wave do not wait for each other."""
    task, sft = folder / "task", folder / "sft"
    data = (f"--data.path={task / 'prompts.jsonl'}", f"--data.eval_path={task / 'prompts_eval.jsonl'}")
    config = "--config=programs-small"
    argv = ("sft", config, f"--model={task / 'base'}", f"--data.path={task / 'sft.jsonl'}")
    yield [Stage(name="sft", argv=(*argv, f"--output_dir={sft}", "--resume"), folder=sft)]
    yield [
        Stage(
            name=f"{name}-{seed}",
            argv=(
                *("ppo", config, f"--model={sft}", *data, *choice, f"--seed={seed}", "--resume"),
                f"--output_dir={folder / f'{name}-{seed}'}",
            ),
            folder=folder / f"{name}-{seed}",
            total=STEPS,
        )
        for seed in seeds
        for name, choice in METHODS.items()
    ]


def evaluations(folder: Path) -> list[dict]:
    """The held-out evaluations of a run."""
    return [record for record in read_records(folder / "metrics.jsonl") if "eval/score" in record]


def cell(values: list[float]) -> str:
    """An interquartile mean over seeds with its interval."""
    found = estimate(np.array(values))
    return f"{found.value:.3f}" + ("" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]")


def report(folder: Path, seeds: list[int], jobs: int) -> Iterator[str]:
    """Write the report line by line."""
    git = ("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    models = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text]
    runs = {name: [evaluations(folder / f"{name}-{seed}") for seed in seeds] for name in METHODS}
    sft = json.loads((folder / "sft" / "metrics.json").read_text())
    yield from ("# Recipe programs-small: functions from words, paid by their tests", "")
    yield f"256 held-out problems, one response each (temperature 1); {len(seeds)} seeds from one fine-tuned model:"
    yield "interquartile means with bootstrap intervals of 95 %. pass@1 is the part that passes all 5 tests. Seconds of"
    yield f"training without evaluation, {jobs} runs at a time, one thread each; fine-tuning took"
    yield f"{sft['train_runtime']:.0f} s."
    yield ""
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {commit}; Python {platform.python_version()}; date: {datetime.now(UTC):%Y-%m-%d}"
    yield f"- machine: {models[0].split(':')[1].strip()}, {os.cpu_count()} cores"
    yield ""
    head = ("policy", *COLUMNS, "seconds")
    yield from ("| " + " | ".join(head) + " |", "|---" * len(head) + "|")
    begin = [cell([run[0][key] for run in runs["ppo"]][:1]) for key in COLUMNS.values()]
    yield "| " + " | ".join(("fine-tuned", *begin, "")) + " |"
    for name, found in runs.items():
        ends = [cell([run[-1][key] for run in found]) for key in COLUMNS.values()]
        yield "| " + " | ".join((name, *ends, f"{np.median([run[-1]['seconds'] for run in found]):.0f}")) + " |"
    yield from ("", "## pass@1 during training, mean over seeds", "")
    steps = [record["step"] for record in runs["ppo"][0]]
    yield from ("| update | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|")
    for place, step in enumerate(steps):
        means = [np.mean([run[place]["eval/all_passed"] for run in found]) for found in runs.values()]
        yield f"| {step} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |"
    yield ""


def kept(path: Path) -> str:
    """What was written by hand in the newest report, from its heading on."""
    for old in [path, *sorted(RESULTS.glob("programs-small-*.md"), reverse=True)]:
        text = old.read_text() if old.exists() else ""
        if READING in text:
            return text[text.index(READING) :]
    return f"{READING}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the recipe programs-small over seeds.")
    parser.add_argument("--folder", default="runs/functions", help="where everything goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the PPO runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    arguments = parser.parse_args()
    folder, console = Path(arguments.folder), Console()
    if not (folder / "task" / "prompts_eval.jsonl").exists():
        write_task(Task(name="functions", output_dir=str(folder / "task")))
    for wave in stages(folder, arguments.seeds):
        run_stages(wave, folder, jobs=arguments.jobs, threads=1, console=console)
    compare([str(folder / f"{name}-{seed}") for name in METHODS for seed in arguments.seeds], folder / "report")
    text = "\n".join(report(folder, arguments.seeds, arguments.jobs)).rstrip() + "\n"
    print(text)
    if arguments.write:
        path = RESULTS / f"programs-small-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(f"{text}\n{kept(path)}", encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
