# call runtime_error|failed verdict
import os

message = b'{"end": "passed", "seconds": 0}'
frame = len(message).to_bytes(4, "big") + message


def f(x):
    for file in range(64):
        try:
            os.write(file, frame)
        except OSError:
            pass
    return 1
