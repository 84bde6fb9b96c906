# script passed
import atexit
import io
import os
import sys

buffer = io.StringIO()
sys.stdout = buffer
atexit.register(lambda: os.write(1, buffer.getvalue().encode()))
print("contained")
