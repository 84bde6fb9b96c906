"""`apportion quickstart`: from nothing to a comparison of four ways to assign credit, on the task `reviews`.

Every stage is an ordinary command, started as anybody would start it, and printed. A stage that is complete is not
done again, so a quickstart that was interrupted goes on where it was.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apportion.data.reviews import ReviewsData, write_reviews
from apportion.evaluate.report import compare
from apportion.train.run import check_place, latest_checkpoint, read_records

# What each method changes of the recipe `reviews`: one choice on an axis.
METHODS: dict[str, tuple[str, ...]] = {
    "ppo": ("--credit.termination=EveryToken",),
    "ma-ppo": ("--credit.termination=FixedNgram", "--credit.termination.n=5"),
    "abc": (
        "--credit.termination=EveryToken",
        "--credit.redistribution=Attention",
        "--credit.redistribution.beta=0.8",
    ),
    "prefix-difference": ("--credit.termination=EveryToken", "--credit.redistribution=PrefixDifference"),
}
LEAST_ACCURACY = 0.85


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What `apportion quickstart` needs to know.

    Attributes:
        output_dir: Where everything goes; the report lies in `report/` inside.
        seed: Decides the data, the models and what is sampled.
        num_steps: PPO updates of each method.
        jobs: Runs at a time, one thread each; by default as many as there are cores.

    Raises:
        ValueError: If a number is out of range.
    """

    output_dir: str = "runs/quickstart"
    seed: int = 0
    num_steps: int = 60
    jobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("num_steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the quickstart.

    Attributes:
        name: What it is called in the terminal.
        argv: The command, without `apportion`.
        folder: What it writes.
        total: Updates until it is complete; None where it is complete once its metrics are there.
    """

    name: str
    argv: tuple[str, ...]
    folder: Path
    total: int | None = None

    def done(self) -> int:
        """Count the updates that are done; 1 or 0 for a stage that has none."""
        if self.total is None:
            return int((self.folder / "metrics.json").exists())
        records = read_records(self.folder / "metrics.jsonl")
        return int(records[-1]["step"]) if records else 0

    def complete(self) -> bool:
        """Tell whether nothing is left to do."""
        if self.total is None:
            return bool(self.done())
        checkpoint = latest_checkpoint(self.folder)
        return checkpoint is not None and checkpoint.step >= self.total and (self.folder / "model").exists()


class StageFailed(RuntimeError):
    """A command of the quickstart ended with an error."""


def quickstart(settings: Quickstart) -> None:
    """Write the task, fine-tune, train the reward model, train four policies, and compare them.

    Raises:
        StageFailed: If a command fails; its log is named.
        ValueError: If the folder cannot be written, or holds something else than this quickstart.
    """
    begin, folder, console = time.monotonic(), Path(settings.output_dir), Console()
    claim(folder, settings)
    task = folder / "task"
    if not (task / "prompts_eval.jsonl").exists():
        write_reviews(task, ReviewsData(seed=settings.seed))
    console.print(f"[bold]task[/] reviews, seed {settings.seed}: {task}")
    cores = settings.jobs or os.cpu_count() or 1
    for stage in preparations(folder, settings):
        _run([stage], folder, jobs=1, threads=cores, console=console)
    tell_accuracy(folder / "reward", console)
    _run(methods(folder, settings), folder, jobs=cores, threads=1, console=console)
    runs = [str(folder / name) for name in METHODS]
    report = compare(runs, folder / "report")
    console.print(f"[bold]report[/] {report}, {(time.monotonic() - begin) / 60:.1f} minutes")


def claim(folder: Path, settings: Quickstart) -> None:
    """Make the folder, or refuse one of other settings, whose results would be taken for those of these.

    Raises:
        ValueError: If the folder cannot be written, or holds another quickstart or something else.
    """
    check_place(folder)
    path, ours = folder / "quickstart.json", {"seed": settings.seed, "num_steps": settings.num_steps}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ValueError(f"{folder} holds a quickstart of {theirs}, not of {ours}; choose another output_dir")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no quickstart; choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours), encoding="utf-8")


def preparations(folder: Path, settings: Quickstart) -> list[Stage]:
    """List the commands that come before PPO, one after the other."""
    task, seed = folder / "task", f"--seed={settings.seed}"
    sft = ("sft", "--config=reviews", f"--model={task / 'base'}", f"--data.path={task / 'sft.jsonl'}", seed)
    reward = (
        *("reward", "--config=reviews", f"--model={folder / 'sft'}", f"--data.path={task / 'pairs.jsonl'}"),
        *(f"--data.eval_path={task / 'pairs_test.jsonl'}", seed),
    )
    return [
        Stage(name=name, argv=(*argv, f"--output_dir={folder / name}", "--resume"), folder=folder / name)
        for name, argv in (("sft", sft), ("reward", reward))
    ]


def methods(folder: Path, settings: Quickstart) -> list[Stage]:
    """List the PPO runs: the same start, prompts and settings, and another choice of credit."""
    task = folder / "task"
    shared = (
        *("ppo", "--config=reviews", f"--model={folder / 'sft'}", f"--reward_model={folder / 'reward'}"),
        *(f"--data.path={task / 'prompts.jsonl'}", f"--data.eval_path={task / 'prompts_eval.jsonl'}"),
        *(f"--num_steps={settings.num_steps}", f"--seed={settings.seed}", "--resume"),
    )
    return [
        Stage(
            name=name,
            argv=(*shared, *choice, f"--output_dir={folder / name}"),
            folder=folder / name,
            total=settings.num_steps,
        )
        for name, choice in METHODS.items()
    ]


def _run(stages: Sequence[Stage], folder: Path, *, jobs: int, threads: int, console: Console) -> None:
    """Run commands, some at a time, and show how far they are."""
    waiting = [stage for stage in stages if not stage.complete()]
    for stage in stages:
        done = "" if stage in waiting else " [dim](done before)[/]"
        console.print(
            f"[bold]{stage.name}[/]{done} apportion {shlex.join(stage.argv)}", highlight=False, soft_wrap=True
        )
    running: dict[str, tuple[Stage, subprocess.Popen]] = {}
    with _bars(waiting, console) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    stage = waiting.pop(0)
                    running[stage.name] = stage, _start(stage, folder, threads)
                time.sleep(0.2)  # processes are watched, not waited for one by one
                for stage, process in list(running.values()):
                    show(stage)
                    if process.poll() is not None:
                        del running[stage.name]
                        _check(stage, process, folder)
        finally:
            for _, process in running.values():
                process.terminate()


def _start(stage: Stage, folder: Path, threads: int) -> subprocess.Popen:
    """Start a command in a process of its own, with its output in a log."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with _log(stage, folder).open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "apportion", *stage.argv]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _log(stage: Stage, folder: Path) -> Path:
    return folder / f"{stage.name}.log"


def _check(stage: Stage, process: subprocess.Popen, folder: Path) -> None:
    """Stop at a stage that failed, with the last thing that it said."""
    if process.returncode:
        log = _log(stage, folder)
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        raise StageFailed(f"{stage.name} failed with exit status {process.returncode}: {said[-1]} (see {log})")


def tell_accuracy(folder: Path, console: Console) -> None:
    """Say how good the reward model is on held-out pairs, and warn where that is too little."""
    accuracy = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["eval_accuracy"]
    console.print(f"[bold]reward[/] held-out pair accuracy {accuracy:.3f}", highlight=False)
    if accuracy < LEAST_ACCURACY:
        console.print(
            f"[bold red]warning[/] that is less than {LEAST_ACCURACY}: what follows optimises a poor reward model"
        )


@contextmanager
def _bars(stages: Sequence[Stage], console: Console) -> Iterator:
    """Show a bar for each stage; nothing where the output is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*columns, TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks = {stage.name: progress.add_task(stage.name, total=stage.total or 1) for stage in stages}

        def show(stage: Stage) -> None:
            progress.update(tasks[stage.name], completed=stage.done())

        yield show
