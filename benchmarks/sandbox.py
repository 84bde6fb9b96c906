"""Measure boxes for programs: how many a second, what one costs, what they hold, what they leave behind.

    python benchmarks/sandbox.py --data FOLDER [--repeats 5] [--programs 2000] [--write]

FOLDER holds `humaneval/HumanEval.jsonl.gz`. As root in both modes, otherwise in a user namespace: HumanEval's 164
references on 2 cores, from a small parent and from one of 3 GB; a program alone, beside a plain start of Python; each
further test in the same box; many programs in a row, with descriptors, processes and memory before and after; programs
of tests/score/evil that are held; and an object that equals everything against HumanEval's tests. With `--write` the
report goes to `benchmarks/results/sandbox-DATE.md`.
"""

import argparse
import gc
import gzip
import json
import os
import secrets
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

from apportion.data.problems import Tests
from apportion.score.programs import run_many, run_tests
from apportion.score.sandbox import Backend, Bubblewrap, Limits
from apportion.score.sandbox_check import Marked

ROOT = Path(__file__).parent.parent
CORES = 2
LARGE = 3 * 2**30
Pairs = list[tuple[str, Tests]]


def modes() -> dict[str, Bubblewrap]:
    if os.geteuid() != 0:
        return {"user namespace": Bubblewrap()}
    return {"root": Bubblewrap(as_root=True), "user namespace": Bubblewrap(as_root=False)}


def humaneval(data: Path) -> list[dict[str, str]]:
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def references(rows: list[dict[str, str]]) -> Pairs:
    return [(row["prompt"] + row["canonical_solution"], tests_of(row)) for row in rows]


def cheats(rows: list[dict[str, str]]) -> Pairs:
    cheat = (ROOT / "tests" / "score" / "evil" / "always_equal.py").read_text()
    return [(cheat.replace("def f(x)", f"def {row['entry_point']}(*_, **__)"), tests_of(row)) for row in rows]


def tests_of(row: dict[str, str]) -> Tests:
    return Tests(checks=[f"{row['test']}\ncheck({row['entry_point']})"])


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def throughput(pairs: Pairs, repeats: int) -> Iterator[str]:
    yield from ("", f"## HumanEval's {len(pairs)} references, programs a second, {CORES} boxes at a time", "")
    yield from ("| mode | parent | programs a second | passed |", "|---|---|---|---|")
    for parent in ("small", "of 3 GB"):
        held = bytearray(LARGE) if parent != "small" else b""
        for place in range(0, len(held), 4096):
            held[place] = 1  # pyright: ignore[reportIndexIssue]
        for name, backend in modes().items():
            rates, passed = [], set()
            for _ in range(repeats):
                outcomes = []
                took = seconds(lambda b=backend, o=outcomes: o.extend(run_many(pairs, backend=b, workers=CORES)))
                rates.append(len(pairs) / took)
                passed.add(sum(outcome.passed for outcome in outcomes))
            resident = psutil.Process().memory_info().rss / 2**20
            yield f"| {name} | {parent}, {resident:,.0f} MB resident | {spread(rates, '.1f')} | {sorted(passed)} |"
        del held
        gc.collect()


def alone(repeats: int) -> Iterator[str]:
    times = 20 * repeats
    plain = [sys.executable, "-I", "-S", "-c", "pass"]
    yield from ("", f"## A program alone, milliseconds on the clock, median of {times} (fastest to slowest)", "")
    yield from ("| | ms |", "|---|---|")
    starts = [1000 * seconds(lambda: subprocess.run(plain, check=True)) for _ in range(times)]
    yield f"| `python -I -S -c pass`, no box | {spread(starts, '.1f')} |"
    script = ("print(input())", [Tests(inputs=["1"] * n, outputs=["1"] * n) for n in (1, 21)])
    call = ("def f(x): return x", [Tests(checks=["assert f(1) == 1"] * n) for n in (1, 21)])
    for mode, backend in modes().items():
        for kind, (program, (one, many)) in {"script": script, "call": call}.items():
            run: Callable[[Tests], object] = lambda t, p=program, b=backend: run_tests(p, t, backend=b)  # noqa: E731
            single = [1000 * seconds(lambda r=run, t=one: r(t)) for _ in range(times)]
            more = [1000 * seconds(lambda r=run, t=many: r(t)) for _ in range(times)]
            further = (statistics.median(more) - statistics.median(single)) / 20
            over = statistics.median(single) - statistics.median(starts)
            yield f"| {mode}, {kind}, one test | {spread(single, '.1f')}, {over:.1f} over the plain start |"
            yield f"| {mode}, {kind}, each further test of 20 | {further:.2f} |"


