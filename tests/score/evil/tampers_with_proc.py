# script passed files
import os

try:
    os.listdir("/proc/1")
    open("/proc/sys/kernel/core_pattern", "w")
except OSError:
    print("contained")
