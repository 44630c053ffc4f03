"""Which cache entries each KV head keeps, by count or by attention mass.

Shapes: B batch, G KV heads, N entries, P = N - W prefix entries, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexasl.ops.ranking import token_ranks
from flexasl.ops.selection import select_tokens


def top_k_entries(scores: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """Entries that each KV head keeps: the best of the prefix, and the window (SnapKV, arXiv 2404.14469). Ties go to
    the earlier token.

    Args:
        scores: [B, G, P] float32, pooled and summed over the head's queries.
        budget: [B] int, counts prefix entries.
        window: Last entries, which are always kept.
        valid: [B, P] bool, False at padding. None: there is none.

    Returns:
        [B, G, P + window] bool.
    """
    batch, groups, _ = scores.shape
    valid = None if valid is None else valid[:, None].expand_as(scores).flatten(0, 1)
    ranks = token_ranks(scores.flatten(0, 1), valid)
    return select_tokens(ranks, budget.repeat_interleave(groups), window).unflatten(0, (batch, groups))


def top_p_entries(share: Tensor, top_p: float, window: int, valid: Tensor | None = None) -> Tensor:
    """Entries that each KV head keeps by attention mass: the fewest that reach `top_p`, rounded down to a multiple of
    eight, with the first token and the window.

    Args:
        share: [B, G, N] float32, each entry's share of the head's attention, not pooled.
        top_p: Share of the attention, in (0, 1].
        window: Last entries, which are always kept.
        valid: [B, N] bool, False at padding. None: there is none.

    Returns:
        [B, G, N] bool.
    """
    batch, groups, tokens = share.shape
    # Padding comes after real entries without attention.
    share = share if valid is None else share.masked_fill(~valid[:, None], -1.0)
    ordered, order = share.sort(dim=-1, descending=True, stable=True)
    real = torch.full_like(order[..., :1], tokens) if valid is None else valid.sum(-1)[:, None, None]
    reached = torch.minimum((ordered.clamp(min=0).cumsum(-1) < top_p).sum(-1, keepdim=True) + 1, real)
    within = torch.arange(tokens, dtype=torch.int64, device=share.device) < reached // 8 * 8
    keep = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, within)
    keep[..., tokens - window :] = True
    if valid is None:
        keep[..., 0] = True
        return keep
    first = valid.int().argmax(-1)
    keep = keep.scatter(-1, first[:, None, None].expand(batch, groups, 1), True)
    return keep & valid[:, None]
