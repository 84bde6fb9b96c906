"""What every backend keeps of what it promises. Another one is tried by

APPORTION_BACKEND=my_module.MyBackend pytest tests/score/test_conformance.py
"""

import gc
import importlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from apportion.data.problems import Tests
from apportion.score.programs import run_many, run_tests
from apportion.score.sandbox import Backend, Bubblewrap, Limits, Promise, SandboxError, UnsafeSubprocess
from apportion.score.sandbox_check import Marked
from conformance import EVIL, HONEST, TIGHT, Case, folder_outside, run_case


def chosen() -> dict[str, Backend]:
    """The backends, and modes, of the package; or the one that the environment names."""
    if own := os.environ.get("APPORTION_BACKEND"):
        module, _, name = own.rpartition(".")
        return {name: getattr(importlib.import_module(module), name)()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unsafe = UnsafeSubprocess()
    if os.geteuid() != 0:
        return {"user": Bubblewrap(), "unsafe": unsafe}
    return {"root": Bubblewrap(as_root=True), "user": Bubblewrap(as_root=False), "unsafe": unsafe}


BACKENDS = chosen()
ONE = ("print(input())", Tests(inputs=["1", "2"], outputs=["1", "2"]))
each_backend = pytest.mark.parametrize("inner", BACKENDS.values(), ids=BACKENDS)


def that_promise(promise: Promise) -> pytest.MarkDecorator:
    """Each backend that makes a promise."""
    names = [name for name, backend in BACKENDS.items() if promise in backend.promises()]
    return pytest.mark.parametrize("inner", [BACKENDS[name] for name in names], ids=names)


@pytest.fixture
def backend(inner: Backend) -> Marked:
    """The backend, with processes that can be told from those of other tests."""
    return Marked(inner, f"test-{secrets.token_hex(8)}")


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "a secret")


@pytest.fixture
def outside() -> Iterator[Path]:
    with folder_outside() as folder:
        yield folder


def tries() -> Iterator[object]:
    """Each backend with each program that tries what it promises."""
    for name, backend in BACKENDS.items():
        yield from (
            pytest.param(case, backend, id=f"{name}-{case.name}") for case in EVIL if case.promise in backend.promises()
        )


def places() -> dict[str, list[str]]:
    return {folder: sorted(os.listdir(folder)) for folder in ("/", "/usr", "/usr/lib", "/dev", sys.base_prefix)}


def until(reached: Callable[[], object], seconds: float = 20) -> bool:
    """Wait for what a function says."""
    deadline = time.monotonic() + seconds
    while not (found := reached()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


@pytest.mark.parametrize(("case", "inner"), [*tries()])
def test_what_is_hostile_is_held_and_leaves_nothing_behind(case: Case, backend: Marked, outside: Path) -> None:
    before = places()
    assert run_case(case, backend, outside) in case.ends
    assert not backend.alive()
    assert places() == before


@each_backend
@pytest.mark.parametrize("case", HONEST, ids=lambda case: case.name)
def test_what_is_honest_passes(case: Case, backend: Marked, outside: Path) -> None:
    assert run_case(case, backend, outside) in case.ends


@each_backend
def test_a_box_of_a_thread_that_ends_at_once_is_whole(backend: Marked) -> None:
    """sandbox.md: --die-with-parent is per thread."""
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run_tests, *ONE, backend=backend).result().passed == 2


@each_backend
def test_boxes_run_side_by_side_and_no_more_than_were_asked_for(backend: Marked) -> None:
    sleepy = ("import time; time.sleep(1); print(1)", Tests(inputs=[""], outputs=["1"]))
    begin, most = time.monotonic(), 0
    with ThreadPoolExecutor(1) as pool:
        outcomes = pool.submit(lambda: [*run_many([sleepy] * 9, backend=backend, workers=3)])
        while not outcomes.done():
            ours = {child.pid for child in psutil.Process().children()}
            most = max(most, len(ours.intersection(backend.alive())))  # the process of a box that is our child
            time.sleep(0.02)
    assert [outcome.passed for outcome in outcomes.result()] == [1] * 9
    assert time.monotonic() - begin < 8
    assert most == 3


