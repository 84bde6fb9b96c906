"""A way to listen to the attention of one layer while a model runs, beside any attention kernel.

`capturing` puts a tap around the attention function that the model looks up, in place and under its own name: masks are
built per name, so a name of our own would lose them. The tap calls the original function with unchanged arguments and
shows the queries, keys and mask of one module to a listener.
"""

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from apportion.score.attention_row import attention_weights, mask_rows

_CAPTURE = "_apportion_captured"
_EAGER = "load the model with attn_implementation='eager', or write that into its config.json"
_FULL_ATTENTION = ("full_attention", "global")
_ARITHMETIC = {"scaling": "scaling", "softcap": "softcap", "sinks": "s_aux"}
_lock = threading.Lock()


class Unseen(RuntimeError):
    """The attention of a model cannot be read."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What an attention function is called with.

    Attributes:
        module: The attention layer.
        query: (B, H, Q, D) float. After rotary embedding and norms.
        key: (B, G, K, D) float. As the query, with cached keys first.
        mask: Any mask that transformers hands to a kernel.
        options: The other keyword arguments of the call.
        maps: (B, H, Q, K) float, where the function forms them.
    """

    module: nn.Module
    query: Float[Tensor, "B H Q D"]
    key: Float[Tensor, "B G K D"]
    mask: Tensor | BlockMask | None
    options: dict[str, Any] = field(default_factory=dict)
    maps: Float[Tensor, "B H Q K"] | None = None

    def bias(self, index: Int[Tensor, "B R"]) -> Float[Tensor, "B h R K"]:
        """Say what some queries of each row may see; see `mask_rows`.

        Args:
            index: (B, R) int64. Queries of each row.

        Returns:
            (B, h, R, K) float32. 0 or a bias on visible keys, -inf on hidden ones.
        """
        return mask_rows(self.mask, self.module, index, self.query.shape[2], self.key.shape[2], self.options)

    def weights(self, queries: slice, bias: Float[Tensor, "B h R K"]) -> Float[Tensor, "B H R K"]:
        """Compute the attention of some queries, or take it from the maps.

        Args:
            queries: R of them, the same of each row.
            bias: (B, h, R, K) float32. Theirs.

        Returns:
            (B, H, R, K) float. Exactly zero on hidden keys.
        """
        if self.maps is not None:
            return self.maps[:, :, queries].masked_fill(bias == -torch.inf, 0)
        return attention_weights(self.query[:, :, queries], self.key, bias, **self.arithmetic)

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What `attention_weights` has to know of the options."""
        return {name: self.options.get(theirs) for name, theirs in _ARITHMETIC.items()}


class Listener(ABC):
    """What is shown the calls of one attention layer while `capturing`."""

    @abstractmethod
    def observe(self, call: AttentionCall) -> None:
        """See the call of an attention function."""

    @abstractmethod
    def keep(self, maps: Float[Tensor, "B H Q K"]) -> None:
        """See full maps that an eager layer has formed anyway."""


def unseen() -> Unseen:
    """Say that a layer has not been seen, and what can be done."""
    return Unseen(
        "no attention row was captured: run the model inside `with capture_row(model, read_index)`, or let it sample; "
        f"if it did run, its attention layer bypasses the registered function: {_EAGER}"
    )


@contextmanager
def capturing(model: nn.Module, captured: Listener, layer: int | None) -> Iterator[None]:
    """Let a capture see one attention layer while the model runs under its own kernel.

    The model's output is the same to the bit as without the capture, and so are its gradients: what is captured is
    computed without one. Layers whose family takes no function from transformers' AttentionInterface (GPT-J, Bloom) are
    read by a hook from the maps that they form themselves: float32 sums of weights in the model's dtype, and None in
    place of the map in what the layer returns. With gradient checkpointing, leave the capture before the backward pass.

    Args:
        model: Any transformers model, also inside PEFT or another module.
        captured: Is called by the layer.
        layer: Layer number, negative from the end; None for the last full-attention layer.

    Raises:
        ValueError: If the model has no attention layer of that number.
        RuntimeError: If the model drops out, or this layer is being captured already.
    """
    _refuse_dropout(model)
    attention = find_attention(model, layer)
    if getattr(attention, _CAPTURE, None) is not None:
        raise RuntimeError(f"this {type(attention).__name__} is being captured already: leave the outer capture first")
    # An attribute of the module, not a context variable: torch.compile guards on the one and cannot trace the other.
    setattr(attention, _CAPTURE, captured)
    try:
        with _listening(attention, captured):
            yield
    finally:
        delattr(attention, _CAPTURE)


def find_attention(model: nn.Module, layer: int | None = None) -> nn.Module:
    """Find the self-attention module of a layer.

    Args:
        model: Any module that holds a transformers model.
        layer: Layer number, negative from the end; None for the last full-attention layer, or where no layer is
            labelled so, the last attention layer.

    Raises:
        ValueError: If there is no attention module, none of that number, or several.
    """
    layers = _attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer with a layer_idx: use another model")
    number = _default_layer(layers) if layer is None else layer
    number = number + max(layers) + 1 if number < 0 else number
    if number not in layers:
        raise ValueError(
            f"layer {layer} is not an attention layer of {type(model).__name__}: choose one of {[*layers]}"
        )
    if len(layers[number]) > 1:
        names = ", ".join(type(module).__name__ for module in layers[number])
        raise ValueError(f"several modules are layer {number} ({names}): pass the text model alone")
    return layers[number][0]


def _refuse_dropout(model: nn.Module) -> None:
    """Raise where dropout would thin the rows."""
    for module in model.modules():
        rates = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
        named = isinstance(module, nn.Dropout)
        if module.training and any(
            isinstance(rate, float) and rate > 0 and (named or "drop" in name) for name, rate in rates.items()
        ):
            raise Unseen(
                f"{type(module).__name__} drops out, which would thin the row: call model.eval(), or set dropout to 0"
            )


def _attention_layers(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the innermost self-attention modules by layer number, in ascending order."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        named = "attention" in type(module).__name__.lower()
        if not (named and isinstance(number, int)) or getattr(module, "is_cross_attention", False):
            continue
        inside = set(module.modules())
        outer = [other for other in found.get(number, []) if module not in set(other.modules())]
        found[number] = [other for other in outer if other not in inside] + [module]
    return dict(sorted(found.items()))


def _default_layer(layers: dict[int, list[nn.Module]]) -> int:
    """Return the last layer that its configuration labels full attention; the last of all where none is."""
    config = getattr(layers[max(layers)][0], "config", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    full = [number for number in layers if number < len(kinds) and kinds[number] in _FULL_ATTENTION]
    return max(full or layers)


@contextmanager
def _listening(attention: nn.Module, captured: Listener) -> Iterator[None]:
    """Let the capture see the layer's attention: by a tap on its function, else by a hook on its maps."""
    slot = _function_slot(attention)
    if slot is not None:
        with _tapped(*slot):
            yield
        return
    handle = attention.register_forward_hook(functools.partial(_keep_maps, captured))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not look for hooks that came later
            yield
    finally:
        handle.remove()


