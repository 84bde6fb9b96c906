# script passed
import fcntl

try:
    fcntl.ioctl(0, 0x5412, b"x")
except OSError:
    print("contained")
