"""Who may attend to whom, from positions and validity.

Shapes: B batch, G KV heads, M queries, N keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(
    query_columns: Tensor, key_columns: Tensor, key_valid: Tensor | None, sliding_window: int | None
) -> Tensor:
    """Which keys each query sees: those at its own position or before, inside the sliding window, and valid.

    query_columns [B, M] int; key_columns and key_valid [B, N], or [B, G, N] where heads differ. The M queries are the
    last M keys, and each sees itself even if invalid, so that no row of the softmax is empty. → bool [B, 1 or G, M, N].
    """
    query = query_columns[:, None, :, None]
    key = key_columns[:, None] if key_columns.dim() == 2 else key_columns
    allowed = key[:, :, None, :] <= query
    if sliding_window is not None:
        allowed = allowed & (key[:, :, None, :] > query - sliding_window)
    if key_valid is None:
        return allowed
    valid = key_valid[:, None] if key_valid.dim() == 2 else key_valid
    allowed = allowed & valid[:, :, None, :]
    count = query_columns.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=allowed.device)
    allowed[..., allowed.shape[-1] - count :] |= itself
    return allowed
