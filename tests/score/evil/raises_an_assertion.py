# call runtime_error
def f(x):
    raise AssertionError
