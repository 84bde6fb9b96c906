# script passed
import os
import threading
import time

started = 0
try:
    while started < 10_000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError:
    os.write(1, b"contained")
os._exit(0)
