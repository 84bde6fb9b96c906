"""`apportion pass-at-k`: how many programming problems a model solves, in k tries."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from apportion.data.answers import answer
from apportion.data.apps import Apps, CodeContests, Form
from apportion.data.files import write_jsonl
from apportion.data.humaneval import HumanEval
from apportion.data.mbpp import Mbpp
from apportion.data.problem_sets import ProblemSet
from apportion.data.problems import Problem, Tests
from apportion.evaluate.contents import digest_of_model, digest_of_problems
from apportion.evaluate.journal import progress, written
from apportion.evaluate.pass_rates import Solved, by_difficulty, table_of
from apportion.evaluate.sampler import Sampler
from apportion.evaluate.samples import Sample, draw_samples, read_samples
from apportion.sampling import Sampling
from apportion.score.program_tests import details_of
from apportion.score.programs import Outcome, run_many, run_tests
from apportion.score.sandbox import Backend, BackendName, Limits, backend_named
from apportion.train.launch import check_model
from apportion.train.run import check_place, write_atomically

BENCHMARKS: dict[str, type[ProblemSet]] = {
    "humaneval": HumanEval,
    "mbpp": Mbpp,
    "apps": Apps,
    "code_contests": CodeContests,
}


@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """What `apportion pass-at-k` needs to know. Give `samples`, or a `model` that they are drawn from.

    Attributes:
        benchmark: Which problems.
        output: JSON lines, an outcome a sample; by default `FILE.outcomes.jsonl` beside the samples `FILE.jsonl`. A run
            that was stopped goes on with the same command. Beside it stand `.problems.jsonl`, `.summary.json`, and
            `.samples.jsonl` with what was drawn, under its name.
        problems: File, folder or hub name of the benchmark; by default its name on the hub.
        split: Which split of it; by default the test split where there is one.
        num_problems: Take only so many problems, from the first; None for all.
        samples: JSON lines of `task_id` and `completion`, the form of HumanEval, compressed by gzip or not.
        only_sampled: Leave problems without any sample out; otherwise they count as not solved.
        k: The k of pass@k; no more than the samples of a problem.
        limits: What a program may use.
        backend: How boxes are made: "bubblewrap"; or "unsafe-subprocess", which protects nothing.
        workers: Boxes at a time; None for as many as there are cores.
        model: The policy: a folder or a hub name.
        num_samples: Completions drawn for each problem.
        sampling: What they are drawn from.
        form: Of the prompts of APPS: the bare question, or its own.
        batch_size: Responses that are sampled at once.
        max_prompt_length: Problems whose prompts have more tokens get no samples, and are counted.
        seed: Decides what is drawn.
        bf16: Compute in bfloat16 where it is safe.

    Raises:
        ValueError: If a number is out of range, both or neither of `samples` and `model` are given, or a model without
            an output.
    """

    benchmark: Literal["humaneval", "mbpp", "apps", "code_contests"]
    output: str | None = None
    problems: str | None = None
    split: str | None = None
    num_problems: int | None = None
    samples: str | None = None
    only_sampled: bool = False
    k: list[int] = field(default_factory=lambda: [1])
    limits: Limits = field(default_factory=Limits)
    backend: BackendName = "bubblewrap"
    workers: int | None = None
    model: str | None = None
    num_samples: int = 10
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512))
    form: Form = "question"
    batch_size: int = 32
    max_prompt_length: int = 1024
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("num_problems", "workers", "num_samples", "batch_size", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k is {self.k}; give numbers of at least 1")
        if (self.samples is None) == (self.model is None):
            raise ValueError(f"samples is {self.samples} and model {self.model}; give exactly one of them")
        if self.output is None and self.model is not None:
            raise ValueError("output is None; with a model give --output FILE.jsonl, where the outcomes go")
        if self.model is not None and max(self.k) > self.num_samples:
            raise ValueError(f"k is {max(self.k)}, more than the {self.num_samples} of num_samples; change one of them")

    @property
    def ks(self) -> list[int]:
        """The k of pass@k, each once, in order."""
        return sorted(set(self.k))

    @property
    def outcomes(self) -> Path:
        """Where outcomes go."""
        if self.output is not None:
            return Path(self.output)
        given = Path(str(self.samples))
        return given.with_name(f"{given.name.removesuffix('.gz').removesuffix('.jsonl')}.outcomes.jsonl")

    def problem_set(self) -> ProblemSet:
        """Make the benchmark's source."""
        chosen: dict[str, Any] = {} if self.problems is None else {"path": self.problems}
        return Apps(form=self.form, **chosen) if self.benchmark == "apps" else BENCHMARKS[self.benchmark](**chosen)


