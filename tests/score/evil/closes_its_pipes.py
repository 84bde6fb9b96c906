# call runtime_error verdict
import os


def f(x):
    os.closerange(0, 64)
    return 1
