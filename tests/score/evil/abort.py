# script runtime_error
import os

os.abort()
