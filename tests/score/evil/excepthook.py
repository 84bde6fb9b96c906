# script runtime_error verdict
import sys

sys.excepthook = lambda *a: print("contained")
raise ValueError
