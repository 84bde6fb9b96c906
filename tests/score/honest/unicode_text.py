# script passed
import sys

sys.stderr.write("\u00e9\u4e2d\U0001f600\n")
print("contained" if len("\u00e9\u4e2d\U0001f600".encode(sys.stdout.encoding)) == 9 else sys.stdout.encoding)
