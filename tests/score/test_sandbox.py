"""What a box holds, by programs that try: each file of evil/ and honest/ says in its first line how it has to end."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from apportion.data.problems import Tests
from apportion.score.programs import run_many, run_tests
from apportion.score.sandbox import Bubblewrap, Limits, SandboxError, UnsafeSubprocess

HERE = Path(__file__).parent
TIGHT = Limits(wall_seconds=3, cpu_seconds=3)
KINDS = {
    "script": Tests(inputs=[""], outputs=["contained"]),
    "call": Tests(checks=["assert f(1) == 'expected-7d1f'"]),
}
EVIL, HONEST = (sorted((HERE / folder).glob("*.py")) for folder in ("evil", "honest"))
BACKENDS = [Bubblewrap(as_root=True), Bubblewrap(as_root=False)] if os.geteuid() == 0 else [Bubblewrap()]


def name_of(backend: Bubblewrap) -> str:
    return "root" if backend.as_root else "user"


def end_of(path: Path, backend: Bubblewrap, limits: Limits) -> tuple[str, list[str]]:
    """How a program ends, and how it has to."""
    program = path.read_text()
    kind, wanted = program.splitlines()[0].removeprefix("# ").split()
    outcome = run_tests(program, KINDS[kind], limits, backend=backend)
    end = outcome.status if outcome.status != "ok" else "passed" if outcome.passed else "failed"
    return end, wanted.split("|")


def boxes() -> set[int]:
    """Processes of boxes that this process, or one that it started, has made, or that have lost who made them."""
    found: set[int] = set()
    for process in sorted(psutil.process_iter(), key=lambda process: process.pid):
        try:
            of_a_box = "from boxed.runner import main" in " ".join(process.cmdline())
            ours = process.environ().get("PYTEST_XDIST_WORKER") == os.environ.get("PYTEST_XDIST_WORKER")
            if of_a_box and ((ours and process.environ()) or process.ppid() in found | {1}):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "a secret")


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
@pytest.mark.parametrize("path", EVIL, ids=lambda path: path.stem)
def test_what_is_hostile_is_held_and_leaves_nothing_behind(path: Path, backend: Bubblewrap) -> None:
    outside = {folder: sorted(os.listdir(folder)) for folder in ("/", "/usr", "/usr/lib", "/dev", sys.base_prefix)}
    end, wanted = end_of(path, backend, TIGHT)
    assert end in wanted
    assert not boxes()
    assert {folder: sorted(os.listdir(folder)) for folder in outside} == outside


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
@pytest.mark.parametrize("path", HONEST, ids=lambda path: path.stem)
def test_what_is_honest_passes(path: Path, backend: Bubblewrap) -> None:
    end, wanted = end_of(path, backend, Limits())
    assert end in wanted


@pytest.mark.slow
def test_the_references_of_humaneval_pass(shared: Path) -> None:
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [
        (row["prompt"] + row["canonical_solution"], Tests(checks=[f"{row['test']}\ncheck({row['entry_point']})"]))
        for row in rows
    ]
    outcomes = [*run_many(pairs)]
    assert [row["task_id"] for row, outcome in zip(rows, outcomes, strict=True) if outcome.passed != 1] == []
    assert len(rows) == 164


@pytest.mark.slow
def test_the_references_of_mbpp_pass(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data" / "mbpp" / "mbpp.jsonl").read_text().splitlines()]
    pairs = [(row["code"], Tests(checks=row["test_list"], setup=row["test_setup_code"])) for row in rows]
    outcomes = [*run_many(pairs)]
    assert [row["task_id"] for row, outcome in zip(rows, outcomes, strict=True) if outcome.failed] == []
    assert len(rows) == 974


def test_an_object_that_equals_everything_fools_no_test_of_humaneval(shared: Path) -> None:
    """sandbox.md: openai/human-eval's own executor is fooled by it on 155 of 164 problems."""
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][::8]
    cheat = (HERE / "evil" / "always_equal.py").read_text().replace("def f(x)", "def {}(*_, **__)")
    pairs = [
        (cheat.replace("{}", row["entry_point"]), Tests(checks=[f"{row['test']}\ncheck({row['entry_point']})"]))
        for row in rows
    ]
    assert not any(outcome.passed for outcome in run_many(pairs, TIGHT))


def test_a_source_with_a_nul_does_not_compile() -> None:
    """Of its own, for a file with it is none of text."""
    assert run_tests("print('contained')\0", KINDS["script"], TIGHT).status == "compile_error"


def test_boxes_run_side_by_side() -> None:
    sleepy = ("import time; time.sleep(0.5); print(1)", Tests(inputs=[""], outputs=["1"]))
    begin = time.monotonic()
    assert [outcome.passed for outcome in run_many([sleepy] * 8, workers=8)] == [1] * 8
    assert time.monotonic() - begin < 3.5


def test_a_killed_parent_leaves_nothing_behind() -> None:
    code = (
        "from apportion.data.problems import Tests\nfrom apportion.score.programs import *\n"
        "print('ready', flush=True)\n"
        "run_tests('while True: pass', Tests(inputs=[''], outputs=['']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        deadline = time.monotonic() + 20
        while not boxes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert boxes()
        parent.kill()
        while boxes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not boxes()


def test_many_programs_leak_nothing() -> None:
    """No descriptor, thread or process stays; memory is looked at by benchmarks/sandbox.py over 2,000 of them."""
    program = ("print(input())", Tests(inputs=["1", "2"], outputs=["1", "2"]))
    assert all(outcome.passed == 2 for outcome in run_many([program] * 10))
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert all(outcome.passed == 2 for outcome in run_many([program] * 40))
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)
    assert not boxes()


def test_without_bubblewrap_nothing_runs_and_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match=r"bubblewrap is not installed.*apt-get install bubblewrap"):
        run_tests("print(1)", Tests(inputs=[""], outputs=["1"]))


def test_where_namespaces_are_refused_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SandboxError, match=r"No permissions to create new namespace; .*AppArmor profile"):
        run_tests("print(1)", Tests(inputs=[""], outputs=["1"]))


def test_a_plain_process_is_had_by_name_only_and_warns() -> None:
    with pytest.warns(UserWarning, match="unsafe-subprocess runs programs with the rights and files of this process"):
        backend = UnsafeSubprocess()
    tests = Tests(inputs=["1", "2"], outputs=["2", "3"])
    assert run_tests("print(int(input()) + 1)", tests, backend=backend).passed == 2
    assert run_tests("while True: pass", tests, TIGHT, backend=backend).status == "timeout"


@pytest.mark.parametrize(("name", "value"), [("wall_seconds", 0), ("memory_bytes", -1), ("processes", 0)])
def test_limits_that_let_nothing_run_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; choose a positive number"):
        Limits(**{name: value})
