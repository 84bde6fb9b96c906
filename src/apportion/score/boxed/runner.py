"""The first process of a box: forks the program and its tests, holds the clock, and tells how each ended.

It executes nothing untrusted. Messages come in by descriptor 0 and go out by descriptor 1; the program has neither.
The job comes first, then the tests, which are read when the program's process is there already.
"""

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from . import solver, tester
from .confine import confine, die_with_parent
from .frames import CALLER, HEADER, Broken, read_frame, write_frame

ANY_LENGTH = 2**31
STDERR_KEPT = 4096
GRACE = 0.3
"""Seconds that a process which has closed its pipe has to end."""

NOT_BEGUN = 70
"""Exit status of a process that could not be confined, in which nothing of the program has run."""

FINAL = ("error", "timeout", "compile_error", "broken")
"""After one of these no further test is run."""


class Child:
    """A forked process, and what it writes.

    Attributes:
        pid: Its number in the box.
        outputs: What came through each pipe, by name.
        full: Pipes that held more than they may.
        end: How it ended: `code` (negative for a signal) and `cpu` seconds; None while it runs.
    """

    def __init__(self, work: Callable[..., None], given: dict[str, int], most: dict[str, int]) -> None:
        """Fork; `work` gets the descriptors of `given`, then the writing ends of pipes that hold `most` bytes."""
        ends = {name: os.pipe() for name in most}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work([*given.values(), *(write for _, write in ends.values())])
            except BaseException as error:
                solver.show(error)
            os._exit(NOT_BEGUN)
        for file in (*given.values(), *(write for _, write in ends.values())):
            os.close(file)
        self.names = {read: name for name, (read, _) in ends.items()}
        self.most = most
        self.outputs = {name: bytearray() for name in most}
        self.full: set[str] = set()
        self.end: dict[str, float] | None = None
        self.pidfd = os.pidfd_open(self.pid)

    def files(self) -> list[int]:
        """What to wait for: its pipes, and its end."""
        return [*self.names, *([self.pidfd] if self.end is None else [])]

    def take(self, file: int) -> None:
        """Read what there is."""
        if file == self.pidfd:
            _, status, used = os.wait4(self.pid, 0)
            self.end = {"code": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}
            return
        part, name = os.read(file, 2**16), self.names[file]
        if not part:
            os.close(file)
            del self.names[file]
            return
        kept = self.outputs[name]
        kept += part
        if len(kept) > self.most[name]:
            self.full.add(name)
            del kept[: len(kept) - self.most[name]]  # of errors the end tells most; of the rest nothing is used then

    def close(self) -> None:
        """Let go of its descriptors."""
        for file in (*self.names, self.pidfd):
            os.close(file)
        self.names = {}


