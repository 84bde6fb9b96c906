# call runtime_error verdict
def f(x):
    value = []
    value.append(value)
    return value
