# script runtime_error verdict
import os

os.abort()
