"""What a setting has to be: the questions that several of them ask before any work begins."""

import inspect
from numbers import Integral, Real
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Tell a number from a truth value, a text or a tensor; NaN is one, for comparisons to refuse."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Tell a whole number from 2.5, and from True, which would pass for 1."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_unit_interval(name: str, value: object, meaning: str = "") -> None:
    """Refuse what is no number in [0, 1].

    Args:
        name: Of the setting.
        value: What it was given.
        meaning: What such a number says, for the message.

    Raises:
        ValueError: With the name and the value.
    """
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} is {value!r}; choose a number in [0, 1]{meaning and ', ' + meaning}")


def call_error(function: object, *arguments: object, **names: object) -> TypeError | None:
    """Tell why something cannot be called in such a way, where a caller wants to refuse it before any work.

    Args:
        function: What would be called; it is not.
        arguments: What stands for its positional arguments.
        names: What stands for its named ones.

    Returns:
        None if it can be, or was not written in Python, which does not tell.
    """
    if not callable(function):
        return TypeError("it is not callable")
    try:
        inspect.signature(function).bind(*arguments, **names)
    except TypeError as error:
        return error
    except ValueError:
        return None
    return None


def check_instance(name: str, value: object) -> None:
    """Refuse a name or a class where one of its instances belongs.

    Raises:
        ValueError: With what to write instead.
    """
    if isinstance(value, str | type):
        kind = value if isinstance(value, str) else value.__name__
        raise ValueError(f"{name} is {value!r}; give an instance, {kind}(...)")
