# script runtime_error output
while True:
    print("x" * 10**6)
