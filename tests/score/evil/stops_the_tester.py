# call failed|runtime_error|timeout signals
import os
import signal


def f(x):
    for pid in range(1, 50):
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGSTOP)
            except OSError:
                pass
    return 1
