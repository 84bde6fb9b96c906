"""The second built-in task: short functions in Python, described in words and tested by calls.

Nothing is downloaded. The solutions that a model is fine-tuned on are as those of people: some are wrong. What
programs are worth is said by running them.
"""

from apportion.data.functions.write import FunctionsData, write_functions

__all__ = ["FunctionsData", "write_functions"]
