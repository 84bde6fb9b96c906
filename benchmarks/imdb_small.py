"""Run the recipe `imdb-small` on real text: fine-tuning, reward model, token PPO, MA-PPO and ABC, and compare them.

    python benchmarks/imdb_small.py [--data ../shared/data] [--folder runs/imdb-small] [--seed 0] [--jobs 2]
                                    [--note TEXT] [--write]

Every stage is an ordinary command of `apportion` in one thread, `--jobs` at a time, and printed. A stage that is
complete is not done again; `--note` adds to the report what a reader has to know of that. The policies answer the
held-out prompts, from the same random numbers, by `apportion generate`. With `--write` the report goes to
`benchmarks/results/imdb-small-DATE.md`.

The data are files with the layout of `--data`: stories260k/ (a model), movie_reviews/movie_reviews.jsonl.gz (whole
reviews) and rt_polarity/rt_polarity.jsonl.gz (labelled sentences).
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# What each method changes of the recipe: one choice on an axis.
METHODS: dict[str, tuple[str, ...]] = {
    "ppo": ("--credit.termination", "EveryToken"),
    "ma-ppo": ("--credit.termination", "FixedNgram", "--credit.termination.n", "5"),
    "abc": (
        *("--credit.termination", "EveryToken"),
        *("--credit.redistribution", "Attention", "--credit.redistribution.beta", "0.8"),
    ),
}
TITLES = {"sft": "fine-tuned, before PPO", "ppo": "token PPO", "ma-ppo": "MA-PPO, n = 5", "abc": "ABC, beta = 0.8"}
SHOWN = 3  # prompts whose responses the report shows


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command.

    Attributes:
        name: Also the name of its log.
        argv: The command, without `apportion`.
        proof: What is there when it is complete.
    """

    name: str
    argv: tuple[str, ...]
    proof: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything lies, and the commands in waves; those of a wave do not wait for each other."""

    data: Path
    folder: Path
    seed: int

    def waves(self) -> Iterator[list[Stage]]:
        """List the commands."""
        reviews = ("--data.path", str(self.data / "movie_reviews" / "movie_reviews.jsonl.gz"))
        sentences = ("--data.path", str(self.data / "rt_polarity" / "rt_polarity.jsonl.gz"))
        stories, scorer = ("--model", str(self.data / "stories260k")), ("--reward_model", str(self.folder / "reward"))
        sft = str(self.folder / "sft")
        yield [
            self._training("reward", "reward", (*stories, *sentences), "metrics.json"),
            self._training("sft", "sft", (*stories, *reviews), "metrics.json"),
        ]
        yield [
            self._training("ppo", name, ("--model", sft, *scorer, *reviews, *choice), "model/config.json")
            for name, choice in METHODS.items()
        ]
        yield [self._answering(name, ("--ref_model", sft, *scorer, *reviews)) for name in TITLES]
        report = self.folder / "report"
        runs = tuple(str(self.folder / name) for name in METHODS)
        yield [Stage(name="compare", argv=("compare", *runs, "--output", str(report)), proof=report / "report.md")]

    def _training(self, command: str, name: str, settings: tuple[str, ...], proof: str) -> Stage:
        place = ("--output_dir", str(self.folder / name), "--seed", str(self.seed), "--resume")
        return Stage(
            name=name, argv=(command, "--config", "imdb-small", *settings, *place), proof=self.folder / name / proof
        )

    def _answering(self, name: str, settings: tuple[str, ...]) -> Stage:
        model = self.folder / name if name == "sft" else self.folder / name / "model"
        argv = ("generate", "--config", "imdb-small", "--model", str(model), *settings)
        output = self.answers(name)
        return Stage(name=f"generate-{name}", argv=(*argv, "--output", str(output)), proof=output)

    def answers(self, name: str) -> Path:
        """Say where the responses of a policy go."""
        return self.folder / f"answers-{name}.jsonl"


def run(stages: Sequence[Stage], folder: Path, jobs: int) -> None:
    """Run the commands of a wave that are not complete, some at a time; stop with what one of them said last."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda stage: run_one(stage, folder), stages))


