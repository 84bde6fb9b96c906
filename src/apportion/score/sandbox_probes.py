"""Programs that try what a box is to prevent, each harmless where nothing prevents it, and what is there to be reached.

A probe says what it saw as `[held, text]`; one whose limit ends it says `started` first. Of anything else nothing is
known. What can be seen from outside, such as a connection or the end of a process, is looked at there too.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.score.sandbox import Limits, Promise

MB = 2**20


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A program that tries one thing.

    Attributes:
        name: What it tries.
        promise: What is to hold; None for what an honest program needs.
        program: Its source, after `HEAD`.
        limits: What it may use.
        ended_by: What is said of its end, where a limit is to end it.
    """

    name: str
    promise: Promise | None
    program: str
    limits: Limits = Limits(wall_seconds=20)  # noqa: RUF009
    ended_by: str = ""


HEAD = """
import json, os, sys
given = json.loads(input() or "{}")

def tell(held, seen):
    print(json.dumps([bool(held), seen]), flush=True)
    os._exit(0)

def tried(does, *args, **keywords):
    try:
        does(*args, **keywords)
    except (OSError, ImportError) as error:
        return error.strerror or str(error)
"""

CALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = {"unshare": (0,), "personality": (0xffffffff,), "memfd_create": (b"probe", 0), "setns": (-1, 0)}
answered = []
for name, arguments in calls.items():
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) >= 0 or ctypes.get_errno() not in (1, 38):
        answered.append(name)
tell(not answered, "answered: " + ", ".join(answered) if answered else ", ".join(calls) + ": not permitted")
"""

NETWORK = """
import socket
def reach(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as end:
        end.settimeout(1)
        end.connect(address)
said = [tried(reach, socket.AF_INET, ("127.0.0.1", given["port"])),
        tried(reach, socket.AF_UNIX, "\\0" + given["abstract"])]
tell(all(said), "; ".join(f"{name}: {text or 'reached'}" for name, text in zip(("loopback", "abstract unix"), said)))
"""

READING = """
read = [path for path in given["files"] if not tried(lambda: open(path, "rb").read(1))]
tell(not read, "read " + ", ".join(read) if read else "of " + ", ".join(given["files"]) + " nothing can be read")
"""

ENVIRONMENT = """
seen = given["variable"] in os.environ
tell(not seen, given["variable"] + (" is there" if seen else f" is not there; {len(os.environ)} others are"))
"""

WRITING = """
def write(folder):
    os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600))  # a file without a name, gone when closed
def mark():
    with open(given["mark"], "w") as file:
        file.write("x")
written = [folder for folder in given["folders"] if not tried(write, folder)]
written += [given["mark"]] if not tried(mark) else []
tell(not written, "written: " + ", ".join(written) if written else "refused in " + ", ".join(given["folders"]))
"""

MEMORY = """
held, most = [], 256
try:
    while len(held) < 2 * most:
        held.append(bytearray(2**20))
    taken = None
except MemoryError:
    taken = len(held)
    held.clear()
said = "none was refused" if taken is None else f"MemoryError after {taken} MB, {most} allowed"
tell(taken is not None and taken <= most, said)
"""

PROCESSES = """
import time
started, most = 0, 16
try:
    while started < 3 * most:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        started += 1
    said = "none was refused"
except OSError as error:
    said = error.strerror
tell(started < most, f"{started} started, {most} allowed: {said}")
"""

STARTED = """
import time
print("started", flush=True)
"""

DISK = """
import tempfile
most, written = 8, 0
with tempfile.TemporaryDirectory() as folder:
    try:
        while written < 3 * most:
            with open(f"{folder}/{written}", "wb") as file:
                file.write(bytes(2**20))
            written += 1
        said = "none was refused"
    except OSError as error:
        said = error.strerror
tell(written <= most, f"{written} MB written, {most} allowed: {said}")
"""

SIGNALS = """
import signal
said = tried(os.kill, given["victim"], signal.SIGTERM)
tell(said, f"to a process of the user: {said or 'delivered'}")
"""

ORPHAN = """
import time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, b"x")
        time.sleep(30)
    os._exit(0)
