# script passed
import os
import time

children = []
for _ in range(20):
    if (pid := os.fork()) == 0:
        time.sleep(0.5)
        os._exit(0)
    children.append(pid)
print("contained" if not any(os.waitpid(pid, 0)[1] for pid in children) else "")
