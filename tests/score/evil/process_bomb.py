# script passed processes
import os
import time

started = 0
try:
    while started < 200:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
except OSError:
    pass
print("contained" if 8 < started < 32 else started)
