"""Programs that try what a backend of boxes promises to prevent, and honest ones; run alone, the ends of all as JSON.

The first line of each file of score/evil says what kind of task it is, how it has to end, and which promise it tries;
of score/honest, the first two. `@OUTSIDE@` in a program stands for a folder outside of the box, with a file `canary`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from apportion.data.problems import Tests
from apportion.score.programs import Outcome, run_many, run_tests
from apportion.score.sandbox import Backend, Bubblewrap, Limits, Promise

SCORE = Path(__file__).parent / "score"
TIGHT = Limits(wall_seconds=2, cpu_seconds=2)
TASKS = {
    "script": Tests(inputs=[""], outputs=["contained"]),
    "call": Tests(checks=["assert f(1) == 'expected-7d1f'"]),
}
CANARY = "a secret"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program of evil/ or honest/.

    Attributes:
        name: Its file.
        program: Its source.
        tests: What it is tested by.
        ends: How it may end.
        promise: What it tries; None for an honest one.
    """

    name: str
    program: str
    tests: Tests
    ends: tuple[str, ...]
    promise: Promise | None


def cases(folder: str) -> list[Case]:
    """Read the programs of a folder."""
    found = []
    for path in sorted((SCORE / folder).glob("*.py")):
        program = path.read_text()
        task, ends, *promise = program.splitlines()[0].removeprefix("# ").split()
        found.append(
            Case(
                name=path.stem,
                program=program,
                tests=TASKS[task],
                ends=tuple(ends.split("|")),
                promise=promise[0] if promise else None,  # pyright: ignore[reportArgumentType]
            )
        )
    return found


EVIL, HONEST = cases("evil"), cases("honest")


def end_of(outcome: Outcome) -> str:
    """Say in a word how a program ended."""
    return outcome.status if outcome.status != "ok" else "passed" if outcome.passed else "failed"


def limits_of(case: Case) -> Limits:
    """Give little time to what is meant to use it up, and none but the usual limit to what ends by itself."""
    return TIGHT if "timeout" in case.ends else Limits()


def run_case(case: Case, backend: Backend, outside: Path) -> str:
    """Run a program, and say how it ended."""
    program = case.program.replace("@OUTSIDE@", str(outside))
    return end_of(run_tests(program, case.tests, limits_of(case), backend=backend))


@contextmanager
def folder_outside() -> Iterator[Path]:
    """Make a folder that no program may read or change; see that none did."""
    with TemporaryDirectory() as name:
        canary = Path(name) / "canary"
        canary.write_text(CANARY)
        canary.chmod(0o666)
        Path(name).chmod(0o777)  # so that it is the box that holds, not the mode
        yield Path(name)
        assert [*Path(name).iterdir()] == [canary]
        assert canary.read_text() == CANARY


def wrong_ends(backend: Backend) -> tuple[int, list[str]]:
    """Run all programs that try what a backend promises, and the honest ones.

    Returns:
        How many tried, and what ended as it must not.
    """
    tried = [case for case in EVIL if case.promise in backend.promises()]
    wrong = []
    with folder_outside() as outside:
        for limits in (TIGHT, Limits()):
            group = [case for case in (*tried, *HONEST) if limits_of(case) == limits]
            pairs = [(case.program.replace("@OUTSIDE@", str(outside)), case.tests) for case in group]
            ends = map(end_of, run_many(pairs, limits, backend=backend))
            wrong += [f"{case.name}: {end}" for case, end in zip(group, ends, strict=True) if end not in case.ends]
    return len(tried), wrong


if __name__ == "__main__":
    backend = Bubblewrap()
    tried, wrong = wrong_ends(backend)
    print(json.dumps({"as_root": backend.as_root, "tried": tried, "wrong": wrong}))
