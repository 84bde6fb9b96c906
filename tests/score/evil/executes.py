# script passed
import os
import subprocess

done = []
for run in (
    lambda: subprocess.run(["/python/bin/python3", "-c", "1"], check=True),
    lambda: os.system("true") and 1 / 0,
    lambda: os.posix_spawn("/python/bin/python3", ["python3"], {}),
):
    try:
        run()
        done.append(1)
    except (OSError, ZeroDivisionError, subprocess.SubprocessError):
        pass
print(done or "contained")