def measure_pass_at_k(settings: PassAtK) -> None:
    """Run samples against the tests of their problems; write outcomes as they come, and print pass@k.

    A problem without any sample counts as not solved, and is told.

    Raises:
        FileNotFoundError: If the problems, the samples or the model are not there.
        ValueError: If they cannot be read or do not fit each other, or the output is of other settings or samples.
        SandboxError: If no box can be made.
    """
    files = _Files(settings.outcomes, settings.samples)
    if settings.model is not None:
        check_model(settings.model)
    source = settings.problem_set()
    splits = source.splits()
    split = settings.split or ("test" if "test" in splits else splits[0])
    every = source.problems(split)
    problems = {problem.task_id: problem for problem in every[: settings.num_problems]}
    names = {problem.task_id for problem in every}
    given = None if settings.samples is None else read_samples(Path(settings.samples), names, _remedy(split, splits))
    _check_counts(given or [], problems, settings.ks)
    backend = backend_named(settings.backend)
    run_tests("", Tests(inputs=[""], outputs=[""]), settings.limits, backend=backend)  # tells where no box can be made
    files.open(_decisive(settings, source, list(problems.values())))
    if given is None:
        _draw(settings, source, list(problems.values()), files.samples)
        given = read_samples(files.samples, names)
    samples = [sample for sample in given if sample.task_id in problems]
    records = _run(samples, problems, files.outcomes, settings, backend)
    _conclude(records, problems, files, settings)


