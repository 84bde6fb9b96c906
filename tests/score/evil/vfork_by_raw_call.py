# script timeout processes
import ctypes

libc = ctypes.CDLL(None, use_errno=True)

while True:  # each child goes on in its parent's memory, and none but the last of them runs
    if libc.syscall(58) < 0:
        libc.sleep(60)
