"""Window scores: how much attention the last prompt tokens pay to each token before them.

Shapes: B batch, H query heads, G KV heads, R = H / G, N keys, W window, P = N - W prefix keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 2**23
"""Logits held at once, in elements per row of the batch, unless one query head alone has more."""


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score of each prefix token at each KV head: the attention that it gets from the window's queries, pooled over
    neighbouring tokens per query head, and summed over the head's queries.

    query [B, H, W, D] are the queries of the last W keys; key [B, G, N, D]; any float dtype. valid [B, N] bool is False
    at padding, which neither gives nor gets, whatever it holds. positions [B, N] int (default 0..N-1) matter to
    `sliding_window` only, which hides keys that many positions back or more. softcap c turns logits x into
    c tanh(x / c); sinks [H] are logits of a key that is no token and takes its share of each query's attention. pooling
    is `"avgpool"`, which pads with zeros and divides by `kernel_size` everywhere, or `"maxpool"`. → [B, G, P] float32,
    without gradients. A real token that is not finite makes the scores of its KV head NaN, in its row.

    KV heads are never expanded, and query heads go in tiles: beside inputs and output it holds [B, H, N] and two tiles
    of `TILE` logits (or of one head's W x N) in float32, and for inputs in half precision one [B, N, D]. With H 32,
    N 131,072, W 32: 80 MiB, in half precision 144 MiB; all logits at once would be 512 MiB. Section 3 of
    arXiv 2601.07667; SnapKV, arXiv 2404.14469.
    """
    mass = _mass(query, key, scale, valid, positions, sliding_window, softcap, sinks)
    return _by_group(_pool(mass[..., : key.shape[2] - query.shape[2]], kernel_size, pooling), key.shape[1])


@window_scores.register_fake
def _(query: Tensor, key: Tensor, *settings: object, **more: object) -> Tensor:
    return query.new_empty(key.shape[0], key.shape[1], key.shape[2] - query.shape[2], dtype=torch.float32)


@torch.library.custom_op("flexasl::window_scores_and_mass", mutates_args=())
def window_scores_and_mass(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    pooling: str,
    scale: float | None = None,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`window_scores` [B, G, P] float32, and from the same pass the attention that each of the N keys gets, the
    window's own included, not pooled: [B, G, N] float32."""
    groups, prefix = key.shape[1], key.shape[2] - query.shape[2]
    mass = _mass(query, key, scale, valid, positions, sliding_window, softcap, sinks)
    return _by_group(_pool(mass[..., :prefix], kernel_size, pooling), groups), _by_group(mass, groups)


@window_scores_and_mass.register_fake
def _(query: Tensor, key: Tensor, *settings: object, **more: object) -> tuple[Tensor, Tensor]:
    rows, groups, tokens, _ = key.shape
    scores = query.new_empty(rows, groups, tokens - query.shape[2], dtype=torch.float32)
    return scores, query.new_empty(rows, groups, tokens, dtype=torch.float32)


def _mass(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    valid: Tensor | None,
    positions: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Each key's attention from each query head, summed over the window: [B, H, N] float32."""
    batch, heads, window, dim = query.shape
    groups, tokens = key.shape[1], key.shape[2]
    repeats = heads // groups
    query = query.float() * (dim**-0.5 if scale is None else scale)
    hidden = _hidden(window, valid, positions, sliding_window, key)
    future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
    mass = torch.empty(batch, heads, tokens, dtype=torch.float32, device=key.device)
    tile = min(repeats, max(1, TILE // (window * tokens)))
    # Two buffers for all tiles: fresh ones would cost as much as the softmax, in page faults.
    room = torch.empty(2, batch, tile * window, tokens, dtype=torch.float32, device=key.device)
    for group in range(groups):
        keys = key[:, group].float().transpose(-1, -2)
        for first in range(group * repeats, (group + 1) * repeats, tile):
            some = slice(first, min(first + tile, (group + 1) * repeats))
            count = some.stop - first
            logits, weights = room[:, :, : count * window]
            torch.matmul(query[:, some].flatten(1, 2), keys, out=logits)
            logits, weights = (part.view(batch, count, window, tokens) for part in (logits, weights))
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            logits[..., tokens - window :].masked_fill_(future, float("-inf"))
            if hidden is not None:
                logits.masked_fill_(hidden, float("-inf"))
            torch.softmax(logits, -1, out=weights)
            if sinks is not None:
                excess = logits.logsumexp(-1) - sinks[some].float()[:, None]
                weights.mul_(excess.sigmoid()[..., None])
            if valid is not None:
                weights.masked_fill_(~valid[:, None, tokens - window :, None], 0.0)
            torch.sum(weights, 2, out=mass[:, some])
    return mass


def _hidden(
    window: int, valid: Tensor | None, positions: Tensor | None, sliding_window: int | None, key: Tensor
) -> Tensor | None:
    """Keys hidden from each window query besides the future ones, [B, 1, W or 1, N] bool, or None."""
    batch, tokens = key.shape[0], key.shape[2]
    hidden = None if valid is None else ~valid[:, None, None, :]
    if sliding_window is not None and (positions is not None or sliding_window < tokens):
        at = positions
        if at is None:
            at = torch.arange(tokens, dtype=torch.int64, device=key.device).expand(batch, tokens)
        old = (at[:, None, :] <= at[:, tokens - window :, None] - sliding_window)[:, None]
        hidden = old if hidden is None else hidden | old
    return hidden


def _pool(mass: Tensor, kernel_size: int, pooling: str) -> Tensor:
    if kernel_size == 1 or mass.shape[-1] == 0:
        return mass
    pool = F.avg_pool1d if pooling == "avgpool" else F.max_pool1d
    return pool(mass, kernel_size, stride=1, padding=kernel_size // 2)


def _by_group(states: Tensor, groups: int) -> Tensor:
    """[B, H, N] → [B, G, N], summed over the heads of a group."""
    return states.unflatten(1, (groups, -1)).sum(2)
