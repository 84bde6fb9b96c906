# script passed
import sys

sys.setrecursionlimit(10**5)


def f(n):
    return n and f(n - 1)


print("contained" if f(50_000) == 0 else "")
