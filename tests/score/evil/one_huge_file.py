# script passed disk
try:
    with open("/tmp/huge", "wb") as file:
        file.truncate(2**40)
except OSError:
    print("contained")
