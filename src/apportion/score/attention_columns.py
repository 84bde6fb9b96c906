"""Attention that several queries of a response pay to each key: means of columns, by blocks of rows.

ABC-D reads how much the later tokens of a response attend to each earlier one. That is a mean over a column of the
attention map, which needs no map: blocks of queries are computed beside the fast kernel and added up.

Source: Chan et al., 2024 (https://arxiv.org/abs/2402.00782), ABC-D.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.batch import AttentionRequest
from apportion.masked import is_last, last_index
from apportion.score.attention import Captured, capture_row
from apportion.score.attention_row import head_mean
from apportion.score.attention_tap import AttentionCall, capturing

BLOCK = 2**22
"""Attention weights that are held at once: 16 MiB in float32."""


class CapturedColumns(Captured):
    """Hold what `capture_columns` captured; empty until the model has run.

        weights_j = sum_{q in rows, q sees j} A[q, j] / |{q in rows, q sees j}|,      A the mean over heads

    A key that no row sees has weight 0. A hooked layer (GPT-J, Bloom) shows no mask: there every row from the key's own
    on counts, which differs in a local layer (of GPT-Neo) only.

    Attributes:
        rows: (B, Q) bool. Queries of the model's input that count.
        heads: Heads that are averaged; None for all.
    """

    def __init__(self, rows: Bool[Tensor, "B Q"], heads: tuple[int, ...] | None = None) -> None:
        check_is_bool(rows)
        self.rows, self.heads = rows, heads
        used = rows.any(0).nonzero()[:, 0].tolist()
        self._first, self._stop = (used[0], used[-1] + 1) if used else (0, 0)

    def of_call(self, call: AttentionCall) -> Float[Tensor, "B K"]:
        """Add up blocks of rows, computed or taken from the maps; O(K) memory beside a block."""
        rows = self._rows_of(call.query)
        total, seen = torch.zeros(2, len(rows), call.key.shape[2], device=rows.device)
        block = max(1, BLOCK // (call.query.shape[1] * total.numel()))
        for first in range(self._first, self._stop, block):
            block_of = slice(first, min(first + block, self._stop))
            index = torch.arange(block_of.start, block_of.stop, device=rows.device).expand(len(rows), -1)
            bias = call.bias(index)
            counted = rows[:, block_of, None]
            total += torch.where(counted, head_mean(call.weights(block_of, bias), self.heads), 0).sum(1)
            seen += (counted & (bias > -torch.inf).any(1)).sum(1)
        return total / seen.clamp(min=1)

    def of_maps(self, maps: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B K"]:
        """Average the columns of full maps."""
        counted = self._rows_of(maps)[:, :, None]
        queries, keys = maps.shape[2:]
        from_here = torch.ones(queries, keys, dtype=torch.bool, device=maps.device).tril(keys - queries)
        total = torch.where(counted, head_mean(maps, self.heads), 0).sum(1)
        return total / (counted & from_here).sum(1).clamp(min=1)

    def _rows_of(self, of_queries: Float[Tensor, "B H Q _"]) -> Bool[Tensor, "B Q"]:
        """Return the rows on the device of the layer, after checking them against the input's shape."""
        shape = (of_queries.shape[0], of_queries.shape[2])
        if self.rows.shape != shape:
            raise ValueError(f"rows has shape {tuple(self.rows.shape)}, the model's input {shape}: give one for each")
        return self.rows.to(of_queries.device)


def check_is_bool(rows: Tensor) -> None:
    """Refuse numbers in the place of a mask.

    Raises:
        ValueError: If it is not bool.
    """
    if rows.dtype != torch.bool:
        raise ValueError(f"the mask of queries is {rows.dtype}; give a bool one, such as mask.bool()")


@contextmanager
def capture_columns(
    model: nn.Module,
    rows: Bool[Tensor, "B Q"],
    layer: int | None = None,
    heads: tuple[int, ...] | None = None,
) -> Iterator[CapturedColumns]:
    """Capture column means of one attention layer while the model runs under its own kernel.

    Args:
        model: Any transformers model, also inside PEFT or another module.
        rows: (B, Q) bool. Columns of `input_ids` whose queries count.
        layer: Layer number, negative from the end; None for the last full-attention layer.
        heads: Heads that are averaged; None for all.

    Yields:
        An empty CapturedColumns, which the model's forward pass fills.

    Raises:
        ValueError: If the model has no attention layer or head of that number, or rows does not fit the input.
        RuntimeError: If the model drops out, or this layer is being captured already.
    """
    captured = CapturedColumns(rows, heads)
    with capturing(model, captured, layer):
        yield captured


@contextmanager
def capture_attention(model: nn.Module, request: AttentionRequest, answer: Bool[Tensor, "B Q"]) -> Iterator[Captured]:
    """Capture what a request asks for of queries of a response.

    Args:
        model: Any transformers model, also inside PEFT or another module.
        request: Layer, heads, and which queries; "read" and "last" are the last one that is given.
        answer: (B, Q) bool. Columns of `input_ids` that hold the response, as far as it is to be read.

    Yields:
        What the model's forward pass fills the `weights`, (B, K) float32, of. Without any query they mean nothing.

    Raises:
        ValueError: If the model has no attention layer or head of that number, or the answer does not fit the input, or
            is not bool.
        RuntimeError: If the model drops out, or this layer is being captured already.
    """
    check_is_bool(answer)
    rows = answer & ~is_last(answer) if request.before_last else answer
    if request.row == "mean":
        capture = capture_columns(model, rows, request.layer, request.heads)
    else:
        capture = capture_row(model, last_index(rows).clamp(min=0), request.layer, request.heads)
    with capture as captured:
        yield captured
