"""Programs and their tests: what ran, what passed, and what that is worth."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from apportion.data.problems import Tests
from apportion.score.boxed.plain import NotPlain, dumps, loads
from apportion.score.sandbox import Backend, Bubblewrap, Job, Limits, Sandbox, SandboxError

Status = Literal["ok", "compile_error", "runtime_error", "timeout"]
End = Literal["passed", "failed", "error", "timeout", "not_run"]

TOLERANCE = 1e-6
"""Relative and absolute, between numbers where the reference prints one that is not whole."""


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """How one test ended.

    Attributes:
        end: `not_run` after an error or a time-out of an earlier one.
        message: What was said of it.
        seconds: On the clock.
    """

    __test__ = False

    end: End
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a program fared.

    Attributes:
        status: `ok` where every test ran to its end, right or wrong.
        passed: Tests that passed.
        failed: All others, those that did not run included.
        per_test: Each test.
        message: The error, if there was one.
        line: Line of the program that the error names, from 1; None where none is known.
    """

    status: Status
    passed: int
    failed: int
    per_test: tuple[TestResult, ...]
    message: str = ""
    line: int | None = None


def run_tests(program: str, tests: Tests, limits: Limits | None = None, *, backend: Backend | None = None) -> Outcome:
    """Run a program against its tests in a box of its own; the verdict is formed outside of its process.

    Args:
        program: Python source.
        tests: Its tests. After the first error or time-out the others are not run.
        limits: What it may use; by default those of `Limits`.
        backend: How boxes are made; by default `Bubblewrap`.

    Returns:
        The outcome.

    Raises:
        SandboxError: If no box can be made.
    """
    box = Sandbox(backend=backend or Bubblewrap(), limits=limits or Limits())
    told = box.run(_job(program, tests))
    if not told:
        raise SandboxError("the box told nothing of the program")
    results = [_judged(message, tests, place) for place, message in enumerate(told)]
    results += [TestResult(end="not_run")] * (len(tests) - len(results))
    last = told[-1]
    status = STATUSES.get(last["end"], "ok")
    passed = sum(result.end == "passed" for result in results)
    return Outcome(
        status=status,
        passed=passed,
        failed=len(tests) - passed,
        per_test=tuple(results),
        message="" if status == "ok" else results[len(told) - 1].message,
        line=None if status == "ok" else _line(last),
    )


def run_many(
    programs: Sequence[tuple[str, Tests]],
    limits: Limits | None = None,
    *,
    backend: Backend | None = None,
    workers: int | None = None,
) -> Iterator[Outcome]:
    """Run programs against their tests, some at a time.

    Args:
        programs: Each with its tests.
        limits: What each may use; by default those of `Limits`.
        backend: How boxes are made; by default `Bubblewrap`.
        workers: Boxes at a time; by default as many as there are cores.

    Yields:
        Their outcomes, in order, each as soon as it and those before it are there.
    """
    # A box dies with the thread that started it: these live until the last of them is done.
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda pair: run_tests(pair[0], pair[1], limits, backend=backend), programs)


def program_reward(outcome: Outcome) -> float:
    """Score an outcome: -1 for what does not compile, -0.6 for an error or a time-out, else -0.3 + 1.3 * share passed.

    Source: MA-RLHF (https://arxiv.org/abs/2410.02743), the reward of APPS.
    """
    if outcome.status == "compile_error":
        return -1.0
    if outcome.status != "ok":
        return -0.6
    return -0.3 + 1.3 * outcome.passed / (outcome.passed + outcome.failed)


def same_text(found: str, wanted: str) -> bool:
    """Compare printed text as APPS does: line by line, whatever the space; numbers within a tolerance.

    Numbers are compared as such where the wanted one is not whole, or written as a float.
    """
    lines = [[line.split() for line in text.splitlines() if line.strip()] for text in (found, wanted)]
    if [*map(len, lines[0])] != [*map(len, lines[1])]:
        return False
    return all(
        word == other or _close(word, other)
        for line, other_line in zip(*lines, strict=True)
        for word, other in zip(line, other_line, strict=True)
    )


def same_value(found: Any, wanted: Any) -> bool:
    """Compare what a call returned as APPS does: tuples are lists, and the wanted value may come in a list of one.

    Numbers are compared within a tolerance where the wanted one is a float.
    """
    found = _listed(found)
    try:
        return _equal(found, wanted) or (isinstance(wanted, list) and len(wanted) > 0 and _equal(found, wanted[0]))
    except ArithmeticError:  # a signalling NaN
        return False


STATUSES: dict[str, Status] = {"error": "runtime_error", "timeout": "timeout", "compile_error": "compile_error"}


def _job(program: str, tests: Tests) -> Job:
    """Say what is sent into the box: never an expected output."""
    given = {"program": program, "prelude": tests.prelude}
    if tests.checks:
        return Job(mode="checks", **given, tests=tests.checks, setup=tests.setup)
    if tests.function is None:
        return Job(mode="scripts", **given, tests=tests.inputs)
    inputs = [dumps(list(arguments)).decode() for arguments in tests.inputs]
    return Job(mode="calls", **given, tests=inputs, function=tests.function)


def _judged(message: dict[str, Any], tests: Tests, place: int) -> TestResult:
    """Form the verdict on one test."""
    seconds, said = float(message.get("seconds", 0.0)), str(message.get("message", ""))
    ends: dict[str, End] = {"passed": "passed", "failed": "failed", "timeout": "timeout"}
    if message["end"] == "exit":
        right = same_text(message["stdout"], tests.outputs[place])
        return TestResult(end="passed" if right else "failed", seconds=seconds)
    if message["end"] == "returned":
        try:
            right = same_value(loads(message["value"].encode()), tests.outputs[place])
        except NotPlain as error:
            return TestResult(end="failed", message=str(error), seconds=seconds)
        return TestResult(end="passed" if right else "failed", seconds=seconds)
    if last := str(message.get("stderr", "")).strip().rpartition("\n")[2]:
        said = f"{last} ({said})"
    return TestResult(end=ends.get(message["end"], "error"), message=said, seconds=seconds)


def _line(message: dict[str, Any]) -> int | None:
    """Find the line of the program that an error names."""
    named = re.findall(r'File "<program>", line (\d+)', str(message.get("stderr", "")))
    return int(named[-1]) if named else int(message.get("line") or 0) or None


def _close(word: str, wanted: str) -> bool:
    """Compare two words as numbers, where the wanted one is a float as programs print it."""
    if not FLOAT.fullmatch(wanted) or not NUMBER.fullmatch(word):
        return False
    return math.isclose(float(word), float(wanted), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FLOAT = re.compile(r"[+-]?(\d+\.\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+)", re.ASCII)


def _equal(found: Any, wanted: Any) -> bool:
    """Compare plain values, floats within a tolerance."""
    if isinstance(wanted, list):
        alike = isinstance(found, list) and len(found) == len(wanted)
        return alike and all(map(_equal, found, wanted))
    if isinstance(wanted, dict):
        alike = isinstance(found, dict) and found.keys() == wanted.keys()
        return alike and all(_equal(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return found == wanted or math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(found == wanted)


def _listed(value: Any) -> Any:
    """Turn tuples into lists, all the way down."""
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return value
