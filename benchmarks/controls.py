"""Tune four methods alike on the task `reviews`, run them and the controls over fresh seeds, and report what helps.

    python benchmarks/controls.py [--folder runs/controls] [--jobs 2] [--hours H] [--only NAME ...]
        [--start START] [--write]

All runs share one fine-tuned model and one reward model. First each method is tuned on one seed over the same grid;
then it is run with fresh seeds at its best settings and at lam 0.95 as in the papers, and so is each control
(`apportion recipes`). The best settings are those with the highest held-out score under the reward model, and with the
highest objective, the score less its KL penalty, which PPO maximises; the oracle is what a user has not. Finished runs
are kept as lines of `benchmarks/results/controls-runs.jsonl`, and are not done again; those of another start, which
another machine makes of the same seed, count in the columns "all starts" alone. After `--hours` no further run is
begun. With `--only` nothing is tuned, and only these controls are run, and what they stand beside, at the papers'
setting. With `--write` the report on what is there goes to `benchmarks/results/controls-START.md`, START the
fingerprint of the two models; what stands under its last heading is written by hand and kept: also the machine of the
runs. With `--start` nothing is run; the report is on the runs of that start.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from apportion import cli
from apportion.control import beside, controls
from apportion.evaluate.statistics import at_position, estimate, parity
from apportion.quickstart import claim, prepare, start
from apportion.train.run import read_records

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = RESULTS / "controls-runs.jsonl"
READING = "## What it says"
PREAMBLE = """\
Held-out means (256 prompts); interquartile means over seeds with bootstrap intervals of 95 %. The score is the reward
model's, which the policies were trained on; the oracle is the task's. The objective is the score in the units that are
trained on, less 0.05 times the KL of a response, whatever penalty a run had itself: it sets scores at unequal KL beside
each other. `updates to PPO`: until the final score of token PPO at the papers' lam (0.95, lr 0.0003) is reached, on
lines between evaluations, which come every 15 updates; `never` where the mean, or the end of the interval, does not
reach it. Lam `own` is that of the control's recipe. The learning rate, kl_coef 0.05 and all else are those of the
recipe `reviews`, for the papers' are for models a thousand times as large. `All starts` counts the pairs of every start
that has both runs, as one sample; the best settings are those of each start. Runs are kept as they are done,
over several commits."""

CRITERIA = ("score", "objective")
METHODS = ("ppo", "ma-ppo", "abc", "prefix-difference")
AT_BEST = ("attention-shuffled", "uniform")  # what is asked of ABC is asked where ABC is at its best, too
LAMS, RATES = (0.9, 0.95, 0.99, 1.0), (3e-4, 6e-4)
PAPER = (0.95, 3e-4)
KL_COEF = 0.05
TUNING_SEED, SEEDS = 100, (1, 2, 3, 4, 5)
STEPS, EVAL_STEPS = 60, 15
WEIGHTS = "model.safetensors"
SHOWN = ("oracle", "score", "objective", "kl", "length")
POOLED = ("oracle", "objective")  # scores of two reward models have no common unit
POOLED_HEAD = (*(f"{name}, all starts" for name in POOLED), "pairs")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run.

    Attributes:
        name: A recipe under controls/.
        lam: Lambda of GAE; None for the recipe's.
        rate: Learning rate of the policy; the critic's stays at 1e-3.
        seed: Decides prompts and samples.
    """

    name: str
    lam: float | None
    rate: float
    seed: int

    @property
    def label(self) -> str:
        """Name of its folder and its log."""
        lam = "own" if self.lam is None else f"{self.lam:g}"
        return f"{self.name}-lam{lam}-lr{self.rate:g}-seed{self.seed}"

    def argv(self, folder: Path) -> list[str]:
        """The command that runs it, without `apportion`."""
        lam = () if self.lam is None else (f"--credit.advantage.lam={self.lam}",)
        return [
            *("ppo", "--config=reviews", f"--config=controls/{self.name}", *start(folder / "start"), *lam),
            *(f"--learning_rate={self.rate}", f"--num_steps={STEPS}", f"--seed={self.seed}", "--resume"),
            *(f"--eval_steps={EVAL_STEPS}", "--save_steps=0", f"--output_dir={folder / self.label}"),
        ]


