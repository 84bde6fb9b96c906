# script runtime_error memory
def f(n):
    return f(n + 1) + 1


f(0)
