# script passed memory
import os

files = []
try:
    while True:
        files.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    os.write(1, b"contained")
