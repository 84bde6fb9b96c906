# script passed processes
import os
import threading
import time

threading.stack_size(2**16)  # so that it is not memory that ends it
started = 0
try:
    while started < 1000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError:
    os.write(1, b"contained" if 8 < started < 32 else str(started).encode())
os._exit(0)
