# call runtime_error verdict
import os


def f(x):
    os._exit(0)
