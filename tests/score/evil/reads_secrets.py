# script passed files
import os

found = []
places = ("/etc/shadow", "/etc/passwd", "/root/.ssh", "/home", "/work", "/proc/1/environ", "/proc/self/environ", "/var")
for path in (*places, "@OUTSIDE@", "@OUTSIDE@/canary", os.path.expanduser("~/.ssh")):
    try:
        found.append(open(path).read() if not os.path.isdir(path) else os.listdir(path))
    except OSError:
        pass
found += [name for name in os.environ if "CANARY" in name or "TOKEN" in name]
print(found or "contained")
