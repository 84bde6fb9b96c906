# call runtime_error verdict
import sys


def f(x):
    sys.exit(0)