os.read(read, 1)
tell(True, "a process that left its parent is gone")
"""

THREADS = """
import threading
done = []
threads = [threading.Thread(target=done.append, args=(n,)) for n in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
tell(len(done) == 8, f"{len(done)} of 8 ran")
"""

NUMPY = """
import numpy as np
tell(np.linalg.inv(np.eye(100)).trace() == 100, f"numpy {np.__version__} inverts a matrix")
"""

PROBES = (
    Probe(name="system calls", promise="calls", program=CALLS),
    Probe(name="network", promise="network", program=NETWORK),
    Probe(name="reading files", promise="files", program=READING),
    Probe(name="environment", promise="files", program=ENVIRONMENT),
    Probe(name="writing outside /tmp", promise="files", program=WRITING),
    Probe(
        name="memory",
        promise="memory",
        program=MEMORY,
        limits=Limits(wall_seconds=20, memory_bytes=256 * MB),
    ),
    Probe(name="processes", promise="processes", program=PROCESSES, limits=Limits(wall_seconds=20, processes=16)),
    Probe(
        name="wall time",
        promise="time",
        program=STARTED + "time.sleep(20)",
        limits=Limits(wall_seconds=1),
        ended_by="more time than is allowed",
    ),
    Probe(
        name="CPU time",
        promise="time",
        program=STARTED + "while True: pass",
        limits=Limits(wall_seconds=20, cpu_seconds=0.5),
        ended_by="more CPU time than is allowed",
    ),
    Probe(
        name="output",
        promise="output",
        program=STARTED + "for _ in range(4000): print('x' * 1000)",
        limits=Limits(wall_seconds=20, output_bytes=MB),
        ended_by="more output than is allowed",
    ),
    Probe(name="disk", promise="disk", program=DISK, limits=Limits(wall_seconds=20, disk_bytes=8 * MB)),
    Probe(name="signals to others", promise="signals", program=SIGNALS),
    Probe(name="nothing is left", promise="end", program=ORPHAN),
    Probe(name="threads run", promise=None, program=THREADS),
    Probe(name="numpy runs", promise=None, program=NUMPY),
)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What probes reach for, made for them alone.

    Attributes:
        given: What they are told of it.
        victim: A process that they try to end.
        listeners: Sockets that they try to connect to.
    """

    given: dict[str, Any]
    victim: subprocess.Popen
    listeners: tuple[socket.socket, ...]

    def harm(self, name: str) -> str:
        """Say what a probe has done, as it is seen from outside; nothing if it has done nothing."""
        if name == "network":
            for listener in self.listeners:
                try:
                    listener.accept()[0].close()
                    return "a connection came"
                except BlockingIOError:
                    continue
        if name == "writing outside /tmp" and os.path.exists(self.given["mark"]):
            return f"{self.given['mark']} was written"
        if name == "signals to others" and self.victim.poll() is not None:
            return "a process of the user was ended"
        return ""


@contextmanager
def surroundings() -> Iterator[Surroundings]:
    """Make what probes reach for, and take it away again."""
    variable, word = f"APPORTION_PROBE_{secrets.token_hex(4).upper()}", secrets.token_hex(8)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "secret").write_text(word)
        folder.chmod(0o777)  # so that it is not for its mode that another user cannot read or write in it
        listeners = (socket.socket(), socket.socket(socket.AF_UNIX))
        for listener, address in zip(listeners, (("127.0.0.1", 0), f"\0{word}"), strict=True):
            stack.enter_context(listener)
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
        victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"])
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        os.environ[variable] = word
        stack.callback(os.environ.pop, variable)
        given = {
            "files": [str(folder / "secret"), "/etc/passwd", f"/proc/{os.getpid()}/environ"],
            "folders": ["/", "/usr/lib", sys.base_prefix, str(folder)],
            "mark": str(folder / "mark"),
            "variable": variable,
            "port": listeners[0].getsockname()[1],
            "abstract": word,
            "victim": victim.pid,
        }
        yield Surroundings(given=given, victim=victim, listeners=listeners)
