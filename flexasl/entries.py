"""Tensors of cache entries: parts of them, wider ones, several in one.

Shapes: B batch, G KV heads, N entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


def widened(states: Tensor, width: int) -> Tensor:
    """[B, G, N, ...] → [B, G, width, ...], zero (False) on the left."""
    filler = states.new_zeros(*states.shape[:2], width - states.shape[2], *states.shape[3:])
    return torch.cat([filler, states], 2)


def stack_rows(parts: Sequence[Tensor], slack: int) -> Tensor:
    """[B, G, N, ...] each → [sum of B, G, largest N + slack, ...], zero (False) on the left of shorter ones."""
    width, one = max(part.shape[2] for part in parts), parts[0]
    made = one.new_empty(sum(map(len, parts)), one.shape[1], width + slack, *one.shape[3:])
    for part, rows in zip(parts, made.split([len(part) for part in parts]), strict=True):
        rows[:, :, : width - part.shape[2]] = 0
        rows[:, :, width - part.shape[2] : width] = part
    return made


def span(held: Tensor, dim: int, first: int, end: int) -> Tensor:
    """The entries from one to another, along dim; the tensor itself where these are all."""
    return held if end - first == held.shape[dim] else held.narrow(dim, first, end - first)


@overload
def by_head(marks: Tensor, heads: int) -> Tensor: ...
@overload
def by_head(marks: Tensor | None, heads: int) -> Tensor | None: ...
def by_head(marks: Tensor | None, heads: int) -> Tensor | None:
    """[B, N] → [B, G, N]."""
    return None if marks is None else marks[:, None].repeat(1, heads, 1)


def grown(held: Tensor, dim: int, capacity: int) -> Tensor:
    """The same entries at the beginning of storage for `capacity`."""
    shape = list(held.shape)
    shape[dim] = capacity
    larger = held.new_empty(shape)
    larger.narrow(dim, 0, held.shape[dim]).copy_(held)
    return larger


def owned(states: Tensor) -> Tensor:
    """The same values in storage that holds nothing else, so that no view keeps a larger tensor alive."""
    if (
        not torch.compiler.is_compiling()
        and states.untyped_storage().nbytes() == states.numel() * states.element_size()
    ):
        return states
    return states.clone(memory_format=torch.contiguous_format)
