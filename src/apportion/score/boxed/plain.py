"""Values as plain tagged JSON: what a program returns arrives as data, never as objects with methods of its own.

null, true, 1, 0.5, "text"      themselves
["l", [...]]  ["t", [...]]      list, tuple
["s", [...]]  ["z", [...]]      set, frozenset
["d", [[key, value], ...]]      dict, in order
["n", [...]]                    an iterator or a view, exhausted
["i", "ff"]                     a large integer, in base 16
["c", re, im]  ["b", "00ff"]    complex, bytes
["r", start, stop, step]        range
["D", "0.1"]  ["F", n, d]       Decimal, Fraction
["T", "int"]                    a builtin type
["o", 7]                        any other object, by number; it stays where it is
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any

DEEPEST = 100
"""Containers inside containers; what is deeper, or contains itself, is refused."""

LARGE = 2**63
"""From here on integers are written in base 16, which takes time linear in their length."""

LONGEST_ITERATOR = 100_000
CONTAINERS: tuple[tuple[str, type, Callable[[Any], Iterator]], ...] = (
    ("l", list, list.__iter__),
    ("t", tuple, tuple.__iter__),
    ("s", set, set.__iter__),
    ("z", frozenset, frozenset.__iter__),
)
SEQUENCES = {"l": list, "t": tuple, "s": set, "z": frozenset, "n": iter}
TYPES = {kind.__name__: kind for kind in (int, float, str, bool, list, tuple, set, frozenset, dict, complex, bytes)}
RARE: tuple[tuple[Any, Callable[[Any], list]], ...] = (
    (complex, lambda value: ["c", value.real, value.imag]),
    (bytes | bytearray, lambda value: ["b", bytes(value).hex()]),
    (range, lambda value: ["r", value.start, value.stop, value.step]),
)
IMPORTED: tuple[tuple[str, str, Callable[[Any], list]], ...] = (
    ("decimal", "Decimal", lambda value: ["D", str(value)]),
    ("fractions", "Fraction", lambda value: ["F", value.numerator, value.denominator]),
)
"""Module, type: where a module is not imported, no value is of its type; both take a while to import."""

VIEWS = (type({}.keys()), type({}.values()), type({}.items()), deque)


class NotPlain(ValueError):
    """A value or a text that has no plain form."""


def dumps(value: Any, number_of: Callable[[Any], int] | None = None) -> bytes:
    """Write a value.

    Args:
        value: To be written; a subclass is written as the builtin type that it derives from.
        number_of: Gives a number to an object that has no plain form; None to refuse these.

    Raises:
        NotPlain: If the value is too deep or has no plain form.
    """
    return json.dumps(_encoded(value, number_of, DEEPEST)).encode("ascii")


def loads(text: bytes, object_of: Callable[[int], Any] | None = None) -> Any:
    """Read a value.

    Args:
        text: What `dumps` wrote, or anything that pretends to be.
        object_of: From a number to what stands for the object; None to refuse these.

    Raises:
        NotPlain: If it is anything else.
    """
    try:
        return _decoded(json.loads(text), object_of, DEEPEST)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError, MemoryError) as error:
        raise NotPlain(f"no plain value: {type(error).__name__}") from None


def _encoded(value: Any, number_of: Callable[[Any], int] | None, depth: int) -> Any:
    """Turn a value into what JSON has."""
    if depth == 0:
        raise NotPlain(f"deeper than {DEEPEST} containers")

    def inner(item: Any) -> Any:
        return _encoded(item, number_of, depth - 1)

    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -LARGE < number < LARGE else ["i", hex(number)]
    if isinstance(value, float):
        return float.__float__(value)
    for tag, kind, items in CONTAINERS:
        if isinstance(value, kind):
            return [tag, [inner(item) for item in items(value)]]
    if isinstance(value, dict):
        return ["d", [[inner(key), inner(item)] for key, item in dict.items(value)]]
    return _encoded_rare(value, number_of, inner)


def _encoded_rare(value: Any, number_of: Callable[[Any], int] | None, inner: Callable[[Any], Any]) -> Any:
    """The same for what programs return rarely."""
    for kind, write in (*RARE, *((_imported(*names), write) for *names, write in IMPORTED)):
        if isinstance(value, kind):
            return write(value)
    if isinstance(value, type) and value in TYPES.values():
        return ["T", value.__name__]
    if isinstance(value, VIEWS):
        return ["l", [inner(item) for item in value]]
    if isinstance(value, Iterator):
        items = [inner(item) for item in islice(value, LONGEST_ITERATOR + 1)]
        if len(items) > LONGEST_ITERATOR:
            raise NotPlain(f"an iterator of more than {LONGEST_ITERATOR} items")
        return ["n", items]
    if type(value).__module__ == "numpy":
        return inner(value.tolist())
    if number_of is None:
        raise NotPlain(f"an object of type {type(value).__name__}")
    return ["o", number_of(value)]


def _imported(module: str, name: str) -> Any:
    """Find a type of a module; none where nobody imported that."""
    return getattr(sys.modules.get(module), name, ())


def _decoded(value: Any, object_of: Callable[[int], Any] | None, depth: int) -> Any:
    """Turn what JSON has into a value."""
    if depth == 0:
        raise NotPlain("too deep")
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise NotPlain("a bare object")
        return value
    tag, *parts = value

    def inner(item: Any) -> Any:
        return _decoded(item, object_of, depth - 1)

    if tag in SEQUENCES:
        return SEQUENCES[tag]([inner(item) for item in parts[0]])
    if tag == "d":
        return {inner(key): inner(item) for key, item in parts[0]}
    if tag == "o" and object_of is not None:
        return object_of(int(parts[0]))
    rare: dict[str, Callable[..., Any]] = {
        "i": lambda digits: int(digits, 16),
        "c": complex,
        "b": bytes.fromhex,
        "r": range,
        "D": lambda digits: import_module("decimal").Decimal(digits),
        "F": lambda *parts: import_module("fractions").Fraction(*parts),
        "T": TYPES.__getitem__,
    }
    return rare[tag](*parts)
