# script passed
import os

pid = os.fork()
if pid == 0:
    os._exit(3)
print("contained" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3 else "")
