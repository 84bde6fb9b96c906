"""State dictionaries as safetensors and JSON, and back, to the bit.

An optimizer, a scheduler or a generator keeps its state in nested dictionaries, lists and tuples of tensors and
numbers. `flatten_state` cuts such a state in two: the tensors by name, for a safetensors file, and the rest as a tree
that JSON can hold. `restore_state` puts them together again. Nothing is pickled: opening a checkpoint runs no code.

What JSON lacks is written as an object with one key that starts with `$`:

    {"$tensor": name}     a tensor, by its name in the safetensors file
    {"$tuple": [...]}     a tuple, such as AdamW's betas
    {"$dict": [[k, v]]}   a dictionary whose keys are not plain text, such as an optimizer's parameter numbers
    {"$float": "nan"}     nan, inf or -inf; a finite float is a JSON number, which Python writes and reads exactly
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def flatten_state(state: object) -> tuple[dict[str, Tensor], Any]:
    """Cut a nested state into named tensors and a JSON tree.

    Args:
        state: Dictionaries, lists and tuples of tensors, numbers, text, booleans and None, nested to any depth.

    Returns:
        tensors: On the CPU, contiguous and without shared memory, named by their path, such as `state/0/exp_avg`.
        tree: The same nesting, with each tensor replaced by its name; strict JSON, no NaN.

    Raises:
        TypeError: If the state holds anything else, such as a function or an array.
        ValueError: If two tensors would have the same name (keys such as 0 and "0" side by side).
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(state, "", tensors)
    return tensors, tree


def restore_state(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Put together what `flatten_state` cut: the same types, order and bits, with every tensor on the CPU.

    Args:
        tensors: The named tensors; each is handed over as it is, not copied.
        tree: The JSON tree, as written or as read back from a file.

    Returns:
        The state, ready for `load_state_dict` or `set_state`.
    """
    if isinstance(tree, list):
        return [restore_state(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(restore_state(tensors, item) for item in items)
        case {"$dict": pairs}:
            return {restore_state(tensors, key): restore_state(tensors, value) for key, value in pairs}
        case {"$float": text}:
            return float(text)
    return {key: restore_state(tensors, value) for key, value in tree.items()}


def random_state() -> dict[str, Any]:
    """Return the global random state of Python, numpy and torch (CPU and every CUDA device), for `flatten_state`."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the global random state that `random_state` returned.

    Raises:
        ValueError: If the state is of another number of CUDA devices: the run could not continue bit for bit.
    """
    saved, present = len(state["cuda"]), torch.cuda.device_count()
    if saved != present:
        raise ValueError(f"the checkpoint was written with {saved} CUDA devices, here are {present}; use {saved} again")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])


def _encoded(value: object, path: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            return {"$tensor": _put(value, path, tensors)}
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        case Mapping():
            return _encoded_mapping(value, path, tensors)
        case list():
            return [_encoded(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        case tuple():
            return {"$tuple": [_encoded(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    raise TypeError(f"the state holds a {type(value).__name__} at {path!r}; save tensors, numbers and text")


def _encoded_mapping(mapping: Mapping[Any, object], path: str, tensors: dict[str, Tensor]) -> Any:
    pairs = [(key, _encoded(value, f"{path}/{key}", tensors)) for key, value in mapping.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [[_encoded(key, path, {}), value] for key, value in pairs]}


def _put(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    name = path.removeprefix("/") or "state"
    if name in tensors:
        raise ValueError(f"two tensors of the state are both called {name!r}; rename one of their keys")
    # A copy of its own: safetensors refuses tensors that share memory, and training must not write into a saved state.
    tensors[name] = tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)
    return name
