# script timeout processes
import ctypes

libc = ctypes.CDLL(None, use_errno=True)

while True:
    if libc.syscall(56, 17, 0, 0, 0, 0) < 0:
        libc.sleep(60)