@that_promise("processes")
def test_boxes_do_not_share_their_limit_of_processes(backend: Marked) -> None:
    (case,) = (case for case in HONEST if case.name == "processes_below_the_limit")  # 20 of 32
    outcomes = run_many([(case.program, case.tests)] * 4, backend=backend, workers=4)
    assert [outcome.passed for outcome in outcomes] == [1] * 4


def parent(backend: Marked, first: str = "") -> subprocess.Popen:
    """Start a process that runs a program without end, after some first lines; its own command lacks the word."""
    inner = next(name for name, known in BACKENDS.items() if known is backend.inner)
    code = (
        f"import os, sys, time; sys.path[:0] = {[*sys.path, str(Path(__file__).parent)]!r}\n"
        "from test_conformance import BACKENDS, Marked, Tests, run_tests\n"
        "from apportion.score import sandbox\n"
        f"{first}\n"
        f"backend = Marked(BACKENDS[{inner!r}], os.environ['WORD'])\n"
        "run_tests('while True: pass', Tests(inputs=[''], outputs=['']), backend=backend)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "WORD": backend.word})


@that_promise("end")
def test_a_killed_parent_leaves_nothing_behind(backend: Marked) -> None:
    with parent(backend) as killed:
        assert until(lambda: len(backend.alive()) >= 2)
        killed.kill()
    assert until(lambda: not backend.alive(), 5)


@that_promise("end")
@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with-a-child"])
@pytest.mark.parametrize("reached", ["_first_process", "_modules", "_received"])
def test_a_parent_killed_while_a_box_is_made_leaves_nothing_behind(reached: str, forks: bool, backend: Marked) -> None:
    """Before it knows the first process, before it has sent a job, and before the job has begun.

    A child that it has forked lives on for a while, and holds its pipes.
    """
    kill = "os.kill(os.getpid(), 9)"
    first = f"sandbox.{reached} = lambda *_: {f'{kill} if os.fork() else time.sleep(10)' if forks else kill}"
    with parent(backend, first) as killed:
        assert killed.wait() == -signal.SIGKILL
    assert until(lambda: not backend.alive(), 5)


@that_promise("end")
def test_a_killed_box_is_an_error_and_leaves_nothing_behind(backend: Marked) -> None:
    """sandbox.md: the end of the outer bwrap comes before that of the box. Nothing is said of the program."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_tests, "while True: pass", ONE[1], Limits(), backend=backend)
        assert until(lambda: len(backend.alive()) >= 3)
        os.kill(min(backend.alive()), signal.SIGKILL)
        with pytest.raises(SandboxError):
            running.result(timeout=20)
    assert not backend.alive()


@each_backend
def test_many_programs_leak_nothing(backend: Marked) -> None:
    """No descriptor, thread or process; benchmarks/sandbox.py looks over 2,000 of them."""
    assert all(outcome.passed == 2 for outcome in run_many([ONE] * 10, backend=backend))
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    hostile = ("import os\nos.fork()\nos.kill(os.getpid(), 9)", ONE[1])
    assert all(outcome.passed in (0, 2) for outcome in run_many([ONE, ONE, hostile] * 15, TIGHT, backend=backend))
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)
    assert not backend.alive()


@pytest.mark.slow
@each_backend
def test_memory_does_not_grow_with_programs(backend: Marked) -> None:
    def resident(programs: int) -> int:
        assert all(outcome.passed == 2 for outcome in run_many([ONE] * programs, backend=backend))
        gc.collect()
        return psutil.Process().memory_info().rss

    before = resident(100)
    assert resident(300) - before < 300 * 8 * 2**10  # 8 KB a program
