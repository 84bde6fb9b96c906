"""How a run gets on: its progress in a terminal, and the seconds of each stage."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(total: int, done: int, wanted: bool = True) -> Iterator[Callable[..., None]]:
    """Show a bar while a run goes on; nothing where the output is not a terminal.

    Args:
        total: Updates of the run.
        done: Updates done before.
        wanted: Whether this process shows anything.

    Yields:
        A function to be called after each update, with its metrics.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]ppo"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("ppo", total=total, completed=done, rate="", status="")

        def show(metrics: Mapping[str, float]) -> None:
            seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
            status = f"score {metrics['score/mean']:.3g}  kl {metrics['rollout/kl_sequence']:.3g}"
            bar.update(task, advance=1, rate=f"{1 / max(seconds, 1e-9):.2g} updates/s", status=status)

        yield show


class Stopwatch:
    """Seconds of each stage of a step, summed where it is entered more than once; devices are waited for."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        begin = _now()
        yield
        self.times[name] = self.times.get(name, 0.0) + _now() - begin


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
