# script passed disk
import os

try:
    for number in range(1000):
        with open(f"/tmp/{number}", "wb") as file:
            file.write(bytes(2**20))
except OSError:
    os.write(1, b"contained")
