"""`apportion control`: does it help, and is it what it is called? Settings beside each other on `reviews`, over seeds.

A control is a recipe under `controls/`: a section `ppo` that changes the credit of the recipe `reviews`, and in
`beside` the one that it is to be compared with.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console

from apportion.evaluate.report import compare
from apportion.quickstart import claim, prepare, start
from apportion.recipes import names, text_of
from apportion.stages import Stage, run_stages


@dataclass(frozen=True, kw_only=True)
class Control:
    """What `apportion control` needs to know.

    Attributes:
        names: Controls, by the name of their recipe, with `controls/` or without.
        output_dir: Where everything goes: `start/`, a folder for each run, and `report-NAME/` for each control.
        seeds: Runs of each control, and of what it stands beside.
        start_seed: Decides the data, the fine-tuned model and the reward model, which all runs share.
        num_steps: PPO updates of a run.
        jobs: Runs at a time, one thread each; by default as many as there are cores.

    Raises:
        ValueError: If no control or no seed is given, a control is unknown, or a number is out of range.
    """

    names: list[str] = field(default_factory=list)
    output_dir: str = "runs/controls"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    start_seed: int = 0
    num_steps: int = 60
    jobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what there is not, and numbers out of range."""
        known = ", ".join(controls())
        if not self.names:
            raise ValueError(f"no control is given; name some of {known}")
        for name in self.names:
            if name.removeprefix("controls/") not in controls():
                raise ValueError(f"there is no control {name!r}; one of {known}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give at least one, each once")
        for name in ("num_steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")


def controls() -> list[str]:
    """List the controls by name, without `controls/`."""
    return [name.removeprefix("controls/") for name in names() if name.startswith("controls/")]


def beside(name: str) -> str | None:
    """Name what a control is to be compared with; None for the method that others stand beside."""
    other = yaml.safe_load(text_of(f"controls/{name}")).get("beside")
    return None if other is None else other.removeprefix("controls/")


def control(settings: Control) -> None:
    """Train controls and what they stand beside from the same start, over seeds, and report on each.

    Raises:
        StageFailed: If a command fails; its log is named.
        ValueError: If the folder cannot be written, or holds something else than such runs.
    """
    folder, console = Path(settings.output_dir), Console()
    claim(folder, "control", {"start_seed": settings.start_seed, "num_steps": settings.num_steps})
    cores = settings.jobs or os.cpu_count() or 1
    chosen = [name.removeprefix("controls/") for name in settings.names]
    others = [other for name in chosen if (other := beside(name)) is not None]
    prepare(folder / "start", settings.start_seed, cores, console)
    run_stages(runs(folder, [*others, *chosen], settings), folder, jobs=cores, threads=1, console=console)
    for name in chosen:
        compared = [other for other in (beside(name), name) if other is not None]
        report = compare(
            [run_folder(folder, one, seed) for one in compared for seed in settings.seeds], folder / f"report-{name}"
        )
        console.print(f"[bold]report[/] {report}")


def runs(folder: Path, chosen: Iterable[str], settings: Control) -> list[Stage]:
    """List the PPO runs, each once, seed by seed, so that an interrupted comparison is one over fewer seeds."""
    return [
        Stage(
            name=f"{name}-{seed}",
            argv=(
                *("ppo", "--config=reviews", f"--config=controls/{name}", *start(folder / "start")),
                *(f"--num_steps={settings.num_steps}", f"--seed={seed}", "--resume"),
                f"--output_dir={run_folder(folder, name, seed)}",
            ),
            folder=run_folder(folder, name, seed),
            total=settings.num_steps,
        )
        for seed in settings.seeds
        for name in dict.fromkeys(chosen)
    ]


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Name the folder of a run."""
    return folder / f"{name}-{seed}"
