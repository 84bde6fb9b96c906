# script passed
import sys

print("contained")
sys.exit()
