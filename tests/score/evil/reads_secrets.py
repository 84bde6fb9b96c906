# script passed
import os

found = []
for path in ("/etc/shadow", "/etc/passwd", "/root/.ssh", "/home", "/work", "/proc/1/environ", "/var"):
    try:
        found.append(open(path).read() if not os.path.isdir(path) else os.listdir(path))
    except OSError:
        pass
found += [name for name in os.environ if "CANARY" in name or "TOKEN" in name]
print(found or "contained")