def in_a_row(programs: int) -> Iterator[str]:
    yield from ("", f"## {programs} programs in a row, every tenth one killed, with an orphan that stopped itself", "")
    yield from (
        "| mode | passed | descriptors | threads | children | MB resident | left |",
        "|---|---|---|---|---|---|---|",
    )
    right = ("print(input())", Tests(inputs=["1"], outputs=["1"]))
    wrong = ("import os\nif os.fork(): os.kill(os.getpid(), 9)\nos.kill(os.getpid(), 19)", right[1])
    for mode, inner in modes().items():
        backend = Marked(inner, f"row-{secrets.token_hex(4)}")
        list(run_many([right] * 20, backend=backend, workers=CORES))  # what is made once is made
        before = state()
        pairs = [wrong if place % 10 == 9 else right for place in range(programs)]
        outcomes = run_many(pairs, Limits(wall_seconds=5), backend=backend, workers=CORES)
        passed = f"{sum(outcome.passed for outcome in outcomes)} of {sum(pair is right for pair in pairs)}"
        cells = [f"{then:,} to {now:,}" for then, now in zip(before, state(), strict=True)]
        yield f"| {mode} | {passed} | {' | '.join(cells)} | {len(backend.alive())} |"


def state() -> tuple[int, int, int, int]:
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), len(process.children()), process.memory_info().rss // 2**20


def held() -> Iterator[str]:
    sys.path.insert(0, str(ROOT / "tests"))
    from conformance import EVIL, HONEST, wrong_ends
    from ordinary_user import as_ordinary_user

    found = {mode: wrong_ends(backend) for mode, backend in modes().items()}
    if os.geteuid() == 0:
        told = json.loads(as_ordinary_user(str(ROOT / "tests" / "conformance.py")).stdout)
        found["user namespace, made by user 65534"] = (told["tried"], told["wrong"])
    hostile = {case.name for case in EVIL}
    yield from ("", f"## {len(EVIL)} programs of tests/score/evil, {len(HONEST)} of tests/score/honest", "")
    yield from ("| mode | hostile kinds held, of those promised | honest ones passed |", "|---|---|---|")
    for mode, (tried, wrong) in found.items():
        ended = [name.partition(":")[0] in hostile for name in wrong]
        honest = len(HONEST) - ended.count(False)
        yield f"| {mode} | {tried - ended.count(True)} of {tried} | {honest} of {len(HONEST)} |"
    yield from ("", "In user namespaces that root makes, Linux does not limit processes, and it is not promised there.")


def fooled(pairs: Pairs, backend: Backend) -> Iterator[str]:
    passed = sum(outcome.passed for outcome in run_many(pairs, backend=backend, workers=CORES))
    yield from ("", "## An object that equals everything", "")
    yield f"It passes {passed} of HumanEval's {len(pairs)} problems."


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """Measure, and write the report line by line."""
    rows = humaneval(arguments.data)
    git = ("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    models = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text]
    version = subprocess.run([Bubblewrap().program, "--version"], capture_output=True, text=True, check=True).stdout
    yield from ("# Boxes for programs", "")
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {subprocess.run(git, capture_output=True, text=True).stdout.strip()}"
    yield f"- machine: {models[0].split(':')[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    yield f"- software: {version.strip()}, Python {sys.version.split()[0]}, Linux {os.uname().release}"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load average of the minute before: {os.getloadavg()[0]:.1f}"
    yield from throughput(references(rows), arguments.repeats)
    yield from alone(arguments.repeats)
    yield from in_a_row(arguments.programs)
    yield from held()
    yield from fooled(cheats(rows), next(iter(modes().values())))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure boxes for programs.")
    parser.add_argument("--data", type=Path, required=True, help="folder of HumanEval")
    parser.add_argument("--repeats", type=int, default=5, help="passes over HumanEval; 20 times as many of one program")
    parser.add_argument("--programs", type=int, default=2000, help="programs in a row")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / f"sandbox-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
