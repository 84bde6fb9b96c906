"""`apportion quickstart`: from nothing to a comparison of four ways to assign credit, on the task `reviews`.

Every stage is an ordinary command, started as anybody would start it, and printed. A stage that is complete is not
done again, so a quickstart that was interrupted goes on where it was.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apportion.data.reviews import ReviewsData, write_reviews
from apportion.evaluate.report import compare
from apportion.stages import Stage, run_stages
from apportion.train.run import check_place

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


def quickstart(settings: Quickstart) -> None:
    """Write the task, fine-tune, train the reward model, train four policies, and compare them.

    Raises:
        StageFailed: If a command fails; its log is named.
        ValueError: If the folder cannot be written, or holds something else than this quickstart.
    """
    begin, folder, console = time.monotonic(), Path(settings.output_dir), Console()
    claim(folder, "quickstart", {"seed": settings.seed, "num_steps": settings.num_steps})
    cores = settings.jobs or os.cpu_count() or 1
    prepare(folder, settings.seed, cores, console)
    run_stages(methods(folder, settings), folder, jobs=cores, threads=1, console=console)
    runs = [str(folder / name) for name in METHODS]
    report = compare(runs, folder / "report")
    console.print(f"[bold]report[/] {report}, {(time.monotonic() - begin) / 60:.1f} minutes")


def claim(folder: Path, kind: str, settings: dict[str, int]) -> None:
    """Make the folder, or refuse one of other settings, whose results would be taken for those of these.

    Args:
        folder: Where everything goes.
        kind: What it is to hold, such as "quickstart"; the name of the file that says so.
        settings: What decides the results.

    Raises:
        ValueError: If the folder cannot be written, or holds other settings or something else.
    """
    check_place(folder)
    path = folder / f"{kind}.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != settings:
            raise ValueError(f"{folder} holds a {kind} of {theirs}, not of {settings}; choose another output_dir")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {kind}; choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def prepare(folder: Path, seed: int, threads: int, console: Console) -> None:
    """Make what PPO on `reviews` starts from: the task, the policy and the reward model.

    Args:
        folder: Where `task/`, `sft/` and `reward/` go; what is there already is kept.
        seed: Decides the data and the models.
        threads: Threads of each command.
        console: Where it is shown.

    Raises:
        StageFailed: If a command fails; its log is named.
    """
    task = folder / "task"
    if not (task / "prompts_eval.jsonl").exists():
        write_reviews(task, ReviewsData(seed=seed))
    console.print(f"[bold]task[/] reviews, seed {seed}: {task}")
    for stage in preparations(folder, seed):
        run_stages([stage], folder, jobs=1, threads=threads, console=console)
    tell_accuracy(folder / "reward", console)


def preparations(folder: Path, seed: int) -> list[Stage]:
    """List the commands that come before PPO, one after the other."""
    task = folder / "task"
    sft = ("sft", "--config=reviews", f"--model={task / 'base'}", f"--data.path={task / 'sft.jsonl'}")
    reward = (
        *("reward", "--config=reviews", f"--model={folder / 'sft'}", f"--data.path={task / 'pairs.jsonl'}"),
        f"--data.eval_path={task / 'pairs_test.jsonl'}",
    )
    return [
        Stage(
            name=name,
            argv=(*argv, f"--seed={seed}", f"--output_dir={folder / name}", "--resume"),
            folder=folder / name,
        )
        for name, argv in (("sft", sft), ("reward", reward))
    ]


def methods(folder: Path, settings: Quickstart) -> list[Stage]:
    """List the PPO runs: the same start, prompts and settings, and another choice of credit."""
    shared = (*start(folder), f"--num_steps={settings.num_steps}", f"--seed={settings.seed}", "--resume")
    return [
        Stage(
            name=name,
            argv=("ppo", "--config=reviews", *shared, *choice, f"--output_dir={folder / name}"),
            folder=folder / name,
            total=settings.num_steps,
        )
        for name, choice in METHODS.items()
    ]


def start(folder: Path) -> tuple[str, ...]:
    """Name what a PPO run on `reviews` starts from, as flags."""
    task = folder / "task"
    return (
        *(f"--model={folder / 'sft'}", f"--reward_model={folder / 'reward'}"),
        *(f"--data.path={task / 'prompts.jsonl'}", f"--data.eval_path={task / 'prompts_eval.jsonl'}"),
    )


def tell_accuracy(folder: Path, console: Console) -> None:
    """Say how good the reward model is on held-out pairs, and warn where that is too little."""
    accuracy = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["eval_accuracy"]
    console.print(f"[bold]reward[/] held-out pair accuracy {accuracy:.3f}", highlight=False)
    if accuracy < LEAST_ACCURACY:
        console.print(
            f"[bold red]warning[/] that is less than {LEAST_ACCURACY}: what follows optimises a poor reward model"
        )
