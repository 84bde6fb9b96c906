"""The attention row of the token that the reward head reads, computed beside any attention kernel.

Fast kernels (sdpa, flash, flex) never form the (T, T) map, and `output_attentions=True` gives an empty tuple under
them. Attention-based credit needs one row of one layer only: `capture_row` listens to the layer (`attention_tap.py`)
and computes that row by `attention_row`, O(T d). An eager function has formed the map anyway: there the row is the
map's own.

Source: Chan et al., 2024 (https://arxiv.org/abs/2402.00782), which reads the row from full eager maps.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.batch import AttentionRequest
from apportion.models import hidden_states
from apportion.score.attention_row import attention_row, check_heads, head_mean, take_queries
from apportion.score.attention_tap import AttentionCall, Listener, Unseen, capturing, find_attention, unseen


class Captured(Listener):
    """What a capture reads of one attention layer; empty until the model has run under it."""

    _weights: Tensor | None = None

    @property
    def weights(self) -> Float[Tensor, "B K"]:
        """Return what was captured.

        Raises:
            RuntimeError: If the chosen attention layer has not run under the capture.
        """
        if self._weights is None:
            raise unseen()
        return self._weights

    def observe(self, call: AttentionCall) -> None:
        """Compute the weights from the call of an attention function; a later call replaces an earlier one."""
        self._weights = self.of_call(call)

    def keep(self, maps: Float[Tensor, "B H Q K"]) -> None:
        """Take the weights from full maps that an eager layer has formed anyway."""
        self._weights = self.of_maps(maps)

    @abstractmethod
    def of_call(self, call: AttentionCall) -> Float[Tensor, "B K"]:
        """Compute the weights from what an attention function is called with, or take them from its maps."""

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

    def of_call(self, call: AttentionCall) -> Float[Tensor, "B K"]:
        """Compute the row of one query, or take it from the maps."""
        index = self._columns(call.query.shape[0], call.query.shape[2], call.query.device)
        bias = call.bias(index[:, None])
        if call.maps is not None:
            row = take_queries(call.maps, index[:, None], *call.maps.shape[2:])
            return head_mean(row.masked_fill(bias == -torch.inf, 0), self.heads)[:, 0]
        return attention_row(call.query, call.key, index, bias[:, :, 0], heads=self.heads, **call.arithmetic)

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
