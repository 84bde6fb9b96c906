# script passed calls
import os

try:
    os.memfd_create("hidden")
except PermissionError:
    print("contained")
