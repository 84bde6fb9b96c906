# script passed
import os
import sys

text = sys.stdin.read() + sys.stdin.buffer.read().decode()
with open(0, closefd=False) as file:
    text += file.read()
try:
    input()
except EOFError:
    print("contained" if text == "" and os.read(0, 1) == b"" else text)
