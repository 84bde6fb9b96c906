# call runtime_error
import itertools


def f(x):
    return itertools.count()
