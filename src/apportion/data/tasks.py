"""`apportion task`: the built-in tasks as folders of ordinary models and files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apportion.data.functions import FunctionsData, write_functions
from apportion.data.reviews import ReviewsData, write_reviews

PLACES = {"reviews": "runs/reviews/task", "functions": "runs/functions/task"}
"""Where the recipes of a task look for it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `apportion task` needs to know.

    Attributes:
        name: `reviews`, which `apportion quickstart` trains on, or `functions`, whose reward runs programs.
        output_dir: Where it goes; by default where the recipes of the task look for it.
        seed: Decides the data and the initial weights.

    Raises:
        ValueError: If there is no such task.
    """

    name: Literal["reviews", "functions"]
    output_dir: str | None = None
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return Path(self.output_dir or PLACES[self.name])


def write_task(task: Task) -> Path:
    """Write a task; the same seed gives the same files.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds something already.
    """
    folder = task.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; choose another output_dir, or remove it")
    if task.name == "reviews":
        return write_reviews(folder, ReviewsData(seed=task.seed))
    return write_functions(folder, FunctionsData(seed=task.seed))
