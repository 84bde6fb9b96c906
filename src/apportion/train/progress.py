"""The progress of a run in a terminal: updates, their rate, the time left, and how the score stands."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

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
