# script runtime_error memory
import sys

sys.setrecursionlimit(10**9)
x = None
for _ in range(10**6):
    x = [x]
repr(x)
