"""Kernels of ops that are tuned for CPU.

Shapes: B batch, H query heads, G KV heads, N keys, W scoring queries, P tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexasl.attention_spec import AttentionSpec
from flexasl.ops.ranking import finite, ranks_of, token_ranks
from flexasl.ops.scoring import giving, of_queries, powers_of, window_mask, window_mass, without_padding

TILE = 2**23
"""Logits held at once, in elements per row of the batch, unless one query head alone has more."""


@window_mass.register_kernel("cpu")
def window_mass_in_tiles(
    query: Tensor,
    key: Tensor,
    spec: str = "",
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    query_at: Tensor | None = None,
    power: float = 1.0,
    controls: int = 0,
) -> Tensor:
    """Beside inputs and output it holds two tiles of `TILE` logits (or of one head's W x N) in float32, and for inputs
    in half precision one [B, N, D]. With H 32, N 131,072, W 32: 80 MiB, in half precision 144 MiB; all logits at once
    would be 512 MiB."""
    (batch, heads, window, dim), (groups, tokens) = query.shape, key.shape[1:3]
    rule, repeats = AttentionSpec.from_text(spec), heads // groups
    mask = window_mask(query, key, rule, valid, positions, query_at)
    query = query.float() * rule.factor(dim)
    mass = torch.empty(batch, heads, tokens, dtype=torch.float32, device="cpu")
    tile = min(repeats, max(1, TILE // (window * tokens)))
    # Two buffers for all tiles: fresh ones would cost as much as the softmax, in page faults.
    room = torch.empty(2, batch, tile * window, tokens, dtype=torch.float32, device="cpu")
    for group in range(groups):
        keys = key[:, group].float().transpose(-1, -2)
        for first in range(group * repeats, (group + 1) * repeats, tile):
            some = slice(first, min(first + tile, (group + 1) * repeats))
            products, weights = room[:, :, : (some.stop - first) * window]
            torch.matmul(query[:, some].flatten(1, 2), keys, out=products)
            products, weights = (part.view(batch, -1, window, tokens) for part in (products, weights))
            logits = rule.logits(products, mask)
            torch.softmax(logits, -1, out=weights)
            if sinks is not None:
                weights.mul_((logits.logsumexp(-1) - sinks[some].float()[:, None]).sigmoid()[..., None])
            weights = powers_of(without_padding(weights, valid, query_at), power)
            of_queries(weights, power, controls, giving(valid, query_at, window), out=mass[:, some])
    return mass


@token_ranks.register_kernel("cpu")
def token_ranks_by_radix(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """torch sorts rows of integers on CPU by radix, which takes a sixth of the time at 131,072 tokens: so floats as
    integers in reversed order, with zeros of one sign."""
    if scores.dtype == torch.float64:
        return token_ranks._init_fn(scores, valid)
    bits = (finite(scores).float() + 0.0).view(torch.int32)
    keys = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    if valid is not None:
        keys = keys.masked_fill(~valid, torch.iinfo(torch.int32).max)
    return ranks_of(torch.stack([row.sort(stable=True).indices for row in keys]))
