"""`apportion sandbox check`: what holds for programs on this machine, seen by running some that try."""

import json
import os
import secrets
import signal
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from apportion.data.problems import Tests
from apportion.score.programs import run_tests
from apportion.score.sandbox import (
    Backend,
    BackendName,
    Bubblewrap,
    Job,
    Limits,
    Promise,
    Sandbox,
    SandboxError,
    backend_named,
)
from apportion.score.sandbox_probes import HEAD, PROBES, Probe, Surroundings, surroundings

State = Literal["holds", "does not hold", "unknown"]
COLOURS = {"holds": "green", "does not hold": "red", "unknown": "yellow"}

CHEATS = {
    "an object that equals everything": "class A:\n    __eq__ = lambda *_: True\ndef f(x): return A()",
    "an exit in a call": "import os\ndef f(x): os._exit(0)",
    "a forged result": "print('passed')\nraise SystemExit(0)",
}


@dataclass(frozen=True, kw_only=True)
class SandboxCheck:
    """Settings of `apportion sandbox check`.

    Attributes:
        action: What to do.
        backend: How boxes are made.
    """

    action: Literal["check"] = "check"
    backend: BackendName = "bubblewrap"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was seen of one promise.

    Attributes:
        name: What was tried.
        promise: What it belongs to; None for what honest programs need.
        state: `unknown` where the try itself did not come about.
        seen: How.
    """

    name: str
    promise: Promise | None
    state: State
    seen: str


@dataclass(frozen=True)
class Marked(Backend):
    """A backend whose processes can be told from others by a word in their command line.

    Attributes:
        inner: The backend.
        word: The word; to programs it is one more folder to import from, which is not there.
    """

    inner: Backend
    word: str

    def command(self, limits: Limits, info: int) -> list[str]:
        """As the other one, and the word."""
        return [*self.inner.command(limits, info), f"/{self.word}"]

    def user(self) -> int | None:
        """As the other one."""
        return self.inner.user()

    def promises(self) -> frozenset[Promise]:
        """As the other one."""
        return self.inner.promises()

    def alive(self) -> list[int]:
        """List the processes of its boxes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended meanwhile
                found += [int(path.parent.name)] if self.word.encode() in path.read_bytes() else []
        return found


def check(settings: SandboxCheck) -> None:
    """Print what holds on this machine.

    Raises:
        SandboxError: If no box can be made, or something does not hold or is not known.
    """
    backend = backend_named(settings.backend)
    found = findings(backend)
    table = Table("promise", "here", "seen", title=f"{settings.backend}: {_about(backend)}", title_justify="left")
    for finding in found:
        table.add_row(finding.name, f"[{COLOURS[finding.state]}]{finding.state}[/]", finding.seen)
    Console().print(table)
    wrong = {state: [finding.name for finding in found if finding.state == state] for state in COLOURS}
    said = [f"{state}: {', '.join(names)}" for state, names in wrong.items() if names and state != "holds"]
    if said:
        remedy = " (unsafe-subprocess promises no more; choose bubblewrap)" if settings.backend != "bubblewrap" else ""
        raise SandboxError(f"{'; '.join(said)}{remedy}")


def findings(backend: Backend) -> list[Finding]:
    """See what holds for the boxes of a backend, a user's own included.

    Raises:
        SandboxError: If no box can be made.
    """
    marked = Marked(backend, f"probe-{secrets.token_hex(8)}")
    seconds = _seconds(marked)
    with surroundings() as around, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tries = [pool.submit(_found, marked, probe, around) for probe in PROBES]
        tries.append(pool.submit(_cheated, marked))
        found = [done.result() for done in tries]
    places = [place for place, finding in enumerate(found) if finding.promise == "end"]
    found[places[0]] = _left(marked, found[places[0]])
    return [*found, Finding(name="seconds a program", promise=None, state="holds", seen=seconds)]


def _seconds(backend: Backend) -> str:
    """Time a program that does nothing.

    Raises:
        SandboxError: If no box can be made, or a program in it does nothing right.
    """
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        (told,) = Sandbox(backend).run(Job(mode="scripts", program="print(1)", tests=[""]))
        times.append(time.perf_counter() - begin)
        if told["end"] != "exit" or told["stdout"] != "1\n":
            raise SandboxError(f"a program that prints 1 cannot be run: {_ended(told)}")
    return f"{statistics.median(times):.3f}, median of {len(times)}"


