# script runtime_error verdict
import ctypes

ctypes.string_at(0)
