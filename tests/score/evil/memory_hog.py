# script runtime_error memory
x = bytearray(10**11)
