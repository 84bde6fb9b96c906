# script passed memory
held = []
try:
    while len(held) < 1000:
        held.append(bytearray(2**20))
except MemoryError:
    taken = len(held)
    held.clear()
    print("contained" if 100 < taken < 512 else taken)
