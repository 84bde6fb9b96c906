# script passed files
try:
    from multiprocessing.shared_memory import SharedMemory

    SharedMemory(create=True, size=2**20)
except OSError:
    print("contained")
