"""Gradients of attention by formula, for graphs in which it is one opaque node.

Shapes: B batch, H query heads, G KV heads, R = H / G, M queries, N keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexasl.masks import Visibility

PAIRS = 2**22
"""Pairs of query and key of one head and row that are held at once, unless one query has more."""


def attention_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query [B, H, M, D], key and value [B, G, N, D] and sinks [H] (0 where there are none), by that of
    the output [B, H, M, D]. Computed in float32 at least, some queries at a time."""
    (batch, heads, queries, dim), (groups, keys) = query.shape, key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    key_wide, value_wide = key.to(wide), value.to(wide)
    for_query, for_key, for_value = (
        query.new_empty(query.shape),
        torch.zeros_like(key_wide),
        torch.zeros_like(value_wide),
    )
    for_sinks = query.new_zeros(heads, dtype=wide)
    step = max(1, PAIRS // keys)
    for first in range(0, queries, step):
        some = slice(first, min(first + step, queries))
        shape = (batch, groups, -1, some.stop - first)
        own = query[:, :, some].to(wide).reshape(batch, groups, -1, dim)
        raw = own @ key_wide.transpose(-1, -2) * scale
        logits = raw if softcap is None else (raw / softcap).tanh() * softcap
        allowed = visible.tile(some, slice(None), sliding_window)[:, :, None]
        logits = logits.view(*shape, keys).masked_fill(~allowed, float("-inf"))
        total = logits.logsumexp(-1)
        if sinks is not None:
            sunk = sinks.to(wide).view(groups, -1)[..., None]
            total = torch.logaddexp(total, sunk)
        weights = (logits - total[..., None]).exp().view(batch, groups, -1, keys)
        wanted = grad[:, :, some].to(wide).reshape(batch, groups, -1, value.shape[-1])
        for_value += weights.transpose(-1, -2) @ wanted
        for_weights = wanted @ value_wide.transpose(-1, -2)
        mean = (for_weights * weights).sum(-1, keepdim=True)
        if sinks is not None:
            for_sinks -= ((sunk - total).exp() * mean.view(shape)).sum((0, 3)).flatten()
        for_logits = weights * (for_weights - mean)
        if softcap is not None:
            for_logits = for_logits * (1 - (raw / softcap).tanh().square())
        for_query[:, :, some] = (for_logits @ key_wide * scale).view(batch, heads, -1, dim).to(query.dtype)
        for_key += for_logits.transpose(-1, -2) @ own * scale
    return for_query, for_key.to(key.dtype), for_value.to(value.dtype), for_sinks
