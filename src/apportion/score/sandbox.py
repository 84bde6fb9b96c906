"""Run programs that nobody has read: bubblewrap, limits, a filter of system calls, and a first process of our own.

What holds, and what does not, is in docs/sandbox.md. Nothing falls back to less: where bubblewrap does not work, an
error says why. `UnsafeSubprocess` is for who asks for it by name.
"""

import json
import marshal
import os
import random
import re
import select
import shutil
import signal
import site
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from apportion.score.boxed.frames import Broken, read_frame, write_frame
from apportion.score.seccomp import SandboxError, filter_program

BOXED = Path(__file__).parent / "boxed"
MODULES = ("__init__", "frames", "plain", "confine", "solver", "tester", "runner")
"""What runs in a box, in the order of its imports: of apportion nothing else."""

START = """
import marshal, os, select, sys

caller, *others = map(int, sys.argv.pop().split(","))
os.dup2(caller, 3)
for file in {caller, *others} - {3}:
    os.close(file)

def read(size):
    content = b""
    while len(content) < size:
        if 3 in select.select([0, 3], [], [])[0]:
            sys.exit("the caller is gone")
        content += os.read(0, size - len(content)) or sys.exit("nothing was sent")
    return content

for name, code in marshal.loads(read(int.from_bytes(read(4), "big"))):
    module = sys.modules[name] = type(sys)(name)
    module.__package__, module.__path__ = "boxed", []
    exec(code, vars(module))
    setattr(sys.modules["boxed"], name.rpartition(".")[2], module)
sys.modules["boxed.runner"].main()
"""
"""The first process of a box, for `python -I -S -c`: it is sent its modules, compiled already, which halves its start.

Arguments are folders that programs may import from, and at last descriptors: of the caller, whose end is that of the
box, which becomes 3, and of what is to be closed.
"""

LONGEST_MESSAGE = 2**31
ROOM = 60.0
"""Seconds that a box may take beyond its tests before it is killed from outside, as on a machine that is busy, or where
the kernel has much to take down."""


Promise = Literal[
    "verdict", "time", "memory", "output", "calls", "processes", "disk", "files", "network", "signals", "end"
]
"""What a backend may promise. `verdict`: it is formed outside of the program's process; `calls`: system calls are
filtered; `files`: those of the user, and the environment, are neither read nor written; `signals`: none reaches a
process of others; `end`: no process is left at the end. The others are `Limits`, and that nobody is reached."""

PROMISES: frozenset[Promise] = frozenset(get_args(Promise))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_seconds: For each test, and for what comes before the first call.
        total_seconds: For all tests of a program together; those that are left then are not run.
        cpu_seconds: For each process of the program.
        memory_bytes: Address space of each process.
        processes: Processes and threads at a time.
        output_bytes: Of standard output, and of a returned value; of standard error the end is kept.
        disk_bytes: Room in /tmp, and the longest file.

    Raises:
        ValueError: If a limit is not positive.
    """

    wall_seconds: float = 10.0
    total_seconds: float = 120.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    processes: int = 32
    output_bytes: int = 2**20
    disk_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        """Refuse what would let nothing run."""
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; choose a positive number")


@runtime_checkable
class Backend(Protocol):
    """A way to start the first process of a box."""

    def command(self, limits: Limits, info: int) -> list[str]:
        """The command that starts it; standard input and output carry messages, `info` may tell its process."""
        ...

    def user(self) -> int | None:
        """User that a program becomes; None to stay."""
        ...

    def promises(self) -> frozenset[Promise]:
        """What holds for its boxes; tests/score/test_conformance.py and `apportion sandbox check` try each."""
        return PROMISES


@dataclass(frozen=True)
class Bubblewrap(Backend):
    """Boxes by bubblewrap, as root or as an ordinary user.

    Attributes:
        packages: Whether programs may import what is installed beside apportion, such as numpy.
        as_root: Whether boxes are made with the rights of root, and each program becomes a user of its own; otherwise
            in a user namespace. By default as this process is.
    """

    packages: bool = True
    as_root: bool = field(default_factory=lambda: _is_root())

    @property
    def program(self) -> str:
        """Where bubblewrap is.

        Raises:
            SandboxError: If it is not installed.
        """
        found = shutil.which("bwrap")
        if found is None:
            raise SandboxError(
                "bubblewrap is not installed, which programs are run in; apt-get install bubblewrap (version 0.8 or "
                "later), or choose the backend unsafe-subprocess, which protects nothing"
            )
        return found

    def command(self, limits: Limits, info: int) -> list[str]:
        """What is bound, and what is not: no /proc, /etc, /home, /dev/shm."""
        prefix = os.path.realpath(sys.base_prefix)
        inside = Path("/python") / Path(os.path.realpath(sys.executable)).relative_to(prefix)
        rights = ("--cap-drop", "ALL", *(word for right in RIGHTS for word in ("--cap-add", right)))
        paths = [path for path in site.getsitepackages() if os.path.isdir(path)] if self.packages else []
        binds = [(prefix, "/python"), ("/usr/lib", "/usr/lib")]
        binds += [(path, path) for path in ("/usr/lib64",) if os.path.isdir(path)]
        binds += [(path, f"/packages/{number}") for number, path in enumerate(paths)]
        return [
            *(self.program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
            *("--as-pid-1", "--new-session", "--clearenv", "--info-fd", str(info)),  # the runner dies with it
            *(rights if self.as_root else ("--unshare-user", "--disable-userns", "--cap-drop", "ALL")),
            *(word for path in ("/usr", "/packages", "/dev") for word in ("--perms", "0755", "--dir", path)),
            *(word for pair in binds for word in ("--ro-bind", *pair)),
            *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
            *(word for name in DEVICES for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")),
            *("--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"),
            *("--chdir", "/tmp", "--setenv", "HOME", "/tmp", "--setenv", "LC_ALL", "C.UTF-8"),
            *("--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"),
            *(str(inside), "-I", "-S", "-B", "-c", START, *(f"/packages/{number}" for number in range(len(paths)))),
        ]

    def user(self) -> int | None:
        """As root another user for each box, for a limit of processes counts all of a user's."""
        return random.SystemRandom().randrange(200_000, 2**31 - 2) if self.as_root else None

    def promises(self) -> frozenset[Promise]:
        """All, but where root makes boxes as others do: Linux limits the processes of every user but root."""
        return PROMISES if self.as_root or not _is_root() else PROMISES - {"processes"}


