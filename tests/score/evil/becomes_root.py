# script passed calls
import os

done = []
for name, arguments in (
    ("setuid", (0,)),
    ("setgid", (0,)),
    ("setgroups", ([0],)),
    ("chroot", ("/tmp",)),
    ("mknod", ("/tmp/n", 0o60666, 0x800)),
):
    try:
        getattr(os, name)(*arguments)
        done.append(name)
    except OSError:
        pass
print(done or "contained")