PAPER_PPO = Trial(name="ppo", lam=PAPER[0], rate=PAPER[1], seed=0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is kept of a run: held-out means at some updates, and a fingerprint of the models that it began with."""

    trial: Trial
    start: str
    updates: list[float]
    score: list[float]
    oracle: list[float]
    kl: list[float]
    length: list[float]
    seconds: list[float]
    objective: list[float]
    commit: str

    @classmethod
    def of(cls, trial: Trial, start: str, folder: Path) -> "Curve":
        """Read a run folder."""
        records = [record for record in read_records(folder / "metrics.jsonl") if "eval/score" in record]
        keys = {"updates": "step", "score": "eval/score", "oracle": "eval/oracle", "kl": "eval/kl_sequence"}
        keys |= {"length": "eval/length", "seconds": "seconds"}
        found = {name: [record[key] for record in records] for name, key in keys.items()}
        scale = records[-1]["score/scale"]
        objective = [score * scale - KL_COEF * kl for score, kl in zip(found["score"], found["kl"], strict=True)]
        return cls(trial=trial, start=start, **found, objective=objective, commit=commit_now())


def read_starts() -> dict[str, dict[Trial, Curve]]:
    """Read the runs that are finished, by the models that they began with."""
    starts: dict[str, dict[Trial, Curve]] = {}
    for line in RECORDS.read_text().splitlines() if RECORDS.exists() else []:
        read = json.loads(line)
        curve = Curve(trial=Trial(**read.pop("trial")), **read)
        starts.setdefault(curve.start, {})[curve.trial] = curve
    return starts


def read_curves(start: str) -> dict[Trial, Curve]:
    """Read the runs that are finished and began with these models."""
    return read_starts().get(start, {})


def commit_now() -> str:
    """The commit that is checked out."""
    git = ("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def fingerprint(folder: Path) -> str:
    """Recognise a policy and a reward model; the same seed gives others where sums are rounded otherwise."""
    weights = (path.read_bytes() for path in (folder / "sft" / WEIGHTS, folder / "reward" / WEIGHTS))
    return hashlib.sha256(b"".join(weights)).hexdigest()[:12]


def tuning() -> list[Trial]:
    """The grid, on one seed."""
    return [Trial(name=name, lam=lam, rate=rate, seed=TUNING_SEED) for lam, rate, name in product(LAMS, RATES, METHODS)]


def best(name: str, curves: dict[Trial, Curve], key: str) -> Trial | None:
    """The setting of a method with the highest score, or objective, at the end; None while the grid has gaps."""
    grid = [trial for trial in tuning() if trial.name == name]
    if any(trial not in curves for trial in grid):
        return None
    return max(grid, key=lambda trial: getattr(curves[trial], key)[-1])


def fresh(curves: dict[Trial, Curve]) -> list[Trial]:
    """Methods at the papers' setting and at their best, and then the controls, over fresh seeds; seed by seed."""
    paper = [Trial(name=name, lam=PAPER[0], rate=PAPER[1], seed=0) for name in METHODS]
    tuned = [trial for name in METHODS for key in CRITERIA if (trial := best(name, curves, key)) is not None]
    others = [Trial(name=name, lam=None, rate=PAPER[1], seed=0) for name in controls() if name not in METHODS]
    if (abc := best("abc", curves, "score")) is not None:
        others += [replace(abc, name=name, seed=0) for name in AT_BEST]
    methods = dict.fromkeys([*paper, *(replace(trial, seed=0) for trial in tuned)])
    return [replace(trial, seed=seed) for group in (methods, others) for seed in SEEDS for trial in group]


def one(trial: Trial, folder: Path, until: float) -> Curve | None:
    """Do a run; None where its time is up before it begins."""
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    log = (folder / f"{trial.label}.log").open("a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        failed = cli.main(trial.argv(folder))
    if failed:
        raise RuntimeError(f"{trial.label} failed; see {folder / trial.label}.log")
    return Curve.of(trial, fingerprint(folder / "start"), folder / trial.label)


def run(trials: Iterable[Trial], folder: Path, jobs: int, until: float) -> None:
    """Do the runs that are not there, some at a time, and keep each when it is finished."""
    done = read_curves(fingerprint(folder / "start"))
    left = [trial for trial in trials if trial not in done]
    begin, finished = time.monotonic(), 0
    # Several runs to a process, for libraries take as long to load as eight updates.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(one, trial, folder, until) for trial in left]):
            if (curve := future.result()) is None:
                continue
            with RECORDS.open("a") as file:
                file.write(json.dumps(asdict(curve)) + "\n")
            finished += 1
            rest = (time.monotonic() - begin) / finished * (len(left) - finished) / 60
            told = f"{finished} of {len(left)}: {curve.trial.label}, oracle {curve.oracle[-1]:.2f}; {rest:.0f} min left"
            print(told, flush=True)


def tuning_table(curves: dict[Trial, Curve]) -> Iterator[str]:
    """Score and oracle at the end for each setting of the grid."""
    yield from ("## Tuning, seed 100: score (objective; oracle) at the end, the best score and objective in bold", "")
    settings = list(product(RATES, LAMS))
    yield "| method | " + " | ".join(f"lr {rate:g}, lam {lam:g}" for rate, lam in settings) + " |"
    yield "|---" * (len(settings) + 1) + "|"
    for name in METHODS:
        cells = []
        for rate, lam in settings:
            curve = curves.get(Trial(name=name, lam=lam, rate=rate, seed=TUNING_SEED))
            parts = (
                ("", "", "")
                if curve is None
                else (
                    *(_bold(curve, key, curves) for key in CRITERIA),
                    f"{curve.oracle[-1]:.2f}",
                )
            )
            cells.append("{} ({}; {})".format(*parts) if curve is not None else "")
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""


def _bold(curve: Curve, key: str, curves: dict[Trial, Curve]) -> str:
    """A number at the end, in bold where it is the method's best."""
    number = f"{getattr(curve, key)[-1]:.2f}"
    return f"**{number}**" if curve.trial == best(curve.trial.name, curves, key) else number


def fresh_table(curves: dict[Trial, Curve]) -> Iterator[str]:
    """Interquartile means over the fresh seeds that are there, and when each reached the final score of token PPO."""
    yield from ("## Fresh seeds", "", *_head("run", "lam", "lr", "seeds", *SHOWN, "updates to PPO", "seconds to PPO"))
    baseline = _over_seeds(PAPER_PPO, curves)
    for trial in dict.fromkeys(replace(trial, seed=0) for trial in fresh(curves)):
        if found := _over_seeds(trial, curves):
            numbers = [_plain([getattr(curve, name)[-1] for curve in found]) for name in SHOWN]
            yield _row(*_named(trial), str(len(found)), *numbers, *_parity(found, baseline))
    yield ""


def tuned_table(curves: dict[Trial, Curve], starts: Iterable[dict[Trial, Curve]]) -> Iterator[str]:
    """What each method has at its best over token PPO at its best, and when it reached that one's final score."""
    yield from ("## Each method at its best beside token PPO at its best", "")
    parity_head = ("updates to tuned PPO", "seconds to tuned PPO")
    yield from _head("run", "lam", "lr", "best by", "beside PPO of", *SHOWN, *parity_head, *POOLED_HEAD)
    for name, key in product(METHODS[1:], CRITERIA):
        own, ppo = best(name, curves, key), best("ppo", curves, key)
        if own is None or ppo is None or not (both := _pairs(own, ppo, curves)):
            continue
        told = _parity(_over_seeds(own, curves), _over_seeds(ppo, curves))
        bests = [(start, best(name, start, key), best("ppo", start, key)) for start in starts]
        pooled = [pair for start, one, two in bests if one and two for pair in _pairs(one, two, start)]
        cells = [*_differences(both, SHOWN), *told, *_differences(pooled, POOLED), str(len(pooled))]
        yield _row(*_named(own), key, f"lam {ppo.lam:g}, lr {ppo.rate:g}", *cells)
    yield ""


def _over_seeds(trial: Trial, curves: dict[Trial, Curve]) -> list[Curve]:
    """The runs of a setting with fresh seeds that are there."""
    return [curves[one] for seed in SEEDS if (one := replace(trial, seed=seed)) in curves]


def _pairs(trial: Trial, against: Trial, curves: dict[Trial, Curve]) -> list[tuple[Curve, Curve]]:
    """Two settings beside each other, for each seed that both have."""
    pairs = [(replace(trial, seed=seed), replace(against, seed=seed)) for seed in SEEDS]
    return [(curves[one], curves[two]) for one, two in pairs if one in curves and two in curves]


def _differences(pairs: list[tuple[Curve, Curve]], names: Iterable[str]) -> list[str]:
    """What the first of each pair has over the second at the end."""
    return [_plain([getattr(one, name)[-1] - getattr(two, name)[-1] for one, two in pairs]) for name in names]


def _named(trial: Trial) -> tuple[str, str, str]:
    """A setting as the first cells of its row."""
    return trial.name, "own" if trial.lam is None else f"{trial.lam:g}", f"{trial.rate:g}"


def _row(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def _head(*cells: str) -> tuple[str, str]:
    """The first lines of a table."""
    return _row(*cells), "|---" * len(cells) + "|"


def _plain(values: list[float]) -> str:
    """An interquartile mean with its interval."""
    found = estimate(np.array(values))
    return f"{found.value:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


def _parity(found: list[Curve], baseline: list[Curve]) -> tuple[str, ...]:
    """Updates and seconds until the score of PPO at the end is reached."""
    if not baseline:
        return "", ""
    position, draws = parity(*(np.array([curve.score for curve in curves]) for curves in (found, baseline)))
    places = np.array([position, *(() if draws is None else np.sort(draws)[[len(draws) // 40, -len(draws) // 40]])])
    spent = [np.mean([getattr(curve, name) for curve in found], axis=0) for name in ("updates", "seconds")]
    told = [
        ["never" if value == float("inf") else f"{value:.0f}" for value in at_position(places, each)] for each in spent
    ]
    return tuple(value[0] + (f" [{value[1]}, {value[2]}]" if len(value) > 1 else "") for value in told)


def paired_table(curves: dict[Trial, Curve], starts: Iterable[dict[Trial, Curve]]) -> Iterator[str]:
    """What each run has over the one that it stands beside, and over token PPO, seed by seed."""
    yield from ("## Differences between runs of the same seeds", "")
    yield from _head("run", "lam", "lr", "beside", *SHOWN, *POOLED_HEAD)
    for trial in dict.fromkeys(replace(trial, seed=0) for trial in fresh(curves)):
        own = "ppo" if trial.name in METHODS else beside(trial.name) or "ppo"
        for other in dict.fromkeys((own, "ppo")):
            against = Trial(name=other, lam=PAPER[0] if other in METHODS else None, rate=PAPER[1], seed=0)
            if _at_best(trial) and other in METHODS:
                against = replace(trial, name=other)
            if trial == against or not (both := _pairs(trial, against, curves)):
                continue
            pooled = [pair for start in starts for pair in _pairs(*_in_start(trial, against, start), start)]
            cells = [*_differences(both, SHOWN), *_differences(pooled, POOLED), str(len(pooled))]
            yield _row(*_named(trial), other, *cells)
    yield ""


def _at_best(trial: Trial) -> bool:
    """Tell whether a control is asked where its method is at its best."""
    return trial.name in AT_BEST and trial.lam is not None


def _in_start(trial: Trial, against: Trial, curves: dict[Trial, Curve]) -> tuple[Trial, Trial]:
    """The same question to another start: a control at its method's best is asked at the best of that start."""
    abc = best("abc", curves, "score")
    if not _at_best(trial) or abc is None:
        return trial, against
    return replace(abc, name=trial.name, seed=0), replace(abc, name=against.name, seed=0)


def report(curves: dict[Trial, Curve], starts: Iterable[dict[Trial, Curve]]) -> Iterator[str]:
    """Write the report line by line."""
    planned = [*tuning(), *fresh(curves)]
    yield from ("# Controls on the task `reviews`, T = 160", "")
    yield f"{sum(trial in curves for trial in planned)} of {len(planned)} runs of {STEPS} updates are there."
    yield PREAMBLE
    yield from ("", f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`")
    commits = ", ".join(dict.fromkeys(curves[trial].commit for trial in planned if trial in curves))
    yield f"- commits of the runs: {commits}; Python {platform.python_version()}; date: {datetime.now(UTC):%Y-%m-%d}"
    yield from (f"- start: {next(iter(curves.values())).start}; one thread a run", "")
    tuned = any(trial in curves for trial in tuning())
    yield from tuning_table(curves) if tuned else ()
    yield from fresh_table(curves)
    yield from tuned_table(curves, starts) if tuned else ()
    yield from paired_table(curves, starts)


def kept(path: Path) -> str:
    """What was written by hand in the last report on a start, from its heading on."""
    text = path.read_text() if path.exists() else ""
    return text[text.index(READING) :] if READING in text else f"{READING}\n"


def run_all(arguments: argparse.Namespace) -> str:
    """Do what is not there yet; return the fingerprint of the start."""
    folder, jobs, until = arguments.folder, arguments.jobs, time.time() + 3600 * arguments.hours
    claim(folder, "control", {"start_seed": 0, "num_steps": STEPS})
    prepare(folder / "start", 0, jobs, Console())
    start_print = fingerprint(folder / "start")
    if arguments.only:
        named = {*arguments.only, *map(beside, arguments.only)}
        run([trial for trial in fresh({}) if trial.name in named], folder, jobs, until)
        return start_print
    run(tuning(), folder, jobs, until)
    run(fresh(read_curves(start_print)), folder, jobs, until)
    return start_print


def main() -> None:
    parser = argparse.ArgumentParser(description="What helps on the task reviews, with controls.")
    parser.add_argument("--folder", type=Path, default=Path("runs/controls"), help="where the runs go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--hours", type=float, default=24.0, help="begin no run after so long")
    parser.add_argument("--only", nargs="+", choices=controls(), help="run these controls and what they stand beside")
    parser.add_argument("--start", help="report on the runs of this start (a fingerprint), and run nothing")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    arguments = parser.parse_args()
    start_print = run_all(arguments) if arguments.start is None else arguments.start
    starts = read_starts()
    if start_print not in starts:
        parser.error(f"{RECORDS.name} has no runs of the start {start_print!r}, only of {', '.join(starts)}")
    text = "\n".join(report(starts[start_print], starts.values()))
    print(text)
    if arguments.write:
        path = RESULTS / f"controls-{start_print}.md"
        path.write_text(text.rstrip() + "\n\n" + kept(path))


if __name__ == "__main__":
    main()
