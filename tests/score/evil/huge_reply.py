# call runtime_error output
def f(x):
    return "x" * 10**8
