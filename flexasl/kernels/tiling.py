"""How many queries a kernel takes at once, and which keys these can see."""

from __future__ import annotations

import torch

from flexasl.attention_spec import AttentionSpec
from flexasl.masks import BLOCK


def at_once(queries: int, limit: int, pairs: int) -> int:
    """Queries to take at once, each with so many pairs, under a limit of pairs; a graph takes all, as comparing sizes
    would bind it to them."""
    return queries if queries == 1 or torch.compiler.is_compiling() else max(1, limit // pairs)


def tiles(spec: AttentionSpec, queries: int, keys: int, most: int, ahead: int = 0) -> list[tuple[slice, slice]]:
    """At most so many queries at a time, each with the keys that they can see by order, which some may see ahead of,
    and sliding window."""
    if torch.compiler.is_compiling() or queries == 1:
        return [(slice(0, queries), slice(0, keys))]
    reach = keys
    if spec.sliding_window is not None and queries == keys:
        # Keys are no further apart than their positions. Where cached keys come first they may be, after a crop.
        reach = spec.sliding_window - 1
        most = min(most, max(BLOCK, spec.sliding_window // 2))
    before, found = keys - queries, []
    for first in range(0, queries, most):
        last = min(first + most, queries)
        found.append((slice(first, last), slice(max(0, before + first - reach), min(keys, before + last + ahead))))
    return found
