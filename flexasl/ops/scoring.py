"""Window scores: how much attention the last prompt tokens pay to each token.

Shapes: B batch, H query heads, G KV heads, R = H / G, N keys, W window, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def window_mass(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention that each key gets from the window's queries, per query head and summed over the window.

    query [B, H, W, D] are the queries of the last W keys; key [B, G, N, D]; valid [B, N] bool is False at padding,
    which neither gives nor gets; positions [B, N] int (default 0..N-1) matter to `sliding_window` only, which hides
    keys that many positions back or more. Returns [B, H, N] float32. One KV head at a time, so the largest temporary
    holds B * R * W * N floats. Section 3 of arXiv 2601.07667; SnapKV, arXiv 2404.14469.
    """
    batch, heads, window, dim = query.shape
    groups, tokens = key.shape[1], key.shape[2]
    repeats = heads // groups
    scale = dim**-0.5 if scale is None else scale
    hidden = _hidden(window, valid, positions, sliding_window, tokens, batch, key.device)
    future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
    grouped = query.float().mul(scale).reshape(batch, groups, repeats * window, dim)
    mass = []
    for group in range(groups):
        logits = grouped[:, group] @ key[:, group].float().transpose(-1, -2)
        logits = logits.view(batch, repeats, window, tokens)
        logits[..., tokens - window :].masked_fill_(future, float("-inf"))
        if hidden is not None:
            logits.masked_fill_(hidden, float("-inf"))
        weights = logits.softmax(-1)
        if valid is not None:
            weights = weights.masked_fill(~valid[:, None, tokens - window :, None], 0.0)
        mass.append(weights.sum(2))
    return torch.cat(mass, 1)


def pool_scores(mass: Tensor, *, kernel_size: int, pooling: str) -> Tensor:
    """Score of each prefix token: its attention mass pooled with its neighbours'.

    mass [..., P] float32, prefix columns only → [..., P]. `"avgpool"` pads with zeros and divides by `kernel_size`
    everywhere; `"maxpool"` ignores the padding.
    """
    if mass.shape[-1] == 0:
        return mass
    flat = mass.reshape(-1, 1, mass.shape[-1])
    if pooling == "avgpool":
        pooled = F.avg_pool1d(flat, kernel_size, stride=1, padding=kernel_size // 2)
    else:
        pooled = F.max_pool1d(flat, kernel_size, stride=1, padding=kernel_size // 2)
    return pooled.view(mass.shape)


def _hidden(
    window: int,
    valid: Tensor | None,
    positions: Tensor | None,
    sliding_window: int | None,
    tokens: int,
    batch: int,
    device: torch.device,
) -> Tensor | None:
    """Keys hidden from each window query besides the future ones, [B or 1, 1, W or 1, N] bool, or None."""
    hidden = None if valid is None else ~valid[:, None, None, :]
    if sliding_window is not None and (positions is not None or sliding_window < tokens):
        at = torch.arange(tokens, device=device).expand(batch, tokens) if positions is None else positions
        old = at[:, None, :] <= at[:, tokens - window :, None] - sliding_window
        hidden = old[:, None] if hidden is None else hidden | old[:, None]
    return hidden
