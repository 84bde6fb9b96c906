"""The system calls that a program in a box may make: what Python, its threads and numpy need. All others fail."""

import errno
import tempfile
from functools import cache

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev lseek open openat openat2 close close_range stat fstat lstat
newfstatat statx access faccessat faccessat2 getdents getdents64 readlink readlinkat getcwd chdir fchdir mkdir mkdirat
rmdir unlink unlinkat rename renameat renameat2 truncate ftruncate fallocate fsync fdatasync umask chmod fchmod
fchmodat utime utimes utimensat futimesat link linkat symlink symlinkat flock fcntl dup dup2 dup3 pipe pipe2 eventfd
eventfd2 select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait mmap munmap mremap
mprotect madvise brk msync mincore membarrier rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigpending
rt_sigtimedwait sigaltstack pause alarm setitimer getitimer timer_create timer_settime timer_gettime timer_delete
nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getpid getppid gettid getuid geteuid
getgid getegid getgroups getresuid getresgid getpgrp getpgid getsid getrlimit getrusage sysinfo uname getrandom getcpu
sched_yield sched_getaffinity sched_getparam sched_getscheduler futex futex_waitv set_robust_list get_robust_list
set_tid_address rseq arch_prctl restart_syscall recvfrom sendto shutdown getsockopt setsockopt getsockname getpeername
fork vfork wait4 waitid exit exit_group kill tkill tgkill setsid setpgid
"""
"""Of sockets there is `socketpair` alone, without which asyncio does not start; so there is nobody to send to."""

NEW_NAMESPACES = 0x7E020080
"""Flags of `clone` that make namespaces: NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""

REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""`ioctl`: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not TIOCSTI, which types into a terminal."""

AF_UNIX = 1


class SandboxError(RuntimeError):
    """A box cannot be made, or broke; says nothing of the program."""


@cache
def filter_program() -> bytes:
    """Make the filter, as the kernel takes it.

    Raises:
        SandboxError: If pyseccomp or libseccomp is not there.
    """
    try:
        from pyseccomp import ALLOW, EQ, ERRNO, KILL_PROCESS, MASKED_EQ, Arg, Attr, SyscallFilter
    except (ImportError, RuntimeError, OSError) as error:
        raise SandboxError(
            f"the sandbox needs a filter of system calls, and pyseccomp cannot be loaded ({error}); "
            "pip install 'apportion[programs]', and apt-get install libseccomp2"
        ) from error
    rules = SyscallFilter(ERRNO(errno.EPERM))
    rules.set_attr(Attr.ACT_BADARCH, KILL_PROCESS)
    for name in ALLOWED.split():
        try:
            rules.add_rule(ALLOW, name)
        except OSError as error:  # a name that this architecture does not have
            if error.errno != errno.EFAULT:
                raise
    # glibc asks for clone3 first, whose flags a filter cannot see; without it, it asks for clone.
    rules.add_rule(ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(ALLOW, "clone", Arg(0, MASKED_EQ, NEW_NAMESPACES, 0))
    for request in REQUESTS:
        rules.add_rule(ALLOW, "ioctl", Arg(1, EQ, request))
    rules.add_rule(ALLOW, "socketpair", Arg(0, EQ, AF_UNIX))
    rules.add_rule(ALLOW, "prlimit64", Arg(0, EQ, 0), Arg(2, EQ, 0))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
