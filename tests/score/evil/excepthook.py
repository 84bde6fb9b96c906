# script runtime_error
import sys

sys.excepthook = lambda *a: print("contained")
raise ValueError