def _is_root() -> bool:
    """Tell root of the machine, or of a container of its own, from who is called so in a user namespace."""
    every_user = ["0", "0", str(2**32 - 1)]
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == every_user


RIGHTS = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL")
"""What the first process of a box needs as root, to give up being root for the program."""

DEVICES = ("null", "zero", "urandom")


@dataclass(frozen=True)
class UnsafeSubprocess(Backend):
    """No box at all: the limits and the filter of system calls hold, files and users are those of this process."""

    def __post_init__(self) -> None:
        """Warn."""
        warnings.warn(
            "unsafe-subprocess runs programs with the rights and files of this process; use it where you trust them",
            stacklevel=3,
        )

    def command(self, limits: Limits, info: int) -> list[str]:  # noqa: ARG002
        """The runner as an ordinary process, which has nothing to tell of a box."""
        return [sys.executable, "-I", "-B", "-c", f"import os; os.close({info}){START}"]

    def user(self) -> int | None:
        """Stay."""
        return None

    def promises(self) -> frozenset[Promise]:
        """What needs no box; a program that is after more than its reward gets around these too, by files."""
        return frozenset({"verdict", "time", "memory", "output", "calls", "network"})


BackendName = Literal["bubblewrap", "unsafe-subprocess"]


def backend_named(name: BackendName) -> Backend:
    """Make a backend as settings name it: `bubblewrap`, or `unsafe-subprocess`, which protects nothing."""
    return {"bubblewrap": Bubblewrap, "unsafe-subprocess": UnsafeSubprocess}[name]()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program and how it is tested.

    Attributes:
        mode: `scripts`: once for each input, output compared outside; `checks`: tests in a process of their own;
            `calls`: a function with arguments, what it returns compared outside.
        program: Its source.
        tests: Inputs, sources of tests, or arguments in their plain form (`boxed.plain`).
        prelude: Source that the task promises to run before the program, such as imports.
        setup: Source before each test of `checks`.
        function: What `calls` calls.
    """

    mode: str
    program: str
    tests: Sequence[str]
    prelude: str = ""
    setup: str = ""
    function: str = ""


@dataclass(frozen=True)
class Sandbox:
    """Boxes for programs, one a job.

    Attributes:
        backend: How boxes are made.
        limits: What a program may use.
    """

    backend: Backend = field(default_factory=Bubblewrap)
    limits: Limits = field(default_factory=Limits)

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Run a program; wait until nothing of it is left.

        Returns:
            What the box told of each test, as far as it came, and of the program's end.

        Raises:
            SandboxError: If the box could not be made.
        """
        process, told = self._started()
        first = _first_process(process, told)
        try:
            found = [*self._messages(process, job)]
            process.wait(ROOM)
            return found
        except (Broken, subprocess.TimeoutExpired) as error:
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
            raise SandboxError(_explained(said or str(error))) from None
        finally:
            _end(process, first)

    def _started(self) -> tuple[subprocess.Popen, int]:
        """Start a box; return its process, and where it tells of its first process.

        The box is told of the caller by a pidfd, for its pipes may live on in processes that the caller forked. If the
        caller is killed meanwhile the box is still made, finds that, and ends. bubblewrap must neither be killed
        (`--die-with-parent`) nor fail to tell (so it holds both ends of the pipe): its child would wait for ever.
        """
        caller = os.pidfd_open(os.getpid())
        told, inside = os.pipe()
        pipe = subprocess.PIPE
        try:
            command = [*self.backend.command(self.limits, inside), f"{caller},{told}"]
            return subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=(caller, told, inside)
            ), told
        except BaseException:
            os.close(told)
            raise
        finally:
            os.close(inside)
            os.close(caller)

    def _messages(self, process: subprocess.Popen, job: Job) -> Iterator[dict[str, Any]]:
        """Send a job, and read what comes of it."""
        assert process.stdin is not None
        assert process.stdout is not None
        limits: dict[str, Any] = asdict(self.limits)
        if "processes" not in self.backend.promises():
            limits["processes"] = None  # which would count all of this user's, those outside included
        head = {"mode": job.mode, "program": job.program, "prelude": job.prelude, "limits": limits}
        head |= {"bpf": filter_program().hex(), "user": self.backend.user()}
        body = {"tests": list(job.tests), "setup": job.setup, "function": job.function}
        for part in (_modules(), json.dumps(head).encode(), json.dumps(body).encode()):
            write_frame(process.stdin.fileno(), part)
        yield from _received(process.stdout.fileno(), self.limits.wall_seconds + ROOM)