class _Files:
    """The files of a run, by the name of the first."""

    def __init__(self, output: Path, given: str | None) -> None:
        stem = output.name.removesuffix(".jsonl")
        self.outcomes, self.given = output, given
        self.problems = output.with_name(f"{stem}.problems.jsonl")
        self.samples = output.with_name(f"{stem}.samples.jsonl") if given is None else Path(given)
        self.summary = output.with_name(f"{stem}.summary.json")
        if self.samples in (self.outcomes, self.problems):
            raise ValueError(f"samples and output would both be {self.samples}; choose another output")
        check_place(output.parent)

    def open(self, decisive: dict[str, Any]) -> None:
        """Begin, or go on with what the same settings began.

        Raises:
            ValueError: If something else is there.
        """
        ours = [self.outcomes, *([self.samples] if self.given is None else [])]
        there, remedy = [path for path in ours if path.exists()], "choose another output, or remove it"
        before = self._settings() if self.summary.exists() else None
        if there and before is None:
            raise ValueError(f"{there[0]} is there already, but not {self.summary} with its settings; {remedy}")
        if there and before is not None and before != decisive:
            names = sorted(name for name in before.keys() | decisive.keys() if before.get(name) != decisive.get(name))
            raise ValueError(f"{there[0]} is of other settings ({', '.join(names)}); {remedy}")
        if not there:
            self.outcomes.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.summary, json.dumps({"settings": decisive, "complete": False}, indent=2) + "\n")

    def _settings(self) -> dict[str, Any]:
        """Read what an earlier run says of itself."""
        try:
            return dict(json.loads(self.summary.read_text(encoding="utf-8"))["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.summary} is there already, and something else; choose another output") from error


def _remedy(split: str, splits: Sequence[str]) -> str:
    """Say how problems of other splits are taken, where there are some."""
    others = ["all"] if split != "all" and "all" in splits else [name for name in splits if name != split]
    return f" in the split {split}; for others give --split {' or '.join(others)}" if others else ""


def _decisive(settings: PassAtK, source: ProblemSet, problems: list[Problem]) -> dict[str, Any]:
    """Collect what decides outcomes, with what problems and model hold: files of one name may be others later."""
    chosen: dict[str, Any] = {"benchmark": settings.benchmark, "path": source.place}
    chosen |= {"problems": digest_of_problems(problems, asked=settings.model is not None)}
    chosen |= {"limits": asdict(settings.limits), "backend": settings.backend}
    if settings.model is not None:
        names = ("model", "num_samples", "form", "max_prompt_length", "seed", "bf16")
        chosen |= {name: getattr(settings, name) for name in names} | {"sampling": asdict(settings.sampling)}
        chosen["model files"] = digest_of_model(settings.model)
    return chosen


def _check_counts(samples: Sequence[Sample], problems: dict[str, Problem], ks: Sequence[int]) -> None:
    """Refuse a k that is more than the samples of a problem."""
    counts = Counter(sample.task_id for sample in samples if sample.task_id in problems)
    if samples and not counts:
        raise ValueError("no sample is of a problem that is taken; raise num_problems")
    if counts and (least := min(counts.values())) < ks[-1]:
        name = next(name for name, count in counts.items() if count == least)
        raise ValueError(
            f"k is {ks[-1]}, but {name} has {least} sample{'s' * (least > 1)}; give a smaller k, or more samples of a "
            "problem"
        )


def _draw(settings: PassAtK, source: ProblemSet, problems: list[Problem], path: Path) -> None:
    """Draw samples; the model is let go of at the end."""
    assert settings.model is not None
    draw_samples(
        path,
        problems,
        Sampler(settings.model, settings.sampling, bf16=settings.bf16),
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        max_prompt_length=settings.max_prompt_length,
        seed=settings.seed,
        stops=source.stops,
    )


def _run(
    samples: list[Sample], problems: dict[str, Problem], output: Path, settings: PassAtK, backend: Backend
) -> list[dict[str, Any]]:
    """Run the samples whose outcomes are not there yet; return all outcomes."""
    records = written(output)
    for number, record in enumerate(records, 1):
        wanted = _identity(samples[number - 1]) if number <= len(samples) else None
        if wanted is None or {name: record.get(name) for name in wanted} != wanted:
            raise ValueError(f"{output}, line {number}, is of another sample; choose another output, or remove it")
    left = samples[len(records) :]
    with output.open("a", encoding="utf-8") as file, progress("programs", len(samples), len(records)) as advance:
        for sample, outcome in zip(left, _outcomes(left, problems, settings, backend), strict=True):
            details = details_of(outcome) | {"all_passed": outcome.failed == 0}
            records.append(_identity(sample) | details | {"difficulty": problems[sample.task_id].difficulty})
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
            advance(1)
    return records


def _identity(sample: Sample) -> dict[str, Any]:
    return {"task_id": sample.task_id, "sample": sample.number, "completion": sample.completion}


def _outcomes(
    samples: list[Sample], problems: dict[str, Problem], settings: PassAtK, backend: Backend
) -> Iterator[Outcome]:
    """Run each program once, also where several samples are the same."""
    keys = [(s.task_id, answer(s.completion, problems[s.task_id].head).program) for s in samples]
    pairs = [(program, problems[task_id].tests) for task_id, program in dict.fromkeys(keys)]
    known: dict[tuple[str, str], Outcome] = {}
    ran = run_many(pairs, settings.limits, backend=backend, workers=settings.workers)
    for key in keys:
        if key not in known:
            known[key] = next(ran)
        yield known[key]


def _conclude(records: list[dict[str, Any]], problems: dict[str, Problem], files: _Files, settings: PassAtK) -> None:
    """Write what was solved, and print it."""
    counts = Counter(record["task_id"] for record in records)
    right = Counter(record["task_id"] for record in records if record["all_passed"])
    solved = [
        Solved(task_id=name, difficulty=problem.difficulty, n=counts[name], correct=right[name])
        for name, problem in problems.items()
        if counts[name] or not settings.only_sampled
    ]
    if missing := sum(name not in counts for name in problems):
        how = "left out" if settings.only_sampled else "counted as not solved"
        print(f"problems without a sample: {missing} of {len(problems)}, {how}", file=sys.stderr)
    groups = by_difficulty(solved, settings.ks)
    write_jsonl(files.problems, (problem.record(settings.ks) for problem in solved))
    summary = json.loads(files.summary.read_text(encoding="utf-8")) | {
        "complete": True,
        "problems": len(solved),
        "samples": len(records),
        "without_samples": missing,
        "only_sampled": settings.only_sampled,
        "status": dict(Counter(record["status"] for record in records)),
        "pass_at_k": {name: group.record() for name, group in groups.items()},
    }
    write_atomically(files.summary, json.dumps(summary, indent=2) + "\n")
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table_of(groups, settings.ks))
    print(f"outcomes: {len(records)} in {files.outcomes}")
