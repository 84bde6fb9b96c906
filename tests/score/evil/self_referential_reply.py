# call runtime_error
def f(x):
    value = []
    value.append(value)
    return value
