# script timeout disk
import os

os.chdir("/tmp")
while True:
    try:
        os.mkdir("inner")
        os.chdir("inner")
    except OSError:
        pass