def _function_slot(attention: nn.Module) -> tuple[MutableMapping[str, Any], str] | None:
    """Return the mapping and key where the layer's forward looks its attention function up, if it does.

    Fast kernels are looked up by name in the AttentionInterface of the modeling file. "eager" is not registered there
    but is the default that the file passes along: its own function `eager_attention_forward`.
    """
    forward: Callable[..., Any] = inspect.unwrap(type(attention).forward)
    names = forward.__globals__
    interface = names.get("ALL_ATTENTION_FUNCTIONS")
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if not isinstance(interface, AttentionInterface) or implementation is None:
        return None
    if implementation in interface:
        return interface, implementation
    return (names, "eager_attention_forward") if "eager_attention_forward" in names else None


class _Tap:
    """An attention function that shows its arguments to a capture of the calling module, and is inert without one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.users = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = self.function(module, query, key, value, attention_mask, *args, **kwargs)
        captured = getattr(module, _CAPTURE, None)
        if captured is not None:
            _show_uncompiled(captured, result, module=module, query=query, key=key, mask=attention_mask, options=kwargs)
        return result


@torch.no_grad()
def _show(captured: Listener, result: Any, **call: Any) -> None:
    """Let a listener see a call, without a gradient."""
    captured.observe(AttentionCall(**call, maps=_maps_of(result, call["query"], call["key"])))


# A compiled model breaks its graph there, and only while it is captured.
_show_uncompiled: Any = torch.compiler.disable(_show)


def _maps_of(result: Any, query: Float[Tensor, "B H Q D"], key: Float[Tensor, "B G K D"]) -> Tensor | None:
    """Return the maps that an attention function has formed; eager ones do, others return None or something smaller."""
    maps = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    whole = (*query.shape[:3], key.shape[2])
    return maps if isinstance(maps, Tensor) and maps.shape == whole else None


@contextmanager
def _tapped(functions: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """Put a tap in the place of a function; captures of several models share one, and the last takes it away."""
    with _lock:
        current = functions[name]
        tap = current if isinstance(current, _Tap) else _Tap(current)
        tap.users += 1
        functions[name] = tap
    try:
        yield
    finally:
        with _lock:
            tap.users -= 1
            if tap.users == 0 and functions[name] is tap:
                _restore(functions, name, tap.function)


def _restore(functions: MutableMapping[str, Any], name: str, function: Callable[..., Any]) -> None:
    """Undo an assignment: an AttentionInterface holds it as a local override of what is registered for all."""
    if isinstance(functions, AttentionInterface):
        del functions[name]
    if functions.get(name) is not function:
        functions[name] = function


def _keep_maps(captured: Listener, module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Keep what is wanted of the maps that an attention layer returns, and drop the maps."""
    result, maps, *rest = output if isinstance(output, tuple) and len(output) > 1 else (output, None)
    if not isinstance(maps, Tensor) or maps.dim() != 4:
        raise Unseen(f"{type(module).__name__} returned no attention map: {_EAGER}")
    with torch.no_grad():
        captured.keep(maps)
    return (result, None, *rest)
