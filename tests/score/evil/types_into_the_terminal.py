# script passed calls
import errno
import fcntl

try:
    fcntl.ioctl(0, 0x5412, b"x")
except OSError as error:  # of what is no terminal another error would tell
    print("contained" if error.errno == errno.EPERM else error)