def run_one(stage: Stage, folder: Path) -> None:
    done = stage.proof.exists()
    print(
        f"{datetime.now(UTC):%H:%M:%S} {'done before: ' if done else ''}apportion {shlex.join(stage.argv)}", flush=True
    )
    if done:
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "apportion", *stage.argv]
    log = folder / f"{stage.name}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment).returncode
    if code:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        raise SystemExit(f"{stage.name} failed with exit status {code}: {said[-1]} (see {log})")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_error(values: Iterable[float]) -> str:
    """The mean and its standard error over prompts."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def outcomes(plan: Plan) -> Iterator[tuple[str, ...]]:
    """A row for each policy: what its responses to the held-out prompts are worth."""
    before = records(plan.answers("sft"))
    for name, title in TITLES.items():
        rows = records(plan.answers(name))
        rise = [row["score"] - old["score"] for row, old in zip(rows, before, strict=True)]
        longest = max(row["length"] for row in before)
        alike = [r for r, *pair in zip(rise, rows, before, strict=True) if all(x["length"] == longest for x in pair)]
        seconds = "" if name == "sft" else f"{records(plan.folder / name / 'metrics.jsonl')[-1]['seconds']:.0f}"
        yield (
            title,
            with_error(row["score"] for row in rows),
            "" if name == "sft" else with_error(rise),
            "" if name == "sft" else f"{with_error(alike)} ({len(alike)})",
            f"{statistics.mean(row['kl'] for row in rows):.1f}",
            f"{statistics.mean(row['length'] for row in rows):.1f}",
            f"{sum(value > 0 for value in rise) / len(rise):.0%}" if name != "sft" else "",
            seconds,
        )


def by_length(plan: Plan) -> Iterator[str]:
    """Say how much of a rise may be length: the reward before PPO of responses at the limit, and of those that end."""
    rows = records(plan.answers("sft"))
    longest = max(row["length"] for row in rows)
    cut = [row["score"] for row in rows if row["length"] == longest]
    ended = [row["score"] for row in rows if row["length"] < longest]
    yield f"Length has its part in the reward: before PPO the {len(cut)} responses of {longest} tokens have"
    yield f"{with_error(cut)}, the {len(ended)} shorter ones {with_error(ended)}. So the rise is also told over the"
    yield "prompts to which both policies wrote a response of that length."
    yield ""


def course(plan: Plan) -> Iterator[tuple[str, ...]]:
    """A row for each evaluation during training: reward and divergence of each method."""
    runs = [
        {record["step"]: record for record in records(plan.folder / name / "metrics.jsonl") if "eval/score" in record}
        for name in METHODS
    ]
    for step in runs[0]:
        cells = (f"{r[step]['eval/score']:.2f} at {r[step]['eval/kl_sequence']:.1f}" for r in runs)
        yield (str(step), *cells)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Write a table in markdown."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    yield from ("| " + " | ".join(line) + " |" for line in lines)
    yield ""


def circumstances() -> Iterator[str]:
    """State the command, the commit, the machine and the hour."""
    git = ("git", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--short", "src"], capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].split(":")[1].strip() if models else platform.processor()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {commit}{' with changes in src' if changed else ''}"
    yield f"- machine: {model}, {os.cpu_count()} cores, one thread a command; Python {platform.python_version()}"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load average (1, 5, 15 minutes) at the end: {load}"
    yield ""


def report(plan: Plan, notes: Sequence[str]) -> Iterator[str]:
    """Write the report line by line."""
    sft, scorer = (json.loads((plan.folder / name / "metrics.json").read_text()) for name in ("sft", "reward"))
    yield "# Recipe imdb-small: movie reviews, continued positively"
    yield ""
    yield "stories260k (260,032 parameters, 512 tokens) fine-tuned on movie_reviews; a reward model from the same start"
    yield "on pairs of rt_polarity; prompts of 2 to 8 tokens, 24 to 64 new tokens."
    yield ""
    yield from circumstances()
    yield f"- fine-tuning: held-out loss {sft['eval_loss']:.2f} nats a token, {sft['train_runtime']:.0f} s"
    yield f"- reward model: accuracy {scorer['eval_accuracy']:.3f} on held-out pairs, which max_length leaves, about"
    yield f"  half of them cut; {scorer['train_runtime']:.0f} s"
    yield "- learning rate, kl_coef and the start of the reward model were chosen in a few trials that looked at"
    yield "  the same held-out prompts and pairs"
    yield from (f"- {text}" for text in notes)
    yield ""
    yield "## Responses to held-out prompts"
    yield ""
    count = len(records(plan.answers("sft")))
    yield f"{count} prompts, one response each, drawn from the same random numbers. Means, with the standard error over"
    yield "prompts; one seed. KL to the fine-tuned policy in nats, summed over a response; seconds of training, without"
    yield "evaluation."
    yield ""
    yield from by_length(plan)
    head = (
        "policy",
        "reward",
        "rise over fine-tuned",
        "rise at equal length",
        "KL",
        "tokens",
        "prompts that rose",
        "seconds",
    )
    yield from table(head, outcomes(plan))
    yield "## During training: reward at KL, on the same held-out prompts"
    yield ""
    yield from table(("update", *(TITLES[name] for name in METHODS)), course(plan))
    yield from comparison(plan)
    yield from samples(plan)
    yield from commands(plan)


def comparison(plan: Plan) -> Iterator[str]:
    """Copy the table of `apportion compare`."""
    yield "## Table of `apportion compare`"
    yield ""
    lines = (plan.folder / "report" / "report.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    yield from (*lines[first:last], "")


def samples(plan: Plan) -> Iterator[str]:
    """Show what each policy wrote to the first prompts."""
    yield "## Samples"
    yield ""
    answers = {title: records(plan.answers(name))[:SHOWN] for name, title in TITLES.items()}
    for number in range(SHOWN):
        yield "```text"
        yield next(iter(answers.values()))[number]["prompt"]
        for title, rows in answers.items():
            yield f"  [{title}, {rows[number]['score']:.2f}] {' '.join(rows[number]['response'].split())}"
        yield "```"
    yield ""


def commands(plan: Plan) -> Iterator[str]:
    """List the commands."""
    yield "## Commands"
    yield ""
    yield "```sh"
    yield from (f"apportion {shlex.join(stage.argv)}" for wave in plan.waves() for stage in wave)
    yield "```"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the recipe imdb-small on real text.")
    parser.add_argument("--data", default="../shared/data", help="folder of the model and the data")
    parser.add_argument("--folder", default="runs/imdb-small", help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="of every training command")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report; may be repeated")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    arguments = parser.parse_args()
    plan = Plan(data=Path(arguments.data), folder=Path(arguments.folder), seed=arguments.seed)
    plan.folder.mkdir(parents=True, exist_ok=True)
    for wave in plan.waves():
        run(wave, plan.folder, arguments.jobs)
    text = "\n".join(report(plan, arguments.note)).rstrip() + "\n"
    print(text)
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / f"imdb-small-{datetime.now(UTC):%Y-%m-%d}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
