# script passed calls
import os
import subprocess
import sys

done = []
for run in (
    lambda: subprocess.run([sys.executable, "-c", "1"], check=True),
    lambda: os.system("true") and 1 / 0,
    lambda: os.posix_spawn(sys.executable, ["python3", "-c", "1"], {}),
):
    try:
        run()
        done.append(1)
    except (OSError, ZeroDivisionError, subprocess.SubprocessError):
        pass
print(done or "contained")
