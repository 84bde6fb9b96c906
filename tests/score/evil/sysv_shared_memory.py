# script passed calls
import ctypes

libc = ctypes.CDLL(None, use_errno=True)

print("contained" if libc.shmget(0, 2**20, 0o1600) < 0 else "escaped")
