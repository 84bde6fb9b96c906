"""Real programs in boxes, and what a user is told where boxes cannot be made; what boxes hold: test_conformance.py."""

import os
import re
from pathlib import Path

import pytest

from apportion.data.answers import answer
from apportion.data.humaneval import HumanEval
from apportion.data.mbpp import Mbpp
from apportion.data.problems import Problem, Tests
from apportion.score.programs import run_many, run_tests
from apportion.score.sandbox import Bubblewrap, Limits, SandboxError, UnsafeSubprocess, backend_named

HERE = Path(__file__).parent


def humaneval(shared: Path) -> list[Problem]:
    return HumanEval(path=str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz")).problems("test")


def not_passed(problems: list[Problem]) -> list[str]:
    """Name those whose reference does not pass."""
    pairs = [(answer(problem.solutions[0], problem.head).program, problem.tests) for problem in problems]
    outcomes = run_many(pairs)
    return [problem.task_id for problem, outcome in zip(problems, outcomes, strict=True) if outcome.failed]


@pytest.mark.slow
def test_the_references_of_humaneval_pass(shared: Path) -> None:
    problems = humaneval(shared)
    assert len(problems) == 164
    assert not_passed(problems) == []


@pytest.mark.slow
def test_the_references_of_mbpp_pass(shared: Path) -> None:
    problems = Mbpp(path=str(shared / "data" / "mbpp" / "mbpp.jsonl")).problems("all")
    assert len(problems) == 974
    assert not_passed(problems) == []


def test_an_object_that_equals_everything_fools_no_test_of_humaneval(shared: Path) -> None:
    """sandbox.md: openai/human-eval's own executor is fooled by it on 155 of 164 problems."""
    cheat = (HERE / "evil" / "always_equal.py").read_text().replace("def f(x)", "def {}(*_, **__)")
    pairs = []
    for problem in humaneval(shared)[::8]:
        name = re.findall(r"check\((\w+)\)\Z", problem.tests.checks[0])[0]
        pairs.append((cheat.replace("{}", name), problem.tests))
    assert not any(outcome.passed for outcome in run_many(pairs))


def test_a_source_with_a_nul_does_not_compile() -> None:
    """Of its own, for a file with it is none of text."""
    tests = Tests(inputs=[""], outputs=["contained"])
    assert run_tests("print('contained')\0", tests).status == "compile_error"


def test_without_bubblewrap_nothing_runs_and_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match=r"bubblewrap is not installed.*apt-get install bubblewrap"):
        run_tests("print(1)", Tests(inputs=[""], outputs=["1"]))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("No permissions to create new namespace", "AppArmor profile"),
        ("setting up uid map: Permission denied", "AppArmor profile"),
        ("Creating new namespace failed: nesting depth or max_*_namespaces exceeded", "user.max_user_namespaces"),
        ("Unknown option --disable-userns", "version 0.8 or later"),
    ],
)
def test_where_bubblewrap_refuses_the_remedy_is_told(
    said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(f"#!/bin/sh\necho 'bwrap: {said}' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SandboxError, match=f"{re.escape(said)}; .*{remedy}"):
        run_tests("print(1)", Tests(inputs=[""], outputs=["1"]))


@pytest.mark.parametrize("tests", [Tests(inputs=[""], outputs=["1"]), Tests(checks=["assert f(1) == 1"])])
def test_a_program_that_could_not_be_confined_is_no_error_of_its_own(tests: Tests) -> None:
    """In a user namespace there is but one user to become."""

    class NoSuchUser(Bubblewrap):
        def user(self) -> int:
            return 7

    with pytest.raises(SandboxError, match="a program could not be confined"):
        run_tests("print(1)\ndef f(x): return x", tests, backend=NoSuchUser(as_root=False))


def test_backends_are_had_by_name() -> None:
    assert backend_named("bubblewrap") == Bubblewrap()
    with pytest.warns(UserWarning, match="unsafe-subprocess"):
        assert isinstance(backend_named("unsafe-subprocess"), UnsafeSubprocess)


def test_a_plain_process_is_had_by_name_only_and_warns() -> None:
    with pytest.warns(UserWarning, match="unsafe-subprocess runs programs with the rights and files of this process"):
        backend = UnsafeSubprocess()
    tests = Tests(inputs=["1", "2"], outputs=["2", "3"])
    assert run_tests("print(int(input()) + 1)", tests, backend=backend).passed == 2
    assert run_tests("while True: pass", tests, Limits(wall_seconds=2), backend=backend).status == "timeout"


@pytest.mark.parametrize(("name", "value"), [("wall_seconds", 0), ("memory_bytes", -1), ("processes", 0)])
def test_limits_that_let_nothing_run_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; choose a positive number"):
        Limits(**{name: value})
