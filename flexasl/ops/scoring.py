"""Window scores: how much attention the last prompt tokens pay to each token before them.

Shapes: B batch, H query heads, G KV heads, R = H / G, N keys, W window, P = N - W prefix keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("flexasl::window_scores", mutates_args=())
def window_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    pooling: str,
    scale: float | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Score of each prefix token at each KV head: the attention that it gets from the window's queries, pooled over
    neighbouring tokens per query head, and summed over the head's queries.

    query [B, H, W, D] are the queries of the last W keys; key [B, G, N, D]; any float dtype. valid [B, N] bool is False
    at padding, which neither gives nor gets. positions [B, N] int (default 0..N-1) matter to `sliding_window` only,
    which hides keys that many positions back or more. pooling is `"avgpool"`, which pads with zeros and divides by
    `kernel_size` everywhere, or `"maxpool"`. → [B, G, P] float32.

    One KV head at a time: beside inputs and output, it holds two float32 tensors [B, R * W, N] and, for inputs in half
    precision, one [B, N, D]. Section 3 of arXiv 2601.07667; SnapKV, arXiv 2404.14469.
    """
    prefix = key.shape[2] - query.shape[2]
    masses = _masses(query, key, scale, valid, positions, sliding_window)
    return torch.stack([_pool(mass[..., :prefix], kernel_size, pooling).sum(1) for mass in masses], 1)


@window_scores.register_fake
def _(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    pooling: str,
    scale: float | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    return query.new_empty(key.shape[0], key.shape[1], key.shape[2] - query.shape[2], dtype=torch.float32)


@torch.library.custom_op("flexasl::window_mass", mutates_args=())
def window_mass(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention that each key gets at each KV head, the window's own keys included: the mean over the head's queries,
    which sums to 1 over the keys. Arguments as in `window_scores`. → [B, G, N] float32.
    """
    return torch.stack(
        [mass.mean(1) / query.shape[2] for mass in _masses(query, key, scale, valid, positions, sliding_window)], 1
    )


@window_mass.register_fake
def _(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    return query.new_empty(key.shape[:3], dtype=torch.float32)


def _masses(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    valid: Tensor | None,
    positions: Tensor | None,
    sliding_window: int | None,
) -> Iterator[Tensor]:
    """Per KV head, each key's attention summed over the window: [B, R, N] float32."""
    batch, heads, window, dim = query.shape
    groups, tokens = key.shape[1], key.shape[2]
    grouped = query.float().mul(dim**-0.5 if scale is None else scale).reshape(batch, groups, -1, dim)
    hidden = _hidden(window, valid, positions, sliding_window, key)
    future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
    for group in range(groups):
        logits = grouped[:, group] @ key[:, group].float().transpose(-1, -2)
        logits = logits.view(batch, heads // groups, window, tokens)
        logits[..., tokens - window :].masked_fill_(future, float("-inf"))
        if hidden is not None:
            logits.masked_fill_(hidden, float("-inf"))
        weights = logits.softmax(-1)
        if valid is not None:
            weights.masked_fill_(~valid[:, None, tokens - window :, None], 0.0)
        yield weights.sum(2)


def _hidden(
    window: int, valid: Tensor | None, positions: Tensor | None, sliding_window: int | None, key: Tensor
) -> Tensor | None:
    """Keys hidden from each window query besides the future ones, [B, 1, W or 1, N] bool, or None."""
    batch, tokens = key.shape[0], key.shape[2]
    hidden = None if valid is None else ~valid[:, None, None, :]
    if sliding_window is not None and (positions is not None or sliding_window < tokens):
        at = torch.arange(tokens, device=key.device).expand(batch, tokens) if positions is None else positions
        old = (at[:, None, :] <= at[:, tokens - window :, None] - sliding_window)[:, None]
        hidden = old if hidden is None else hidden | old
    return hidden


def _pool(mass: Tensor, kernel_size: int, pooling: str) -> Tensor:
    if mass.shape[-1] == 0:
        return mass
    pool = F.avg_pool1d if pooling == "avgpool" else F.max_pool1d
    return pool(mass, kernel_size, stride=1, padding=kernel_size // 2)
