"""From ranks to the tokens that are kept, and moving them together.

Shapes: B batch, G KV heads, N tokens, P = N - W prefix tokens, W window, K kept tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("flexasl::select_tokens", mutates_args=())
def select_tokens(ranks: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """Tokens that are kept: those ranked within the budget, and the window.

    Args:
        ranks: [B, P] int32.
        budget: [B] int, counts prefix tokens.
        window: Last tokens, which are always kept.
        valid: [B, P + window] bool, False at padding, which is never kept. None: there is none.

    Returns:
        [B, P + window] bool.

    Examples:
        >>> ranks = torch.tensor([[3, 1, 2]], dtype=torch.int32)
        >>> flexasl.ops.select_tokens(ranks, budget=torch.tensor([1]), window=2)
        tensor([[False,  True, False,  True,  True]])
    """
    best = ranks <= budget[:, None]
    keep = torch.cat([best, best.new_ones(best.shape[0], window)], 1)
    return keep if valid is None else keep & valid


@select_tokens.register_fake
def _(ranks: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    return ranks.new_empty(ranks.shape[0], ranks.shape[1] + window, dtype=torch.bool)


@torch.library.custom_op("flexasl::gather_tokens", mutates_args=())
def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """The tokens at these indices of each row, in memory of their own. Rows are copied whole, near the speed of memory.

    Args:
        states: [B or 1, N, ...].
        indices: [B, K] int64.

    Returns:
        [B, K, ...].
    """
    rows = _count(indices.shape[0], indices)[:, None]
    return states[rows if states.shape[0] > 1 else 0, indices]


@gather_tokens.register_fake
def _(states: Tensor, indices: Tensor) -> Tensor:
    return states.new_empty(*indices.shape, *states.shape[2:])


def _remember_states(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    states, indices = inputs
    ctx.save_for_backward(indices)
    ctx.shape = states.shape


def _scatter_tokens(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    rows, tokens = ctx.shape[:2]
    places = indices if rows == 1 else indices + _count(rows, indices)[:, None] * tokens
    return _added(grad.flatten(0, 1), places, rows * tokens).view(ctx.shape), None


gather_tokens.register_autograd(_scatter_tokens, setup_context=_remember_states)


@torch.library.custom_op("flexasl::compact_kv", mutates_args=())
def compact_kv(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The cache entries at these indices of each row and KV head, in memory of their own.

    Args:
        keys: [B or 1, G, N, D].
        values: [B or 1, G, N, E].
        indices: [B, G, K] int64.

    Returns:
        Keys [B, G, K, D] and values [B, G, K, E].
    """
    rows, heads = _count(keys.shape[0], indices)[:, None, None], _count(indices.shape[1], indices)[:, None]
    return keys[rows, heads, indices], values[rows, heads, indices]


@compact_kv.register_fake
def _(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return keys.new_empty(*indices.shape, keys.shape[-1]), values.new_empty(*indices.shape, values.shape[-1])


def _remember_entries(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    keys, values, indices = inputs
    ctx.save_for_backward(indices)
    ctx.shapes = keys.shape, values.shape


def _scatter_entries(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
    (indices,) = ctx.saved_tensors
    rows, heads, entries = ctx.shapes[0][:3]
    firsts = _count(heads, indices)[:, None] * entries
    if rows > 1:
        firsts = firsts + _count(rows, indices)[:, None, None] * (heads * entries)
    places = indices + firsts
    keys, values = (
        _added(grad.flatten(0, 2), places, rows * heads * entries).view(shape)
        for grad, shape in zip(grads, ctx.shapes, strict=True)
    )
    return keys, values, None


compact_kv.register_autograd(_scatter_entries, setup_context=_remember_entries)


def _added(grads: Tensor, places: Tensor, count: int) -> Tensor:
    """What gradients [K, ...] add up to at their places, of which there are so many: [count, ...]."""
    return grads.new_zeros(count, *grads.shape[1:]).index_add(0, places.flatten(), grads)


def _count(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device=like.device)


def kept_indices(keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept tokens, ascending, at the right end of `count` places.

    Args:
        keep: [..., N] bool with at most `count` True in any row.
        count: Places of each row.

    Returns:
        Indices [..., count] int64, and valid [..., count] bool, which is False in the places that a row with fewer
        does not need; those hold indices that are not kept.
    """
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)
    indices = order[..., order.shape[-1] - count :]
    return indices, keep.gather(-1, indices)
