"""Which entries of a layer the cache keeps, by a retention.

Shapes: B rows, G KV heads, M tokens of the longest row, P = M - W scored tokens, W window, K kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexasl.ops import kept_indices
from flexasl.policies.base import Policy
from flexasl.policies.contract import entries_of
from flexasl.retention import Retention
from flexasl.rows import Rows

Entries = tuple[Tensor, Tensor | None]
"""Cache entries that a layer keeps: tokens [B, G, K] int64, ascending in each row; valid [B, G, K] bool, None for
all."""


def wanted_entries(
    retention: Retention,
    policy: Policy,
    seen: Tensor | None,
    limits: Tensor,
    window: int,
    rows: Rows,
    groups: int,
    always: Tensor | None,
) -> Tensor:
    """Which of the rows' tokens are kept, bool [B, G, M], by scores [B, G, P] or shares of attention [B, G, M], and
    each row's limit [B] int64. always [B, M] bool are entries that are kept whatever they score."""
    if always is not None and seen is not None and retention.goes_by == "scores":
        seen = seen.masked_fill(always[:, None, : seen.shape[2]], math.inf)
    keep = entries_of(policy, retention, seen, limits, window, rows, groups)
    if always is not None and not retention.exact:
        keep = keep | always[:, None]
    return keep


def counts_of(keep: Tensor) -> Tensor:
    """The highest and the lowest number of entries that a head of a row keeps: [2] int64."""
    count = keep.sum(-1)
    return torch.stack([count.max(), count.min()])


def kept_entries(keep: Tensor, counts: Sequence[int], rows: Rows) -> Entries:
    """Where the entries are that are kept, by `counts_of` them."""
    highest, lowest = counts
    indices, valid = kept_indices(keep, highest)
    tokens = rows.as_batch()[0][:, None].expand(-1, keep.shape[1], -1).gather(2, indices)
    return tokens, None if lowest == highest else valid
