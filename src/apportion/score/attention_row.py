"""Queries' rows of attention from the arguments of an attention function: pure arithmetic, O(T d) a row.

Any mask that transformers hands to a kernel is understood: 4-D bool or additive (sdpa, eager), 2-D padding (flash),
BlockMask (flex), or none where the kernel applies causality and window by itself.

Source: Chan et al., 2024 (https://arxiv.org/abs/2402.00782), which reads the rows from full eager maps.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask


def attention_weights(
    query: Float[Tensor, "B H R D"],
    key: Float[Tensor, "B G K D"],
    bias: Float[Tensor, "B h R K"],
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H R K"]:
    """Compute the attention of some queries in float32, also under autocast.

        s_k = softcap * tanh(scaling * q . k / softcap) + bias_k
        p   = softmax(concat(s, sink))[:K]

    Queries are grouped by key-value head (H = G * heads a group) instead of repeating the keys: O(R H K D) work and
    O(G K D) memory beside the result. Fast kernels compute in the model's dtype: at bfloat16 they differ from this by
    its rounding.

    Args:
        query: (B, H, R, D) float. After rotary embedding and norms.
        key: (B, G, K, D) float. As the query, with cached keys first.
        bias: (B, h, R, K) float32. Added to the scores, h = 1 or H; -inf hides a key.
        scaling: Factor of the products; 1/sqrt(D) if None.
        softcap: Bound of the scores (Gemma 2); none if None.
        sinks: (H,) float. Score of a key without value (gpt-oss), which takes mass away.

    Returns:
        (B, H, R, K) float32. Exactly zero on hidden keys, also where all are hidden.
    """
    rows, heads, queries, width = query.shape
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().reshape(rows, key.shape[1], -1, width)
        scores = (grouped @ key.float().mT).view(rows, heads, queries, -1)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = bias == -torch.inf
    # The lowest finite number keeps a row without any visible key free of NaN; a NaN of the model's own passes through.
    scores = (scores + bias).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(rows, -1, queries, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return weights.masked_fill(hidden, 0.0)


def attention_row(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G K D"],
    read_index: Int[Tensor, "B"],
    bias: Float[Tensor, "B h K"],
    *,
    heads: tuple[int, ...] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B K"]:
    """Compute the attention of one query per row, mean over heads, in float32; see `attention_weights`.

    Args:
        query: (B, H, Q, D) float. After rotary embedding and norms.
        key: (B, G, K, D) float. As the query, with cached keys first.
        read_index: (B,) int64. Row of `query` to use.
        bias: (B, h, K) float32. Added to the scores, h = 1 or H; -inf hides a key.
        heads: Heads that are averaged; None for all.
        scaling: Factor of the products; 1/sqrt(D) if None.
        softcap: Bound of the scores (Gemma 2); none if None.
        sinks: (H,) float. Score of a key without value (gpt-oss), which takes mass away.

    Returns:
        (B, K) float32. Exactly zero on hidden keys, also where all are hidden.

    Raises:
        ValueError: If there is no head of a number.
    """
    chosen = query[torch.arange(len(query), device=query.device), :, read_index][:, :, None]
    weights = attention_weights(chosen, key, bias[:, :, None], scaling=scaling, softcap=softcap, sinks=sinks)
    return head_mean(weights, heads)[:, 0]


def head_mean(weights: Float[Tensor, "B H R K"], heads: tuple[int, ...] | None) -> Float[Tensor, "B R K"]:
    """Average over heads.

    Args:
        weights: (B, H, R, K) float.
        heads: Numbers from 0; None for all.

    Returns:
        (B, R, K) float32.

    Raises:
        ValueError: If there is no head of a number.
    """
    check_heads(heads, weights.shape[1])
    return (weights if heads is None else weights[:, list(heads)]).float().mean(1)


def check_heads(heads: tuple[int, ...] | None, count: int) -> None:
    """Refuse heads that a layer does not have.

    Raises:
        ValueError: If there is no head of a number; it names those that there are.
    """
    if heads is not None and max(heads) >= count:
        raise ValueError(f"heads is {heads}, the attention layer has heads 0 to {count - 1}: choose among them")


def mask_rows(
    mask: Tensor | BlockMask | None,
    module: nn.Module,
    index: Int[Tensor, "B R"],
    queries: int,
    keys: int,
    options: dict[str, Any],
) -> Float[Tensor, "B h R K"]:
    """Turn the mask that an attention function was given into what some queries of each row may see.

    Args:
        mask: (B or 1, h, Q or 1, K or more) bool (True: visible) or additive float for sdpa and eager; (B, K) padding
            mask or None for flash; BlockMask for flex.
        module: The attention layer, for `is_causal` and its implementation's name.
        index: (B, R) int64. Queries of each row.
        queries: Q.
        keys: K. Query i stands at key i + K - Q.
        options: The other keyword arguments of the attention function: sliding_window, is_causal, and for packed
            flash inputs cu_seq_lens_k or position_ids; a position_bias is added.

    Returns:
        (B, h, R, K) float32. 0 or a bias on visible keys, -inf on hidden ones.
    """
    bias = _bias(mask, module, index, queries, keys, options)
    position_bias = options.get("position_bias")
    return bias if position_bias is None else bias + take_queries(position_bias, index, queries, keys).float()


def _bias(
    mask: Tensor | BlockMask | None,
    module: nn.Module,
    index: Int[Tensor, "B R"],
    queries: int,
    keys: int,
    options: dict[str, Any],
) -> Float[Tensor, "B h R K"]:
    """Read the mask alone."""
    if isinstance(mask, BlockMask):
        return _hide(~_block_mask_rows(mask, index, keys))
    if mask is not None and mask.dim() == 4:
        rows = take_queries(mask, index, queries, keys)
        if rows.dtype == torch.bool:
            return _hide(~rows)
        return rows.float().masked_fill(rows <= torch.finfo(rows.dtype).min / 2, -torch.inf)
    position = index + (keys - queries)
    causal = options.get("is_causal")
    visible = visible_keys(
        position,
        keys,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        window=options.get("sliding_window"),
        start=_packed_start(module, index, position, options) if mask is None else None,
    )
    if mask is not None:
        visible = visible & mask[:, None, :keys].bool()
    return _hide(~visible[:, None])


def visible_keys(
    position: Int[Tensor, "*rows"],
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    start: Int[Tensor, "*rows"] | None = None,
) -> Bool[Tensor, "*rows K"]:
    """Say which keys a query sees where no mask was built, as the kernels do by themselves.

    Args:
        position: (...) int64. Key column at which each query stands.
        keys: Number of keys K.
        causal: Whether later keys are hidden.
        window: Number of keys up to and including the query's own that it sees; all if None.
        start: (...) int64. First key of the query's own sequence, where several are packed in a row.

    Returns:
        (..., K) bool. True on visible keys.

    Raises:
        ValueError: If a window shorter than K is asked for without causality: its extent differs from family to family.
    """
    columns, here = torch.arange(keys, device=position.device), position[..., None]
    visible = columns <= here if causal else torch.ones_like(columns <= here)
    if window is not None and window < keys:
        if not causal:
            raise ValueError(f"a bidirectional window of {window} keys under flash attention: use sdpa for this model")
        visible = visible & (columns > here - window)
    return visible if start is None else visible & (columns >= start[..., None])


def take_queries(maps: Tensor, index: Int[Tensor, "B R"], queries: int, keys: int) -> Tensor:
    """Take some queries of each row from a mask or map.

    Args:
        maps: (B or 1, h, Q or 1, K or more) any dtype.
        index: (B, R) int64. Queries of each row.
        queries: Q.
        keys: K; further columns (of a static cache) are cut off.

    Returns:
        (B, h, R, K), dtype of `maps`.
    """
    full = maps[..., :keys].expand(len(index), -1, queries, -1)
    return full[torch.arange(len(index), device=maps.device)[:, None], :, index].transpose(1, 2)


def _hide(hidden: Bool[Tensor, "B h R K"]) -> Float[Tensor, "B h R K"]:
    """Return 0 on visible and -inf on hidden keys."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)


def _block_mask_rows(mask: BlockMask, index: Int[Tensor, "B R"], keys: int) -> Bool[Tensor, "B 1 R K"]:
    """Evaluate flex attention's mask function at some queries of each row."""
    batch = torch.arange(len(index), device=index.device)[:, None, None]
    columns = torch.arange(keys, device=index.device)
    visible = mask.mask_mod(batch, torch.zeros_like(batch), index[:, :, None], columns)
    return visible.expand(*index.shape, keys)[:, None]


def _packed_start(
    module: nn.Module, index: Int[Tensor, "B R"], position: Int[Tensor, "B R"], options: dict[str, Any]
) -> Int[Tensor, "B R"] | None:
    """Return the first key of each query's sequence where flash attention got several sequences in one row."""
    bounds, position_ids = options.get("cu_seq_lens_k"), options.get("position_ids")
    if bounds is not None:
        return bounds[torch.searchsorted(bounds, position, right=True) - 1].to(position.dtype)
    # Without a mask flash attention finds the sequences of a single row where position_ids start again.
    name = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    if position_ids is None or position.shape[0] != 1 or "flash" not in name:
        return None
    return (position - position_ids[0, index]).clamp(min=0)
