# call runtime_error verdict
import os

os._exit(0)
