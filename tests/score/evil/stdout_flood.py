# script runtime_error
while True:
    print("x" * 10**6)
