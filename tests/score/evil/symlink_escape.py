# script passed files
import os

os.symlink("/../../etc/shadow", "/tmp/link")
os.symlink("/proc/1/root/etc/shadow", "/tmp/other")
for path in ("/tmp/link", "/tmp/other"):
    try:
        print(open(path).read())
    except OSError:
        pass
print("contained")
