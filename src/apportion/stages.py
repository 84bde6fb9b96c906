"""Ordinary commands of `apportion`, some at a time, each in a process of its own; complete ones are not done again."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apportion.train.run import latest_checkpoint, read_records


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command.

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
    """A command ended with an error."""


def run_stages(stages: Sequence[Stage], folder: Path, *, jobs: int, threads: int, console: Console) -> None:
    """Run commands, some at a time, and show how far they are; what is complete is not done again.

    Args:
        stages: The commands; none needs what another of them writes.
        folder: Where their output goes, in a log each.
        jobs: Commands at a time.
        threads: Threads of each.
        console: Where they are shown.

    Raises:
        StageFailed: If a command fails; its log is named.
    """
    waiting = [stage for stage in stages if not stage.complete()]
    for stage in stages:
        done = "" if stage in waiting else " [dim](done before)[/]"
        console.print(
            f"[bold]{stage.name}[/]{done} apportion {shlex.join(stage.argv)}", highlight=False, soft_wrap=True
        )
    running: dict[str, tuple[Stage, subprocess.Popen]] = {}
    with _bars(waiting, console) as show, _terminable():
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


@contextmanager
def _terminable() -> Iterator[None]:
    """Leave by an exception when terminated, so that no command runs on alone."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
