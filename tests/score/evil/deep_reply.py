# call runtime_error
def f(x):
    value = []
    for _ in range(10**5):
        value = [value]
    return value
