"""Give up everything that a program is not to have: descriptors, user, memory, system calls. For a forked process."""

import ctypes
import os
import resource
import signal
from collections.abc import Mapping
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

# Loaded once, by the process that forks.
LIBC = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """A BPF program, as the kernel takes it."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def confine(files: list[int], user: int | None, limits: Mapping[str, Any], bpf: bytes) -> None:
    """Confine this process for good.

    Args:
        files: Descriptors that become 0, 1, 2, ...; all others are closed.
        user: User and group to become; None to stay.
        limits: Fields of `Limits`; `processes` may be None.
        bpf: The filter of system calls.
    """
    os.setsid()
    high = [os.dup2(file, 100 + place) for place, file in enumerate(files)]
    for place, file in enumerate(high):
        os.dup2(file, place)
    os.closerange(len(files), 4096)
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(sign, signal.SIG_DFL)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _limit(limits)
    die_with_parent()  # only now: a change of user clears it
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(bpf, len(bpf))
    program = _Program(len(bpf) // 8, ctypes.addressof(buffer))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(limits: Mapping[str, Any]) -> None:
    """Set the limits of this process; soft and hard alike, so that they cannot be raised."""
    cpu = int(limits["cpu_seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        if value is not None:
            resource.setrlimit(kind, (value, value))


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if LIBC.prctl(ctypes.c_int(option), *padded) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
