# script failed verdict
import builtins
import sys


class Anything:
    def write(self, text):
        return sys.__stdout__.write("wrong")

    def flush(self):
        sys.__stdout__.flush()


sys.stdout = Anything()
builtins.print = lambda *a, **k: sys.stdout.write("contained")
print("contained")
