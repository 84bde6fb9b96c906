# call runtime_error|timeout output
def f(x):
    return "x" * 10**8