class Runner:
    """What the jobs of a box have in common."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.limits = job, job["limits"]
        self.is_alone = os.getpid() == 1 and not os.listdir("/tmp")
        self.deadline = time.monotonic() + self.limits["total_seconds"]
        self.bpf = bytes.fromhex(job["bpf"])
        self.most = {"stdout": self.limits["output_bytes"], "stderr": STDERR_KEPT, "status": STDERR_KEPT}

    def scripts(self) -> None:
        """Run the program once for each input, and tell what it printed."""
        for text in json.loads(read_frame(0, ANY_LENGTH, of_caller=True))["tests"]:
            given = os.memfd_create("stdin")
            os.write(given, text.encode("utf-8", "surrogatepass"))
            os.lseek(given, 0, os.SEEK_SET)

            def work(files: list[int]) -> None:
                self._confine(files)
                solver.run_script(solver.compiled(self.job["program"], 3), self.job["prelude"])

            begin = time.monotonic()
            child = Child(work, {"stdin": given}, self.most)
            end = self._wait([child], begin)
            self._clear([child])
            told = self._told(child, end)
            told["stdout"] = child.outputs["stdout"].decode("utf-8", "replace")
            tell(told | {"seconds": time.monotonic() - begin})
            if told["end"] in FINAL:
                return
            self._tidy()

    def _tidy(self) -> None:
        """Empty /tmp, so that no test sees what another one left; not where it held something before the first."""
        if not self.is_alone or not os.listdir("/tmp"):
            return

        def work(_: list[int]) -> None:
            self._confine([os.open("/dev/null", os.O_RDWR)] * 3)
            solver.remove_all("/tmp")
            os._exit(0)

        child = Child(work, {}, {})
        self._wait([child], time.monotonic())
        self._clear([child])

    def calls(self) -> None:
        """Run the program once, and its tests in a process of their own."""
        asked, answered = os.pipe(), os.pipe()
        nothing = os.open("/dev/null", os.O_RDONLY)
        longest = self.limits["output_bytes"]

        def work(files: list[int]) -> None:
            self._confine([files[0], files[3], files[4], files[5], files[1], files[2]])
            solver.serve(solver.compiled(self.job["program"], 3), self.job["prelude"], 4, 5, longest)

        program = Child(work, {"stdin": nothing, "asked": asked[0], "answered": answered[1]}, self.most)
        # Only now are the tests read: the program's process was forked before.
        tests = self.job | json.loads(read_frame(0, ANY_LENGTH, of_caller=True))

        def test(files: list[int]) -> None:
            nothing = os.open("/dev/null", os.O_RDWR)
            self._confine([nothing, nothing, nothing, files[2], files[0], files[1]], apart=1)
            tester.run(tester.Program(4, 5, longest), tests, 3)

        asking = Child(test, {"asked": asked[1], "answered": answered[0]}, {"results": ANY_LENGTH})
        for place in range(-1, len(tests["tests"])):  # the first message is of what comes before the first test
            begin = time.monotonic()
            frame = self._ended(self._frame([program, asking], begin), program)
            if place >= 0 or frame["end"] != "ready":
                tell(frame | {"seconds": time.monotonic() - begin})
            if frame["end"] in FINAL:
                break
        self._clear([program, asking])

    def _ended(self, frame: dict[str, Any] | str, program: Child) -> dict[str, Any]:
        """Where the program is gone, say how."""
        if isinstance(frame, dict) and not frame.get("died"):
            return frame
        if isinstance(frame, dict) or frame == "exit":  # the end of the pipe is seen before that of the process
            self._wait([program], time.monotonic() - self.limits["wall_seconds"] + GRACE)
        told = self._told(program, frame if isinstance(frame, str) else "exit")
        if told["end"] in ("exit", "stopped"):
            told |= {"end": "error", "message": "the program or its tests ended without an answer"}
        return told

    def _frame(self, children: list[Child], begin: float) -> dict[str, Any] | str:
        """Wait for the next result of the tests; or say what came instead."""
        results = children[1].outputs["results"]
        while True:
            if len(results) >= HEADER.size and len(results) >= (size := HEADER.size + HEADER.unpack(results[:4])[0]):
                frame = json.loads(results[HEADER.size : size])
                del results[:size]
                return frame
            if "results" not in children[1].names.values():
                return "exit"
            if end := self._step(children, begin):
                return end

    def _wait(self, children: list[Child], begin: float) -> str:
        """Wait until the first of some processes has ended."""
        while children[0].end is None:
            if end := self._step(children, begin):
                return end
        for file in [*children[0].names]:  # what it left in its pipes, not what its orphans still write
            os.set_blocking(file, False)
            with contextlib.suppress(BlockingIOError):
                while file in children[0].names and not children[0].full & {"stdout"}:
                    children[0].take(file)
        return "output" if "stdout" in children[0].full else "exit"

    def _step(self, children: list[Child], begin: float) -> str:
        """Wait for something and read it; say if a limit is reached.

        Raises:
            Broken: If the caller is gone.
        """
        left = min(begin + self.limits["wall_seconds"], self.deadline) - time.monotonic()
        if left <= 0:
            return "timeout"
        owners = {file: child for child in children for file in child.files()}
        ready = select.select([CALLER, *owners], [], [], left)[0]
        if CALLER in ready:
            raise Broken("nobody waits for an answer")
        for file in ready:
            owners[file].take(file)
        return "output" if any("stdout" in child.full for child in children) else ""

    def _told(self, child: Child, end: str) -> dict[str, Any]:
        """Say how a program ended."""
        status = bytes(child.outputs["status"])
        told: dict[str, Any] = {"stderr": child.outputs["stderr"].decode("utf-8", "replace")}
        if not status and child.end is not None and child.end["code"] == NOT_BEGUN:
            why = told["stderr"].strip().rpartition("\n")[2]
            told |= {"end": "broken", "message": f"a program could not be confined: {why}"}
        elif not status and child.end is None and end == "exit":
            told |= {"end": "stopped"}
        elif not status.startswith(solver.COMPILED) and end == "exit":
            line, _, message = status.decode("utf-8", "replace").partition(" ")
            told |= {"end": "compile_error", "line": int(line or 0), "message": message or "the compiler died"}
        elif end != "exit":
            kind, what = ("timeout", "time") if end == "timeout" else ("error", end)
            told |= {"end": kind, "message": f"more {what} than is allowed"}
        elif child.end is None:
            told |= {"end": "stopped"}
        elif child.end["cpu"] > self.limits["cpu_seconds"]:
            told |= {"end": "timeout", "message": "more CPU time than is allowed"}
        elif child.end["code"]:
            told |= {"end": "error", "message": _ending(int(child.end["code"]))}
        else:
            told |= {"end": "exit"}
        return told

    def _confine(self, files: list[int], apart: int = 0) -> None:
        user = self.job["user"]
        confine(files, None if user is None else user + apart, self.limits, self.bpf)

    def _clear(self, children: list[Child]) -> None:
        """Kill whatever runs, orphans too, and wait until nothing is left."""
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all but this process, which is the first of its namespace
        else:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        for child in children:
            if child.end is None:
                child.take(child.pidfd)
            child.close()
        with contextlib.suppress(ChildProcessError):
            while os.getpid() == 1:
                os.wait()


def tell(found: dict[str, Any]) -> None:
    """Send a message out of the box."""
    write_frame(1, json.dumps(found).encode())


def _ending(code: int) -> str:
    return f"exit status {code}" if code > 0 else f"killed by signal {-code} ({signal.Signals(-code).name})"


def main() -> None:
    """Do the job, and end: the box ends with its first process."""
    if os.getpid() == 1:
        die_with_parent()  # bubblewrap, outside
    try:
        job = json.loads(read_frame(0, ANY_LENGTH, of_caller=True))
        runner = Runner(job)
        runner.scripts() if job["mode"] == "scripts" else runner.calls()
    except Broken:
        os._exit(1)  # nobody waits for an answer
    os._exit(0)
