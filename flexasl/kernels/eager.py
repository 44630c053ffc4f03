"""Attention by plain tensor operations, which honours all settings. Shapes: those of `flexasl.kernels`, R = H / G."""

from __future__ import annotations

import torch
from torch import Tensor

from flexasl.attention_spec import AttentionSpec
from flexasl.kernels.tiling import at_once, tiles
from flexasl.masks import Visibility

QUERIES, TILE = 64, 2**25
"""Queries that run at once, which keeps their tiles in a CPU's cache, and the most logits held."""
WIDENED = 2**18
"""Numbers that are widened to float32 at once in decode."""


def attend(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None, sinks: Tensor | None
) -> Tensor:
    """Logits and softmax in float32 (float64 for float64), in tiles of queries."""
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    narrow = key.dtype != wide
    if narrow and not (queries == 1 and key.is_cpu):
        key, value, narrow = key.to(wide), value.to(wide), False
    plain = visible is None
    if plain and queries > 1:
        visible = Visibility.last(queries, keys, query.device)
    out = []
    most, ahead = min(QUERIES, at_once(queries, TILE, batch * heads * keys)), 0 if visible is None else visible.ahead
    for some, seen in tiles(spec, queries, keys, most, ahead):
        scaled = (query[:, :, some].to(wide) * spec.factor(dim)).reshape(batch, groups, -1, dim)
        products = _products(scaled, key[:, :, seen]) if narrow else scaled @ key[:, :, seen].transpose(-1, -2)
        products = products.view(batch, groups, heads // groups, -1, products.shape[-1])
        mask = None
        if visible is not None:
            # In plain causal order only the last keys can be in the future of any query of the tile.
            masked = slice(seen.stop - products.shape[3], seen.stop) if plain else seen
            mask = visible.mask(spec, some, masked)[:, :, None]
        logits = spec.logits(products, mask)
        weights = logits.softmax(-1)
        if sinks is not None:
            excess = logits.logsumexp(-1) - sinks.to(wide).view(groups, -1, 1)
            weights = weights * excess.sigmoid()[..., None]
        weights = weights.view(batch, groups, -1, weights.shape[-1])
        mixed = _mixtures(weights, value[:, :, seen]) if narrow else weights @ value[:, :, seen]
        out.append(mixed.view(batch, heads, -1, value.shape[-1]).to(query.dtype))
    return torch.cat(out, 2)


def _products(rows: Tensor, key: Tensor) -> Tensor:
    """rows [B, G, R, D] by narrower keys [B, G, N, D] → [B, G, R, N]; some keys are widened at a time, which stays in a
    CPU's cache."""
    return torch.cat([rows @ part.to(rows.dtype).transpose(-1, -2) for part in key.split(_few(key), 2)], -1)


def _mixtures(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, G, R, N] by narrower values [B, G, N, D] → [B, G, R, D], likewise."""
    few = _few(value)
    parts = zip(weights.split(few, -1), value.split(few, 2), strict=True)
    return sum((some @ part.to(weights.dtype) for some, part in parts), start=weights.new_zeros(()))


def _few(states: Tensor) -> int:
    batch, groups, _, dim = states.shape
    return states.shape[2] if torch.compiler.is_compiling() else max(64, WIDENED // (batch * groups * dim))