def _found(backend: Backend, probe: Probe, around: Surroundings) -> Finding:
    """Run a probe, and look from inside and outside at what it did."""
    state, seen = "unknown", ""
    try:
        job = Job(mode="scripts", program=HEAD + probe.program, tests=[json.dumps(around.given)])
        (told,) = Sandbox(backend, probe.limits).run(job)
        state, seen = _ended_by(probe, told) if probe.ended_by else _said(told)
    except SandboxError as error:
        seen = str(error)
    if harm := around.harm(probe.name):
        state, seen = "does not hold", harm
    return Finding(name=probe.name, promise=probe.promise, state=state, seen=seen)


def _said(told: dict[str, Any]) -> tuple[State, str]:
    """Read what a probe says of itself, if it came so far."""
    try:
        held, seen = json.loads(told["stdout"])
    except ValueError:
        return "unknown", f"the probe itself ended before: {_ended(told)}"
    return "holds" if held else "does not hold", str(seen)


def _ended_by(probe: Probe, told: dict[str, Any]) -> tuple[State, str]:
    """See whether a probe was ended by the limit that was to end it, after it had begun."""
    if told["end"] in ("timeout", "error") and told["message"] == probe.ended_by:
        if told["stdout"] and len(told["stdout"]) <= probe.limits.output_bytes:
            return "holds", f"ended after {told['seconds']:.1f} seconds: {probe.ended_by}"
        return "unknown", "the probe was ended before it had begun"
    if told["end"] == "exit" or (told["end"] == "timeout" and told["stdout"]):
        return "does not hold", f"the probe went on: {_ended(told)}"
    return "unknown", f"the probe itself ended before: {_ended(told)}"


def _ended(told: dict[str, Any]) -> str:
    last = str(told.get("stderr", "")).strip().rpartition("\n")[2]
    return " ".join(filter(None, (told["end"], str(told.get("message", "")), last)))


def _cheated(backend: Backend) -> Finding:
    """See whether programs pass that are wrong, and one that is right."""

    def passes(program: str) -> bool:
        return run_tests(program, Tests(checks=["assert f(1) == 'right'"]), backend=backend).passed == 1

    try:
        through = [name for name, program in CHEATS.items() if passes(program)]
        right = passes("def f(x): return 'right'")
    except SandboxError as error:
        return Finding(name="verdict", promise="verdict", state="unknown", seen=str(error))
    if not right:
        return Finding(name="verdict", promise="verdict", state="unknown", seen="a program that is right fails as well")
    seen = f"passed: {', '.join(through)}" if through else f"fail: {', '.join(CHEATS)}; what is right passes"
    return Finding(name="verdict", promise="verdict", state="does not hold" if through else "holds", seen=seen)


def _left(backend: Marked, finding: Finding) -> Finding:
    """See whether a process of any box is still there; and whether it would have been seen."""
    if finding.state != "holds":
        return finding
    left = backend.alive()
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    if left:
        return _with(finding, "does not hold", f"{len(left)} of its processes went on; they are ended now")
    seen = _seen_alive(backend)
    if not seen:
        return _with(finding, "unknown", "the processes of a box cannot be seen in /proc")
    return _with(finding, "holds", f"{seen} processes seen while a box ran, none of any box after")


def _with(finding: Finding, state: State, seen: str) -> Finding:
    return Finding(name=finding.name, promise=finding.promise, state=state, seen=seen)


def _seen_alive(backend: Marked) -> int:
    """Count the processes of a box while it runs."""
    with ThreadPoolExecutor(1) as pool:
        job = Job(mode="scripts", program="import time; time.sleep(20)", tests=[""])
        running = pool.submit(Sandbox(backend, Limits(wall_seconds=1)).run, job)
        most = 0
        while not running.done():
            most = max(most, len(backend.alive()))
            time.sleep(0.05)
        return most


def _about(backend: Backend) -> str:
    """Name what makes the boxes, and how."""
    if not isinstance(backend, Bubblewrap):
        return "no box at all"
    said = subprocess.run([backend.program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    how = "as root, each program another user" if backend.as_root else "in a user namespace"
    return f"{said} ({backend.program}), {how}"
