"""What a comparison of runs comes to: one row of estimates a method, and what must be said about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np

from apportion.evaluate.curves import Method, RecordedRun, check_grid, group_by_method, read_run
from apportion.evaluate.statistics import (
    Estimate,
    at_position,
    estimate,
    interquartile_mean,
    interval,
    parity,
    smoothed,
)

SCORES = ("eval/score", "score/mean")
KLS = ("eval/kl_sequence", "rollout/kl_sequence")
LENGTHS = ("eval/length", "rollout/length")
# Held-out metrics that have a column of their own, or follow from others; whatever else is eval/* is another reward.
KNOWN = frozenset({*SCORES, *KLS, *LENGTHS, "eval/objective", "eval/eos_rate", "eval/entropy", "eval/kl", "eval/std"})
SPENT = ("updates", "samples", "seconds")
FEW_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods side by side; the first is the baseline.

    Attributes:
        methods: At least one.
        score: Metric that is compared: held-out if every run has it at two steps or more, else that of training.
        kl: Metric of the divergence a response, None if no run has it.
        length: Metric of the response length, None if no run has it.
        others: Held-out rewards that the policy was not trained on.
        window: Steps of the centred moving average that parity is read from.
        level: Final level of the baseline, the last value of its smoothed curve.
        rows: For each method its estimates, by the title of their column.
        notes: What the numbers cannot tell, in whole sentences.
    """

    methods: tuple[Method, ...]
    score: str
    kl: str | None
    length: str | None
    others: tuple[str, ...]
    window: int
    level: float
    rows: tuple[dict[str, Estimate], ...]
    notes: tuple[str, ...]


def read_comparison(folders: Sequence[Path]) -> Comparison:
    """Read run folders and compare them.

    Raises:
        FileNotFoundError: If one of them is not a run folder.
        ValueError: If there is none, one is empty, two are the same, or they recorded at different steps.
    """
    if not folders:
        raise ValueError("no run was given; name at least one run folder")
    return comparison(group_by_method([read_run(folder) for folder in folders]))


def comparison(methods: Sequence[Method]) -> Comparison:
    """Compare methods with the first of them; see `Comparison`."""
    score = _first_shared(methods, SCORES, least=2)
    if score is None:
        raise ValueError(f"no score to compare: not every run recorded {' or '.join(SCORES)} at two steps or more")
    kl, length = _first_shared(methods, KLS), _first_shared(methods, LENGTHS)
    others = tuple(
        sorted({name for run in _runs(methods) for record in run.records for name in record if _other(name)})
    )
    for name in (score, kl, length, *others):
        if name is not None:
            check_grid(methods, name)
    window = smoothing_window(len(methods[0].steps(score)))
    baseline = smoothed(methods[0].values(score), window)
    rows = [
        {
            f"{_title(score)}, start": _at(method, score, 0),
            f"{_title(score)}, end": _at(method, score, -1),
            **{f"{_title(name)}, end": _at(method, name, -1) for name in others},
            "KL a response, end": _at(method, kl, -1),
            "length, end": _at(method, length, -1),
            **_parity(method, score, window, baseline),
            "seconds an update": estimate(np.array([_pace(run) for run in method.runs])),
        }
        for method in methods
    ]
    return Comparison(
        methods=tuple(methods),
        score=score,
        kl=kl,
        length=length,
        others=others,
        window=window,
        level=float(interquartile_mean(baseline)[-1]),
        rows=tuple(rows),
        notes=tuple(_notes(methods, score, [name for name in (kl, length, *others) if name], rows)),
    )


def smoothing_window(points: int) -> int:
    """Return the steps averaged for a curve of so many points: a tenth of them, odd; a short curve is left as it is."""
    return points // 10 // 2 * 2 + 1


def _first_shared(methods: Sequence[Method], names: Iterable[str], least: int = 1) -> str | None:
    return next((name for name in names if all(len(run.steps(name)) >= least for run in _runs(methods))), None)


def _runs(methods: Sequence[Method]) -> list[RecordedRun]:
    return [run for method in methods for run in method.runs]


def _other(name: str) -> bool:
    return name.startswith("eval/") and name not in KNOWN


def _title(name: str) -> str:
    return {"eval/score": "score", "score/mean": "training score"}.get(name, name.removeprefix("eval/"))


def _at(method: Method, name: str | None, index: int) -> Estimate:
    if name is None or not method.has(name):
        return Estimate(value=nan)
    return estimate(method.values(name)[:, index])


def _parity(method: Method, score: str, window: int, baseline: np.ndarray) -> dict[str, Estimate]:
    steps = method.steps(score)
    position, draws = parity(smoothed(method.values(score), window), baseline)
    estimates = {}
    for name in SPENT:
        spent = steps.astype(np.float64) if name == "updates" else method.spent(name, steps)
        value = float(at_position(np.array([position]), spent)[0])
        low, high = (None, None) if draws is None else interval(at_position(draws, spent)[:, None])
        estimates[f"{name} to parity"] = Estimate(
            value=value, low=None if low is None else float(low[0]), high=None if high is None else float(high[0])
        )
    return estimates


def _pace(run: RecordedRun) -> float:
    last = run.records[-1]
    return float(run.spent("seconds", [last["step"]])[0]) / last["step"] if last["step"] else nan


def _notes(
    methods: Sequence[Method], score: str, names: Sequence[str], rows: Sequence[dict[str, Estimate]]
) -> Iterable[str]:
    if score != "eval/score":
        yield "Not every run holds an evaluation on held-out prompts, so the score is that of the training prompts."
    yield from _notes_on_seeds(methods)
    yield from _notes_on_parity(methods, _title(score), rows)
    for method in methods:
        for name in names:
            if not method.has(name):
                yield f"{method.label} did not record {name}."
    for run in _runs(methods):
        unknown = sum(int(np.isnan(run.values(name)).sum()) for name in (score, *names))
        if unknown:
            yield f"{run.folder} holds {unknown} values that are not finite; what depends on them is n/a."
        if run.cut_off:
            yield f"The last line of {run.folder} is cut off: the run was killed in it, or is writing. It is left out."


def _notes_on_seeds(methods: Sequence[Method]) -> Iterable[str]:
    def named(matches: Callable[[int], bool]) -> str:
        return ", ".join(method.label for method in methods if matches(len(method.runs)))

    if single := named(lambda seeds: seeds == 1):
        yield f"A single seed has no interval: {single}. Differences to it may be chance."
    if few := named(lambda seeds: 1 < seeds < FEW_SEEDS):
        yield f"Intervals from fewer than {FEW_SEEDS} seeds are rough, mostly too narrow: {few}."


def _notes_on_parity(methods: Sequence[Method], title: str, rows: Sequence[dict[str, Estimate]]) -> Iterable[str]:
    if rows[0][f"{title}, end"].value <= rows[0][f"{title}, start"].value:
        yield f"{methods[0].label} ended no higher than it started: to reach its level says nothing."
    never = [m.label for m, row in zip(methods, rows, strict=True) if row["updates to parity"].value == float("inf")]
    if never:
        yield f"Within their updates these never reached the final level of {methods[0].label}: {', '.join(never)}."
