# script timeout disk
import os

number = 0
while True:
    try:
        os.close(os.open(f"/tmp/{number}", os.O_CREAT))
        number += 1
    except OSError:
        pass
