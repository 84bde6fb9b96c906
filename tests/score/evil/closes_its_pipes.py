# call runtime_error
import os


def f(x):
    os.closerange(0, 64)
    return 1
