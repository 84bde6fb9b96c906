# script runtime_error memory
x = "a" * 10**10
y = 3 ** (10**9)
