# call runtime_error
def f(x):
    return "x" * 10**8
