# call runtime_error verdict
def f(x):
    raise AssertionError
