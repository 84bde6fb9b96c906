"""The attention row of the token that the reward head reads, computed beside any attention kernel.

Fast kernels (sdpa, flash, flex) never form the (T, T) map, and `output_attentions=True` gives an empty tuple under
them. Attention-based credit needs one row of one layer only. `capture_row` therefore puts a tap around the attention
function that the model looks up, in place and under its own name: masks are built per name, so a name of our own would
lose them. The tap calls the original function with unchanged arguments and hands the queries, keys and mask of one
module to `attention_row`, O(T d). An eager function has formed the map anyway: there the row is the map's own.

Source: Chan et al., 2024 (https://arxiv.org/abs/2402.00782), which reads the row from full eager maps.
"""

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from apportion.batch import AttentionRequest
from apportion.models import hidden_states
from apportion.score.attention_row import attention_row, check_heads, head_mean, mask_row, take_queries

_CAPTURE = "_apportion_captured"
_EAGER = "load the model with attn_implementation='eager', or write that into its config.json"
_FULL_ATTENTION = ("full_attention", "global")
_lock = threading.Lock()


class Unseen(RuntimeError):
    """The attention of a model cannot be read."""


class _Seen(Exception):
    """Leaves a model whose attention has been read."""


class Captured(ABC):
    """What a capture reads of one attention layer; empty until the model has run under it.

    Attributes:
        leaves: Whether the model is left as soon as the layer has been read, where nothing else is asked of it.
    """

    leaves: bool = False
    _weights: Tensor | None = None

    @property
    def weights(self) -> Float[Tensor, "B K"]:
        """Return what was captured.

        Raises:
            RuntimeError: If the chosen attention layer has not run under the capture.
        """
        if self._weights is None:
            raise Unseen(
                "no attention row was captured: run the model inside `with capture_row(model, read_index)`; if it did "
                f"run, its attention layer bypasses the registered function: {_EAGER}"
            )
        return self._weights

    @torch.compiler.disable  # a compiled model breaks its graph here, and only while it is captured
    @torch.no_grad()
    def observe(
        self,
        module: nn.Module,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B G K D"],
        mask: Tensor | BlockMask | None,
        options: dict[str, Any],
        result: Any = None,
    ) -> None:
        """Compute the weights from the call of an attention function; a later call replaces an earlier one.

        Args:
            module: The attention layer.
            query: (B, H, Q, D) float.
            key: (B, G, K, D) float.
            mask: Any mask that transformers hands to a kernel.
            options: The other keyword arguments of the call.
            result: What the function returned, with or without its maps.
        """
        self._take(self.of_call(module, query, key, mask, options, _maps_of(result, query, key)))

    @torch.no_grad()
    def keep(self, maps: Float[Tensor, "B H Q K"]) -> None:
        """Take the weights from full maps that an eager layer has formed anyway."""
        self._take(self.of_maps(maps))

    def _take(self, weights: Float[Tensor, "B K"]) -> None:
        self._weights = weights
        if self.leaves:
            raise _Seen

    @abstractmethod
    def of_call(
        self,
        module: nn.Module,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B G K D"],
        mask: Tensor | BlockMask | None,
        options: dict[str, Any],
        maps: Float[Tensor, "B H Q K"] | None,
    ) -> Float[Tensor, "B K"]:
        """Compute the weights from what an attention function is called with, and from its maps if it forms them."""

    @abstractmethod
    def of_maps(self, maps: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B K"]:
        """Compute the weights from the attention maps of a layer."""


class CapturedRow(Captured):
    """Hold what `capture_row` captured; empty until the model has run.

    Attributes:
        read_index: (B,) int64. Column of the model's input whose attention is captured.
        heads: Heads that are averaged; None for all.
    """

    def __init__(self, read_index: Int[Tensor, "B"], heads: tuple[int, ...] | None = None) -> None:
        self.read_index, self.heads = read_index, heads

    @property
    def row(self) -> Float[Tensor, "B K"]:
        """Return the attention of the query at `read_index`, mean over heads.

        Returns:
            (B, K) float32. Over the K keys of the last forward pass (with a cache: its length plus the input's). Zero
            on keys that the query cannot see; sums to 1, to less where the layer has attention sinks, to 0 where the
            query sees nothing (a padding query). No gradient.

        Raises:
            RuntimeError: If the chosen attention layer has not run under the capture.
        """
        return self.weights

    def of_call(
        self,
        module: nn.Module,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B G K D"],
        mask: Tensor | BlockMask | None,
        options: dict[str, Any],
        maps: Float[Tensor, "B H Q K"] | None,
    ) -> Float[Tensor, "B K"]:
        """Compute the row of one query, or take it from the maps."""
        index = self._columns(query.shape[0], query.shape[2], query.device)
        bias = mask_row(mask, module, index, query.shape[2], key.shape[2], options)
        if maps is not None:
            row = take_queries(maps, index[:, None], *maps.shape[2:])
            return head_mean(row.masked_fill(bias[:, :, None] == -torch.inf, 0), self.heads)[:, 0]
        return attention_row(
            query,
            key,
            index,
            bias,
            heads=self.heads,
            scaling=options.get("scaling"),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )

    def of_maps(self, maps: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B K"]:
        """Take the row of one query."""
        index = self._columns(maps.shape[0], maps.shape[2], maps.device)[:, None]
        return head_mean(take_queries(maps, index, maps.shape[2], maps.shape[3]), self.heads)[:, 0]

    def _columns(self, rows: int, columns: int, device: torch.device) -> Int[Tensor, "B"]:
        """Return read_index on the device of the layer, after checking it against the input's shape."""
        if self.read_index.shape[0] != rows:
            raise ValueError(
                f"read_index has {self.read_index.shape[0]} entries, the model's input has {rows} rows: pass one "
                "column for each row"
            )
        if bool(((self.read_index < 0) | (self.read_index >= columns)).any()):
            raise ValueError(
                f"read_index holds {self.read_index.tolist()}, the model's input has columns 0 to {columns - 1}: pass "
                "the column where the head reads"
            )
        return self.read_index.to(device)


@contextmanager
def capture_row(
    model: nn.Module,
    read_index: Int[Tensor, "B"],
    layer: int | None = None,
    heads: tuple[int, ...] | None = None,
) -> Iterator[CapturedRow]:
    """Capture one attention row of one layer while the model runs under its own kernel.

        with torch.no_grad(), capture_row(model, read_index) as captured:
            output = model(input_ids=input_ids, attention_mask=attention_mask)
        captured.row  # (B, K)

    See `capturing`.

    Args:
        model: Any transformers model, also inside PEFT or another module.
        read_index: (B,) int64. Column of `input_ids` at which the head reads.
        layer: Layer number, negative from the end. The default is the last full-attention layer: a sliding layer gives
            exactly zero to what lies outside of its window (Gemma 3 ends in one).
        heads: Heads that are averaged; None for all.

    Yields:
        An empty CapturedRow, which the model's forward pass fills.

    Raises:
        ValueError: If the model has no attention layer or head of that number, or read_index does not fit the input.
        RuntimeError: If the model drops out, or this layer is being captured already.
    """
    captured = CapturedRow(read_index, heads)
    with capturing(model, captured, layer):
        yield captured


@contextmanager
def capturing(model: nn.Module, captured: Captured, layer: int | None) -> Iterator[None]:
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
        with suppress(_Seen), _listening(attention, captured):
            yield
    finally:
        delattr(attention, _CAPTURE)


def check_request(model: nn.Module, request: AttentionRequest) -> None:
    """Refuse a request for attention that a model does not have, or does not show, after a trial on two tokens.

    Raises:
        ValueError: If there is no such layer, or no such head in it; it names those that there are. If the layer's
            attention cannot be seen, or the model drops out.
    """
    attention = find_attention(model, request.layer)
    count = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    if isinstance(count, int):
        check_heads(request.heads, count)
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), capture_row(model, torch.ones_like(ids[0, :1]), request.layer, request.heads) as captured:
            hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
        _ = captured.row
    except Unseen as error:
        raise ValueError(str(error)) from error


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
def _listening(attention: nn.Module, captured: Captured) -> Iterator[None]:
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
            captured.observe(module, query, key, attention_mask, kwargs, result)
        return result


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


def _keep_maps(captured: Captured, module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Keep what is wanted of the maps that an attention layer returns, and drop the maps."""
    result, maps, *rest = output if isinstance(output, tuple) and len(output) > 1 else (output, None)
    if not isinstance(maps, Tensor) or maps.dim() != 4:
        raise Unseen(f"{type(module).__name__} returned no attention map: {_EAGER}")
    captured.keep(maps)
    return (result, None, *rest)
