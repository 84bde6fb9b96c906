# script passed files
import os

written = []
for folder in ("/", "/usr", "/usr/lib", "/python", "/python/lib", "/runner", "/packages/0", "/dev", "@OUTSIDE@"):
    try:
        with open(os.path.join(folder, "evil"), "w") as file:
            file.write("x")
        written.append(folder)
    except OSError:
        pass
try:
    os.remove("@OUTSIDE@/canary")
    written.append("removed")
except OSError:
    pass
print(written or "contained")
