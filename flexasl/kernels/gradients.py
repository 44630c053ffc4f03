"""Gradients of attention by formula, for graphs in which it is one opaque node.

Shapes: those of `flexasl.kernels`, R = H / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexasl.attention_spec import AttentionSpec
from flexasl.kernels.alibi import with_alibi
from flexasl.masks import Visibility

PAIRS = 2**22
"""Pairs of query and key of one head and row that are held at once, unless one query has more."""


def attention_gradients(
    spec: AttentionSpec,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query [B, H, M, D], key [B, G, N, D], value [B, G, N, E] and sinks [H] (0 where there are none), by
    that of the output [B, H, M, E]. Computed in float32 at least, some queries at a time."""
    if spec.alibi is not None:
        dim = query.shape[3]
        rest, query, key = with_alibi(spec, query, key, visible)
        made = attention_gradients(rest, grad, query, key, value, visible, sinks)
        return made[0][..., :dim], made[1][..., :dim], made[2], made[3]
    (batch, heads, queries, dim), (groups, keys) = query.shape, key.shape[1:3]
    wide, factor = torch.promote_types(query.dtype, torch.float32), spec.factor(dim)
    key_wide, value_wide = key.to(wide), value.to(wide)
    for_query = query.new_empty(query.shape)
    for_key, for_value = torch.zeros_like(key_wide), torch.zeros_like(value_wide)
    for_sinks = query.new_zeros(heads, dtype=wide)
    step = max(1, PAIRS // keys)
    for first in range(0, queries, step):
        some = slice(first, min(first + step, queries))
        shape = (batch, groups, -1, some.stop - first)
        own = query[:, :, some].to(wide).reshape(batch, groups, -1, dim) * factor
        products = own @ key_wide.transpose(-1, -2)
        derivative = spec.derivative(products)
        logits = spec.logits(products.view(*shape, keys), visible.mask(spec, some)[:, :, None])
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
        for_products = weights * (for_weights - mean)
        if derivative is not None:
            for_products = for_products * derivative
        for_query[:, :, some] = (for_products @ key_wide * factor).view(batch, heads, -1, dim).to(query.dtype)
        for_key += for_products.transpose(-1, -2) @ own
    return for_query, for_key.to(key.dtype), for_value.to(value.dtype), for_sinks
