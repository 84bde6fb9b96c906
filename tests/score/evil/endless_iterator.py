# call runtime_error verdict
import itertools


def f(x):
    return itertools.count()
