"""Learning curves read from run folders, and runs gathered by method."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from apportion.train.run import CONFIG, METRICS, is_cut_off, read_records, read_settings


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What one run recorded.

    Attributes:
        label: Name of its folder.
        folder: Where it lies.
        settings: Its configuration by dotted name, without `output_dir` and `resume`.
        records: One dictionary an update, in order; `step` is the number of updates done.
        cut_off: Whether the last line lacks its end: the run was killed in it, or is writing now.
    """

    label: str
    folder: Path
    settings: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    cut_off: bool

    @property
    def seed(self) -> Any:
        """The seed, of several the one least deep in the configuration; None if there is none."""
        return next((self.settings[key] for key in sorted(self.settings, key=_depth) if _is_seed(key)), None)

    def steps(self, name: str) -> Int[np.ndarray, " N"]:
        """Return the updates at which a metric was recorded."""
        return np.array([record["step"] for record in self.records if name in record], dtype=np.int64)

    def values(self, name: str) -> Float[np.ndarray, " N"]:
        """Return a metric at each of its steps; NaN where it was not finite."""
        return np.array([record[name] for record in self.records if name in record], dtype=np.float64)

    def spent(self, name: str, steps: Iterable[int]) -> Float[np.ndarray, " N"]:
        """Return what was spent, such as `samples` or `seconds`, when each of the steps was done; zero at step 0.

        Raises:
            ValueError: If a step does not say.
        """
        by_step = {record["step"]: record for record in self.records}
        lacking = [step for step in steps if step > 0 and name not in by_step[step]]
        if lacking:
            raise ValueError(f"{self.folder / METRICS}: step {lacking[0]} does not say {name!r}")
        return np.array([by_step[step].get(name, 0.0) for step in steps], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: The folder name of a single run, or what the folder names of several have in common.
        runs: At least one, in the order given.
    """

    label: str
    runs: tuple[RecordedRun, ...]

    def has(self, name: str) -> bool:
        """Tell whether any of the runs recorded a metric."""
        return any(len(run.steps(name)) for run in self.runs)

    def steps(self, name: str) -> Int[np.ndarray, " N"]:
        """Return the updates at which a metric was recorded, the same for every run (see `check_grid`)."""
        return self.runs[0].steps(name)

    def values(self, name: str) -> Float[np.ndarray, "S N"]:
        """Return a metric, (seeds, steps)."""
        return np.stack([run.values(name) for run in self.runs])

    def spent(self, name: str, steps: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Return what was spent when each step was done, mean over the seeds."""
        return np.mean([run.spent(name, steps.tolist()) for run in self.runs], axis=0)


def read_run(folder: Path) -> RecordedRun:
    """Read one run folder.

    Raises:
        FileNotFoundError: If it is not a run folder.
        ValueError: If it recorded nothing, or its lines are not in the order of the updates.
    """
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}")
    records = read_records(folder / METRICS)
    if not records:
        raise ValueError(f"{folder / METRICS} is empty: the run has recorded nothing yet")
    steps = [record["step"] for record in records]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(
            f"{folder / METRICS}: the steps do not increase; two runs may have written "
            "into it, or it is no run of `apportion ppo`"
        )
    return RecordedRun(
        label=folder.resolve().name,
        folder=folder,
        settings=read_settings((folder / CONFIG).read_text(encoding="utf-8")),
        records=tuple(records),
        cut_off=is_cut_off(folder / METRICS),
    )


def group_by_method(runs: Sequence[RecordedRun]) -> list[Method]:
    """Gather the runs whose configurations differ only in a seed, in the order in which each method first appears.

    Raises:
        ValueError: If two runs have the same configuration and the same seeds: they are one experiment, not two.
    """
    groups: dict[str, list[RecordedRun]] = {}
    seen: dict[str, RecordedRun] = {}
    for run in runs:
        whole = _key(run.settings)
        if whole in seen:
            raise ValueError(f"{seen[whole].folder} and {run.folder} have the same configuration and seed; give one")
        seen[whole] = run
        groups.setdefault(_key({k: v for k, v in run.settings.items() if not _is_seed(k)}), []).append(run)
    labels = _distinct([_common_label(group) for group in groups.values()], list(groups.values()))
    return [Method(label=label, runs=tuple(group)) for label, group in zip(labels, groups.values(), strict=True)]


def check_grid(methods: Sequence[Method], name: str) -> None:
    """Refuse runs that recorded a metric at different steps; methods that never recorded it are left aside.

    Raises:
        ValueError: If two runs differ, with where each recorded it.
    """
    runs = [run for method in methods if method.has(name) for run in method.runs]
    for run in runs[1:]:
        first, other = runs[0].steps(name), run.steps(name)
        if not np.array_equal(first, other):
            raise ValueError(
                f"{name} was recorded at {_described(first)} in {runs[0].folder} but at {_described(other)} in "
                f"{run.folder}; compare runs of the same length and eval_steps"
            )


def differing_settings(methods: Sequence[Method]) -> dict[str, list[Any]]:
    """Return each setting, seeds aside, that is not the same in all methods, with its value in each."""
    settings = [method.runs[0].settings for method in methods]
    keys = {key: None for each in settings for key in each if not _is_seed(key)}
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _described(steps: Int[np.ndarray, " N"]) -> str:
    if len(steps) == 0:
        return "no update"
    if len(steps) <= 4:
        return "updates " + ", ".join(map(str, steps))
    return f"{len(steps)} updates ({steps[0]}, {steps[1]}, ... {steps[-1]})"


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def _depth(key: str) -> int:
    return key.count(".")


def _common_label(runs: Sequence[RecordedRun]) -> str:
    if len(runs) == 1:
        return runs[0].label
    # "ppo-seed1", "ppo_1", "ppo-s1" and "ppo.1" are all called "ppo"; a folder "seed1" goes by that above it.
    stems = {re.sub(r"([-_. =]*(seed|run)|[-_. ]s)?[-_. =]*\d+$", "", run.label) for run in runs}
    if len(stems) > 1:
        return f"{runs[0].label} and {len(runs) - 1} more"
    return stems.pop() or runs[0].folder.resolve().parent.name


def _distinct(labels: list[str], groups: Sequence[Sequence[RecordedRun]]) -> list[str]:
    """Put the parent folder before labels that occur twice, and a number after those that still do."""
    parents = [group[0].folder.resolve().parent.name for group in groups]
    longer = [
        f"{parent}/{label}" if labels.count(label) > 1 else label for parent, label in zip(parents, labels, strict=True)
    ]
    return [
        f"{label} ({longer[:index].count(label) + 1})" if longer.count(label) > 1 else label
        for index, label in enumerate(longer)
    ]
