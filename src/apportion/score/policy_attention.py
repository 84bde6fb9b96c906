"""The policy's attention to its own responses, read while they are sampled.

Each token that the sampler feeds to the policy is a query of one layer. A few of them are kept, then their rows are
added to the columns of their responses at once, and are gone: O(T) memory, no pass beside that of sampling, which gives
PPO its log-probabilities too, and no part of the update. The last token is fed as well, which sampling alone would not
need: it is a query of the teacher-forced form.

Source: ABC-D, Chan et al., 2024 (https://arxiv.org/abs/2402.00782), which stores the maps of generation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from apportion.batch import AttentionRequest
from apportion.rollout import AttentionReader
from apportion.score.attention_row import check_heads, head_mean
from apportion.score.attention_tap import AttentionCall, Listener, capturing, unseen

BLOCK = 8
"""Queries whose rows are computed at once: the arithmetic of one is less than what it takes to begin it."""


@dataclass(kw_only=True)
class _Query:
    """The newest token in the layer, for N responses.

    Attributes:
        keys: K, with its own.
        query: (N, H, 1, D) float. Of a call that can be joined with those before and after it.
        mask: (N or 1, h, 1, K) or (N, K), or None, as the call had it.
        positions: (1, 1) int64. Of a single response, where a kernel finds its beginning by them.
        call: What the layer was called with; of the last query, which speaks for those before.
        row: (N, 1, K) float32. Mean over heads, of a call that stands alone.
        sees: (N, 1, K) bool. Beside `row`: the keys that it is of.
        counted: (N) bool. Responses that it is a query of; None until that is known.
    """

    keys: int
    query: Float[Tensor, "N H 1 D"] | None = None
    mask: Tensor | None = None
    positions: Int[Tensor, "1 1"] | None = None
    call: AttentionCall | None = None
    row: Float[Tensor, "N 1 K"] | None = None
    sees: Bool[Tensor, "N 1 K"] | None = None
    counted: Bool[Tensor, " N"] | None = None

    def follows(self, other: "_Query") -> bool:
        """Tell whether one call could have had both queries, this one after the other."""
        if self.query is None or other.query is None:
            return False
        kinds = [None if x.mask is None else x.mask.ndim for x in (self, other)]
        return len(self.query) == len(other.query) and self.keys == other.keys + 1 and kinds[0] == kinds[1]


def _rows_of(
    queries: list[_Query], heads: tuple[int, ...] | None
) -> tuple[Float[Tensor, "N R K"], Bool[Tensor, "N R K"]]:
    """Compute the rows of queries that follow each other, mean over heads, and the keys that they see."""
    last = queries[-1]
    if last.row is not None and last.sees is not None:
        return last.row, last.sees
    assert last.call is not None  # it comes with a query; for the type checker
    query = torch.cat([x.query for x in queries if x.query is not None], 2)
    positions = [x.positions for x in queries if x.positions is not None]
    options = last.call.options | ({"position_ids": torch.cat(positions, -1)} if positions else {})
    call = replace(last.call, query=query, mask=_mask_of(queries), options=options)
    bias = call.bias(torch.arange(len(queries), device=query.device).expand(len(query), -1))
    return head_mean(call.weights(slice(None), bias), heads), (bias > -torch.inf).any(1).expand(len(query), -1, -1)


def _mask_of(queries: list[_Query]) -> Tensor | None:
    """Join the masks of queries that follow each other; later keys are hidden from earlier ones."""
    masks = [x.mask for x in queries if x.mask is not None]
    if not masks or masks[-1].ndim == 2:
        return masks[-1] if masks else None
    keys = queries[-1].keys
    hidden = False if masks[0].dtype == torch.bool else torch.finfo(masks[0].dtype).min
    return torch.cat([nn.functional.pad(x, (0, keys - x.shape[-1]), value=hidden) for x in masks], 2)


class SampledAttention(Listener, AttentionReader):
    """Gather what a request asks for of the policy's attention, from the tokens that it is fed while it samples.

        mean    w_j = sum_{q=j}^{n-1} A[q, j] / |{q that see j}|        A the mean over heads
        last    w_j = A[n-1, j]

    To n-2 instead of n-1 with `request.before_last`. A layer that is read by a hook (GPT-Neo, GPT-J, Bloom) shows no
    mask: there every q from j on counts, which differs in a local layer of GPT-Neo only.

    Attributes:
        request: Layer, heads, and which queries; "read" is the last one.
        reads_last: Whether the last token of a response is a query.
    """

    def __init__(self, request: AttentionRequest) -> None:
        self.request, self.reads_last = request, not request.before_last
        self._begin(torch.empty(0, 0))

    @contextmanager
    def reading(self, model: nn.Module, logprobs: Float[Tensor, "B M"]) -> Iterator[None]:
        """Look on while the model runs; what was read before is forgotten.

        Raises:
            ValueError: If the model has no attention layer or head of a number.
            RuntimeError: If the model drops out, or this layer is being captured already.
        """
        self._begin(logprobs)
        with capturing(model, self, self.request.layer):
            yield

    def _begin(self, like: Float[Tensor, "B M"]) -> None:
        self._total, self._seen = torch.zeros_like(like), torch.zeros_like(like)
        self._queries: list[_Query] = []
        self._rows, self._place = torch.arange(len(like), device=like.device), 0

    @torch.no_grad()
    def gather(self, rows: Int[Tensor, " N"], place: int, counted: Bool[Tensor, " N"]) -> None:
        """Take the token that the model was fed last as a query.

        Args:
            rows: (N) int64. Responses that the model was run on.
            place: Place of that token in its response, from 0.
            counted: (N) bool. Responses that the token is a query of.

        Raises:
            RuntimeError: If the layer has not run since the last time.
        """
        queries = self._queries
        if not queries or queries[-1].counted is not None:
            raise unseen()
        queries[-1].counted = counted
        if len(queries) > 1:
            queries[-2].call = None
        self._rows, self._place = rows, place
        if len(queries) == BLOCK:
            self._add()

    @property
    def attention(self) -> Float[Tensor, "B M"]:
        """Attention to each token of each response; 0 where no query of the response sees it."""
        self._drop_uncounted()
        self._add()
        return self._total / self._seen.clamp(min=1)

    def observe(self, call: AttentionCall) -> None:
        """See the call of an attention function; its last query counts."""
        heads, keys, mask = self.request.heads, call.key.shape[2], call.mask
        check_heads(heads, call.query.shape[1])
        if call.maps is None and not isinstance(mask, BlockMask) and call.options.get("position_bias") is None:
            positions = call.options.get("position_ids") if len(call.query) == 1 else None
            new = _Query(
                keys=keys,
                query=call.query[:, :, -1:],
                mask=mask[:, :, -1:, :keys] if mask is not None and mask.ndim == 4 else mask,
                positions=None if positions is None else positions[..., -1:],
                call=call,
            )
        else:
            last = call.query.shape[2] - 1
            bias = call.bias(torch.full((len(call.query), 1), last, device=call.query.device))
            row = head_mean(call.weights(slice(last, last + 1), bias), heads)
            new = _Query(keys=keys, row=row, sees=(bias > -torch.inf).any(1).expand_as(row))
        self._append(new)

    def keep(self, maps: Float[Tensor, "B H Q K"]) -> None:
        """See full maps; a hooked layer shows no mask, so that the last query sees all there is."""
        row = head_mean(maps[:, :, -1:], self.request.heads)
        self._append(_Query(keys=maps.shape[3], row=row, sees=torch.ones_like(row, dtype=torch.bool)))

    def _append(self, new: _Query) -> None:
        """Put a query behind those before it, or in their place where no call could have had both."""
        self._drop_uncounted()
        if self._queries and not new.follows(self._queries[-1]):
            self._add()
        self._queries.append(new)

    def _drop_uncounted(self) -> None:
        """Forget a run of the layer that was of no token which counts."""
        if self._queries and self._queries[-1].counted is None:
            self._queries.pop()

    def _add(self) -> None:
        """Add the rows of the queries to the columns of their responses."""
        if not self._queries:
            return
        rows, sees = _rows_of(self._queries, self.request.heads)
        counted = torch.stack([x.counted for x in self._queries if x.counted is not None], 1)
        width = min(self._place + 1, rows.shape[2])  # a sliding layer may hold fewer keys
        columns = slice(self._place + 1 - width, self._place + 1)
        if self.request.row == "mean":
            which = counted[:, :, None].to(rows.device)
            self._total[self._rows, columns] += torch.where(which, rows, 0).sum(1)[:, -width:].to(counted.device)
            self._seen[self._rows, columns] += (which & sees).sum(1)[:, -width:].to(counted.device)
        else:
            newest = torch.where(counted, torch.arange(counted.shape[1], device=counted.device), -1).amax(1)
            row = rows.to(counted.device)[torch.arange(len(rows), device=counted.device), newest.clamp(min=0)]
            whole = torch.zeros(len(rows), self._total.shape[1], device=counted.device)
            whole[:, columns] = row[:, -width:]
            self._total[self._rows] = torch.where(newest[:, None] >= 0, whole, self._total[self._rows])
        self._queries = []
