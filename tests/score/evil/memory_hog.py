# script runtime_error
x = bytearray(10**11)
