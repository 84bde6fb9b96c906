# call runtime_error verdict
import sys

sys.exit(0)
