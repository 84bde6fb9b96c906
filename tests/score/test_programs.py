"""What `run_tests` says of programs: verdicts that a reviewer found wrong, each by itself."""

from pathlib import Path

import pytest

from apportion import Limits, Outcome, Tests, run_tests
from apportion.data.apps import PRELUDE
from apportion.data.humaneval import HumanEval
from apportion.score.programs import same_text, same_value
from apportion.score.sandbox import Bubblewrap, Sandbox, SandboxError

SCRIPT = Tests(inputs=["3\n"], outputs=["3\n"])
CALL = Tests(inputs=[[1]], outputs=[1], function="f")


def ends(outcome: Outcome) -> list[str]:
    return [result.end for result in outcome.per_test]


@pytest.mark.parametrize("end", ["exit()", "quit()", "exit(0)", "import sys; sys.exit()"])
def test_a_script_may_end_itself(end: str) -> None:
    assert run_tests(f"print(input())\n{end}", SCRIPT).status == "ok"


def test_a_script_that_ends_with_a_status_has_failed() -> None:
    assert run_tests("print(input())\nexit(3)", SCRIPT).status == "runtime_error"


@pytest.mark.parametrize(
    "program",
    [
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass N:\n    v: int\n"
        "    n: N = None\ndef f(x): return N(x).v",
        "import pickle\nclass A: pass\ndef f(x): return x if pickle.loads(pickle.dumps(A())) else 0",
        "import typing\nclass A:\n    n: 'A'\ndef f(x): return x if typing.get_type_hints(A)['n'] is A else 0",
    ],
)
def test_what_a_program_defines_lies_in_a_module(program: str) -> None:
    assert run_tests(program, CALL).passed == 1


def test_what_a_comparison_cannot_bear_has_failed() -> None:
    program = "from decimal import Decimal\ndef f(x): return {}"
    for value in ("Decimal('sNaN')", "[Decimal('sNaN')]"):
        assert ends(run_tests(program.format(value), CALL)) == ["failed"]


@pytest.mark.parametrize(
    ("program", "function", "outputs", "passed"),
    [
        ("", "gcd", [2], 0),
        ("from math import gcd", "gcd", [2], 1),
        ("class Solution:\n    def product(self, a, b): return a * b", "product", [24], 1),
        ("def product(a: int, b: List[int]) -> int: return max(Counter([a, b]))", "product", [6], 1),
    ],
)
def test_what_the_task_imports_is_not_the_programs(program: str, function: str, outputs: list, passed: int) -> None:
    tests = Tests(inputs=[[4, 6]], outputs=outputs, function=function, prelude=PRELUDE)
    assert run_tests(program, tests).passed == passed


def test_an_error_that_a_test_catches_is_none() -> None:
    checks = ["try: f(-1)\nexcept ValueError: pass\nassert f(1) == 1", "assert f(2) == 2"]
    outcome = run_tests("def f(x):\n    if x < 0: raise ValueError('neg')\n    return 2", Tests(checks=checks))
    assert (outcome.status, ends(outcome), outcome.line) == ("ok", ["failed", "passed"], None)


def test_a_program_that_is_gone_has_not_passed_whatever_the_test_catches() -> None:
    tests = Tests(checks=["ok = False\ntry: f(1)\nexcept: ok = True\nassert ok"])
    assert run_tests("def f(x):\n    import os; os._exit(0)", tests).status == "runtime_error"


@pytest.mark.parametrize(("number", "helper"), [(32, "poly"), (38, "encode_cyclic"), (50, "encode_shift")])
def test_tests_call_the_tasks_helpers_not_the_programs(number: int, helper: str, shared: Path) -> None:
    problem = HumanEval(path=str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz")).problems("test")[number]
    assert helper in problem.tests.setup
    cheat = f"    return 0\n\ndef {helper}(*_):\n    return 0\n"
    assert run_tests(problem.head + cheat, problem.tests).passed == 0
    assert run_tests(problem.head + problem.solutions[0], problem.tests).passed == 1


def test_no_test_sees_what_another_one_left() -> None:
    program = (
        "import os\nprint(len(os.listdir('/tmp')))\nopen('/tmp/a', 'w').write('x')\n"
        "os.makedirs('/tmp/b/c', 0o700)\nopen('/tmp/b/c/d', 'w')\nos.symlink('/usr/lib', '/tmp/e')"
    )
    for backend in Bubblewrap(), Bubblewrap(as_root=False):
        assert run_tests(program, Tests(inputs=[""] * 3, outputs=["0"] * 3), backend=backend).passed == 3


@pytest.mark.parametrize("function", [None, "f"])
def test_all_tests_together_have_a_limit(function: str | None) -> None:
    program = "import time\n" + ("def f(x): time.sleep(x)" if function else "time.sleep(float(input()))")
    seconds = [0, 0, 30, 0]
    inputs = [[number] for number in seconds] if function else [*map(str, seconds)]
    tests = Tests(inputs=inputs, outputs=[None if function else ""] * 4, function=function)
    outcome = run_tests(program, tests, Limits(wall_seconds=20, total_seconds=4))
    assert outcome.status == "timeout"
    assert ends(outcome) == ["passed", "passed", "timeout", "not_run"]


def test_a_python_behind_a_link_has_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    link = tmp_path / "python"
    link.symlink_to(sys.base_prefix)
    monkeypatch.setattr(sys, "base_prefix", str(link))
    assert run_tests("print(input())", SCRIPT).status == "ok"


def test_no_descriptor_is_left_where_no_box_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
            run_tests("", SCRIPT)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    assert isinstance(Sandbox().backend, Bubblewrap)


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        *[("0.3000001", "0.3", True), ("0.31", "0.3", False), ("2", "2.0", True), ("1.0", "1", False)],
        *[("1_0.5", "10.5", False), ("inf", "infinity", False), ("nan", "nan", True), ("100", "1e2", True)],
        *[("x", "0.5", False), ("a  b\n\nc", "a b\nc\n", True), ("\u0661.0", "1.0", False)],
    ],
)
def test_printed_numbers_are_compared_as_such_where_a_float_is_wanted(found: str, wanted: str, same: bool) -> None:
    assert same_text(found, wanted) is same


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        *[(0.1 + 0.2, 0.3, True), ([1, (0.5,)], [1, [0.5000001]], True), (1, 1.0, True), (True, 1.0, True)],
        *[({"a": 0.1 + 0.2}, {"a": 0.3}, True), (0.4, 0.3, False), ([1], [1, 2], False), (3, [3], True)],
        *[(float("nan"), 0.3, False), ("0.3", 0.3, False), (2**70, 2.0**70, True), (10**400, 0.5, False)],
    ],
)
def test_values_are_compared_within_a_tolerance_where_a_float_is_wanted(
    found: object, wanted: object, same: bool
) -> None:
    assert same_value(found, wanted) is same


def test_an_outcome_is_written_by_place() -> None:
    assert Outcome("ok", 1, 0, ()) == Outcome(status="ok", passed=1, failed=0, per_test=())
