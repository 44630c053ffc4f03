"""ALiBi as a part of queries and keys, so that every kernel computes it, and scores do.

A bias by distance, slope times how far back a key is, differs between the keys of a query as slope times position
does: the position is one more number of each key, and the slope one more of each query, by which it is multiplied.

Shapes: B batch, H query heads, G KV heads, M queries, N keys, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flexasl.attention_spec import AttentionSpec
from flexasl.errors import UnsupportedError
from flexasl.masks import Visibility
from flexasl.numbers import on_device

PARTS = 3
"""Numbers of half precision that are as exact together as one of float32."""
UNIT = 256.0
"""Positions that count as 1, which lets float16 have up to 16 million."""
WIDTH = 8
"""By how many numbers queries and keys grow, some of them 0: kernels like multiples of it."""


def with_alibi(
    spec: AttentionSpec, query: Tensor, key: Tensor, visible: Visibility | Tensor | None = None
) -> tuple[AttentionSpec, Tensor, Tensor]:
    """Queries [B, H, M, D + 8] and keys [B, G, N, D + 8] whose products have the bias in them, and the specification
    of the rest. visible: who sees whom, or the keys' positions [B or 1, N] or [B, G, N]; None for consecutive ones."""
    slopes, (heads, dim) = spec.alibi, (query.shape[1], query.shape[3])
    if slopes is None:
        return spec, query, key
    if len(slopes) != heads:
        raise UnsupportedError(f"alibi has slopes of {len(slopes)} heads where there are {heads}; give one for each")
    factor, wide = spec.factor(dim), torch.promote_types(query.dtype, torch.float32)
    at = _positions(visible, key.shape[2], key.device).to(wide) / UNIT
    of_keys = torch.cat(_parts(at[:, None] if at.dim() == 2 else at, key.dtype) * 2, -1)
    first, second, _ = _parts(on_device(slopes, key.device, wide) * (UNIT / factor), query.dtype)
    of_queries = torch.cat([*[first] * PARTS, *[second] * PARTS], -1)[None, :, None]
    query = torch.cat([query, _wide(of_queries.expand(query.shape[0], -1, query.shape[2], -1))], -1)
    key = torch.cat([key, _wide(of_keys.expand(*key.shape[:2], -1, -1))], -1)
    return replace(spec, scale=factor, alibi=None), query, key


def _positions(visible: Visibility | Tensor | None, keys: int, device: torch.device) -> Tensor:
    """[B or 1, N] or [B, G, N], where only differences within a row count."""
    if visible is None:
        return torch.arange(keys, dtype=torch.int64, device=device)[None]
    if isinstance(visible, Tensor):
        return visible
    return visible.key_positions if visible.first_seen is None else visible.key_positions - visible.first_seen


def _parts(states: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers [...] as a sum of some of this dtype, [..., 1] each."""
    made = []
    for _ in range(PARTS):
        made.append(states.to(dtype)[..., None])
        states = states - made[-1][..., 0].to(states.dtype)
    return made


def _wide(states: Tensor) -> Tensor:
    return torch.nn.functional.pad(states, (0, WIDTH - states.shape[-1]))
