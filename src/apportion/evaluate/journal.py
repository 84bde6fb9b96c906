"""JSON lines that a long run adds to, so that it goes on where it was stopped, and how far it is."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from apportion.data.problem_sets import json_lines


def written(path: Path) -> list[dict[str, Any]]:
    """Read the lines that are there; a last one that was not written to its end is cut off.

    Args:
        path: A file of JSON lines, or none yet.

    Returns:
        The rows.

    Raises:
        ValueError: If a line is no JSON object; with its number.
    """
    if not path.exists():
        return []
    with path.open("rb+") as file:
        content = file.read()
        if (end := content.rfind(b"\n") + 1) < len(content):
            os.truncate(file.fileno(), end)
    return [row for _, row in json_lines(path)]


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """Write it."""
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s")


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how much of something is done, how fast it goes and how long it takes; in a terminal only.

    Args:
        what: What is counted.
        total: How many there are.
        done: How many were done before.

    Yields:
        A function to call with how many were done since.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn())
    columns = (*columns, TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda count: bars.advance(task, count)
