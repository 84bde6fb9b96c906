# script passed
import sys
import threading
import time

sys.setrecursionlimit(10**6)
threading.stack_size(2**26)


def main():
    time.sleep(0.05)
    print("contained")


threading.Thread(target=main).start()
