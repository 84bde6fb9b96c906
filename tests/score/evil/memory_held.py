# script timeout memory
held = []
while True:
    try:
        held.append(bytearray(2**20))
    except MemoryError:
        pass
