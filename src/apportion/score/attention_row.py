"""One query's row of attention from the arguments of an attention function: pure arithmetic, O(T d).

Any mask that transformers hands to a kernel is understood: 4-D bool or additive (sdpa, eager), 2-D padding (flash),
BlockMask (flex), or none where the kernel applies causality and window by itself.

Source: Chan et al., 2024 (https://arxiv.org/abs/2402.00782), which reads the row from full eager maps.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask


def attention_row(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G K D"],
    read_index: Int[Tensor, "B"],
    bias: Float[Tensor, "B h K"],
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B K"]:
    """Compute the attention of one query per row, mean over heads, in float32.

        s_k = softcap * tanh(scaling * q . k / softcap) + bias_k
        p   = softmax(concat(s, sink))[:K], mean over heads

    Queries are grouped by key-value head (H = G * heads a group) instead of repeating the keys: O(H K D) work and
    O(G K D) memory. Fast kernels compute in the model's dtype: at bfloat16 they differ from this by its rounding.

    Args:
        query: (B, H, Q, D) float. After rotary embedding and norms.
        key: (B, G, K, D) float. As the query, with cached keys first.
        read_index: (B,) int64. Row of `query` to use.
        bias: (B, h, K) float32. Added to the scores, h = 1 or H; -inf hides a key.
        scaling: Factor of the products; 1/sqrt(D) if None.
        softcap: Bound of the scores (Gemma 2); none if None.
        sinks: (H,) float. Score of a key without value (gpt-oss), which takes mass away.

    Returns:
        (B, K) float32. Exactly zero on hidden keys, also where all are hidden.
    """
    rows, heads, _, width = query.shape
    batch = torch.arange(rows, device=query.device)
    grouped = query[batch, :, read_index].float().view(rows, key.shape[1], -1, width)
    scores = torch.einsum("bgrd,bgkd->bgrk", grouped, key.float()).reshape(rows, heads, -1)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = bias == -torch.inf
    # The lowest finite number keeps a row without any visible key free of NaN; a NaN of the model's own passes through.
    scores = (scores + bias).masked_fill(hidden, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1).expand(rows, -1, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return weights.masked_fill(hidden, 0.0).mean(dim=1)


def mask_row(
    mask: Tensor | BlockMask | None,
    module: nn.Module,
    read_index: Int[Tensor, "B"],
    queries: int,
    keys: int,
    options: dict[str, Any],
) -> Float[Tensor, "B h K"]:
    """Turn the mask that an attention function was given into what one query of each row may see.

    Args:
        mask: (B or 1, h, Q or 1, K or more) bool (True: visible) or additive float for sdpa and eager; (B, K) padding
            mask or None for flash; BlockMask for flex.
        module: The attention layer, for `is_causal` and its implementation's name.
        read_index: (B,) int64. Query of each row.
        queries: Q.
        keys: K. Query i stands at key i + K - Q.
        options: The other keyword arguments of the attention function: sliding_window, is_causal, and for packed
            flash inputs cu_seq_lens_k or position_ids.

    Returns:
        (B, h, K) float32. 0 or a bias on visible keys, -inf on hidden ones.
    """
    if isinstance(mask, BlockMask):
        return _hide(~_block_mask_row(mask, read_index, keys))
    if mask is not None and mask.dim() == 4:
        row = take_query(mask, read_index, queries, keys)
        if row.dtype == torch.bool:
            return _hide(~row)
        return row.float().masked_fill(row <= torch.finfo(row.dtype).min / 2, -torch.inf)
    position = read_index + (keys - queries)
    causal = options.get("is_causal")
    visible = visible_keys(
        position,
        keys,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        window=options.get("sliding_window"),
        start=_packed_start(module, read_index, position, options) if mask is None else None,
    )
    if mask is not None:
        visible = visible & mask[:, :keys].bool()
    return _hide(~visible[:, None])


def visible_keys(
    position: Int[Tensor, "B"],
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    start: Int[Tensor, "B"] | None = None,
) -> Bool[Tensor, "B K"]:
    """Say which keys a query sees where no mask was built, as the kernels do by themselves.

    Args:
        position: (B,) int64. Key column at which each query stands.
        keys: Number of keys K.
        causal: Whether later keys are hidden.
        window: Number of keys up to and including the query's own that it sees; all if None.
        start: (B,) int64. First key of the query's own sequence, where several are packed in a row.

    Returns:
        (B, K) bool. True on visible keys.

    Raises:
        ValueError: If a window shorter than K is asked for without causality: its extent differs from family to family.
    """
    columns, here = torch.arange(keys, device=position.device)[None], position[:, None]
    visible = columns <= here if causal else torch.ones_like(columns <= here)
    if window is not None and window < keys:
        if not causal:
            raise ValueError(f"a bidirectional window of {window} keys under flash attention: use sdpa for this model")
        visible = visible & (columns > here - window)
    return visible if start is None else visible & (columns >= start[:, None])


def take_query(maps: Tensor, read_index: Int[Tensor, "B"], queries: int, keys: int) -> Tensor:
    """Take one query of each row from a mask or map.

    Args:
        maps: (B or 1, h, Q or 1, K or more) any dtype.
        read_index: (B,) int64. Query of each row.
        queries: Q.
        keys: K; further columns (of a static cache) are cut off.

    Returns:
        (B, h, K), dtype of `maps`.
    """
    full = maps[..., :keys].expand(read_index.shape[0], -1, queries, -1)
    return full[torch.arange(read_index.shape[0], device=maps.device), :, read_index]


def _hide(hidden: Bool[Tensor, "B h K"]) -> Float[Tensor, "B h K"]:
    """Return 0 on visible and -inf on hidden keys."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)


def _block_mask_row(mask: BlockMask, read_index: Int[Tensor, "B"], keys: int) -> Bool[Tensor, "B 1 K"]:
    """Evaluate flex attention's mask function at one query of each row."""
    batch = torch.arange(read_index.shape[0], device=read_index.device)[:, None]
    columns = torch.arange(keys, device=read_index.device)[None]
    visible = mask.mask_mod(batch, torch.zeros_like(batch), read_index[:, None], columns)
    return visible.expand(read_index.shape[0], keys)[:, None]


def _packed_start(
    module: nn.Module, read_index: Int[Tensor, "B"], position: Int[Tensor, "B"], options: dict[str, Any]
) -> Int[Tensor, "B"] | None:
    """Return the first key of the query's sequence where flash attention got several sequences in one row."""
    bounds, position_ids = options.get("cu_seq_lens_k"), options.get("position_ids")
    if bounds is not None:
        return bounds[torch.searchsorted(bounds, position, right=True) - 1].to(position.dtype)
    # Without a mask flash attention finds the sequences of a single row where position_ids start again.
    name = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    if position_ids is None or position.shape[0] != 1 or "flash" not in name:
        return None
    return (position - position_ids[0, read_index]).clamp(min=0)
