# script passed files
import os

for number, place in enumerate(("/../../etc/passwd", "/proc/1/root/etc/passwd", "/../../@OUTSIDE@/canary")):
    os.symlink(place, f"/tmp/link{number}")
    try:
        print(open(f"/tmp/link{number}").read())
    except OSError:
        pass
print("contained")
