"""What objects of a user's own are made of, without running their code: recognised again when a run is resumed."""

import functools
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def own_objects(settings: Any) -> Iterator[Any]:
    """List what is called but has no name of its own in settings: objects, methods of objects, partial functions.

    Args:
        settings: A dataclass, or a list of such, whose settings may be objects in their turn.

    Yields:
        In the order of the settings.
    """
    if is_dataclass(settings) and not isinstance(settings, type):
        for field in fields(settings):
            yield from own_objects(getattr(settings, field.name))
    elif isinstance(settings, list | tuple):
        for item in settings:
            yield from own_objects(item)
    elif callable(settings) and not is_named(settings):
        yield settings


def made_of(thing: Any) -> str:
    """Say what an object was made of: its class, and those of its attributes that are named as a parameter.

    Attributes that are worked out (properties) are not read. Arrays are told by their numbers, objects inside of it in
    the same way, others by what `repr` says of them.

    Returns:
        The same text for the same in another process. An attribute that cannot be described, such as one that holds
        the object itself, is told by its type alone.
    """
    described = _described(thing)
    return repr([_written(part) for part in described] if isinstance(described, list) else described)


def _written(part: Any) -> str:
    try:
        return json.dumps(part, default=_described, sort_keys=True)
    except Exception:  # whatever a user's object does when it is looked at, training must not stop for it
        return type(part).__name__


def _described(thing: Any) -> Any:
    """Turn what JSON cannot hold into what it can: of an object its class, then its attributes with their names."""
    if isinstance(thing, functools.partial):
        return ["partial", thing.func, list(thing.args), thing.keywords]
    if inspect.ismethod(thing):
        return [_path(thing.__func__), thing.__self__]
    if is_named(thing):
        return _path(thing)
    if isinstance(thing, set | frozenset):
        return sorted(map(str, thing))
    if hasattr(type(thing), "tolist"):
        return thing.tolist()
    if hasattr(thing, "__dict__") and not isinstance(thing, Enum):
        held = vars(thing)
        return [_path(type(thing)), *([name, held[name]] for name in _parameters(type(thing)) if name in held)]
    return _path(type(thing)) if callable(thing) else re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def is_named(thing: Any) -> bool:
    """Tell whether a function or class is found again by its name; a method is not, without its object."""
    return hasattr(thing, "__qualname__") and not inspect.ismethod(thing)


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _parameters(kind: type) -> list[str]:
    try:
        return list(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # of C
        return []
