# script passed calls
import ctypes

libc = ctypes.CDLL(None, use_errno=True)

calls = {
    "unshare": (272, 0x10000000),
    "mount": (165, 0, 0, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "io_uring_setup": (425, 1, 0),
    "userfaultfd": (323, 0),
    "keyctl": (250, 0, -3),
    "add_key": (248, 0, 0, 0, 0, 0),
    "ptrace": (101, 16, 1, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "pidfd_open": (434, 1, 0),
    "pidfd_getfd": (438, 3, 0, 0),
    "prlimit": (302, 1, 7, 0, 0),
    "perf_event_open": (298, 0, 0, 0, 0, 0),
    "personality": (135, 0xFFFFFFFF),
    "setns": (308, 0, 0),
    "clone3": (435, 0, 0),
    "init_module": (175, 0, 0, 0),
    "swapon": (167, 0, 0),
    "seccomp": (317, 0, 0, 0),
    "open_by_handle_at": (304, 0, 0, 0),
    "memfd_secret": (447, 0),
    "landlock": (444, 0, 0, 0),
    "clone of a user namespace": (56, 0x10000011, 0, 0, 0, 0),
}
done = [
    name
    for name, (number, *arguments) in calls.items()
    if libc.syscall(number, *map(ctypes.c_long, arguments)) >= 0 or ctypes.get_errno() not in (1, 38)
]
print(done or "contained")