@cache
def _modules() -> bytes:
    """Compile what runs in a box, for a Python of this version."""
    names = ["boxed", *(f"boxed.{name}" for name in MODULES[1:])]
    texts = [(BOXED / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    made = [(name, compile(text, name, "exec", dont_inherit=True)) for name, text in zip(names, texts, strict=True)]
    return marshal.dumps(made)


def _first_process(process: subprocess.Popen, told: int) -> int:
    """Get hold of the first process of a box, whose end is that of all in it; of the process itself without one."""
    with os.fdopen(told, "rb") as file:
        info = file.read()
    try:
        return os.pidfd_open(json.loads(info)["child-pid"] if info else process.pid)
    except (ValueError, ProcessLookupError):
        return os.pidfd_open(process.pid)


def _end(process: subprocess.Popen, first: int) -> None:
    """Kill what is left, and wait until it is gone: the end of bwrap itself comes before that of the box."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(first, signal.SIGKILL)
    process.kill()
    select.select([first], [], [])
    os.close(first)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    process.wait()


def _received(file: int, patience: float) -> Iterator[dict[str, Any]]:
    """Read messages until the box is gone."""
    first = True
    while True:
        if not select.select([file], [], [], patience)[0]:
            raise Broken("the box does not answer")
        try:
            message = json.loads(read_frame(file, LONGEST_MESSAGE))
        except Broken:
            if first:
                raise
            return
        first = False
        if message["end"] == "broken":
            raise Broken(message["message"])
        yield message


REMEDIES = (
    ("could not be confined", "leave as_root of Bubblewrap to its default, for this takes all the rights of root"),
    ("Unknown option", "this bubblewrap is too old: version 0.8 or later is needed (Debian 12, Ubuntu 24.04)"),
    (
        "namespace|Operation not permitted|uid map",
        "bubblewrap may not make namespaces here: load its AppArmor profile (Ubuntu 24.04: apt-get install "
        "apparmor-profiles), set sysctl kernel.unprivileged_userns_clone=1 and user.max_user_namespaces above 0, or in "
        "a container allow it to make them (docker run --security-opt seccomp=unconfined, or --privileged)",
    ),
)
"""What to do where bubblewrap cannot work, by what was said of it."""


def _explained(said: str) -> str:
    """Say what to do where bubblewrap cannot work."""
    remedies = (f"; {remedy}" for words, remedy in REMEDIES if re.search(words, said))
    return f"no box could be made: {said}{next(remedies, '')}"
