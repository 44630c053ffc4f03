"""From ranks to the tokens that stay, and moving them together.

Shapes: B batch, G KV heads, N slots, P = N - W prefix slots, W window, K kept slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("flexasl::select_tokens", mutates_args=())
def select_tokens(ranks: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """Tokens that stay: those ranked within the budget, and the window.

    ranks [B, P] int32; budget [B] int counts prefix tokens; valid [B, P + window] bool is False at padding, which never
    stays. → keep [B, P + window] bool.
    """
    best = ranks <= budget[:, None]
    keep = torch.cat([best, best.new_ones(best.shape[0], window)], 1)
    return keep if valid is None else keep & valid


@select_tokens.register_fake
def _(ranks: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    return ranks.new_empty(ranks.shape[0], ranks.shape[1] + window, dtype=torch.bool)


@torch.library.custom_op("flexasl::gather_tokens", mutates_args=())
def gather_tokens(states: Tensor, slots: Tensor) -> Tensor:
    """The named slots of each row, in memory of their own: states [B or 1, N, ...], slots [B, K] int64 → [B, K, ...].

    Rows are copied whole, near the speed of memory.
    """
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    return states[rows if states.shape[0] > 1 else 0, slots]


@gather_tokens.register_fake
def _(states: Tensor, slots: Tensor) -> Tensor:
    return states.new_empty(*slots.shape, *states.shape[2:])


@torch.library.custom_op("flexasl::compact_kv", mutates_args=())
def compact_kv(keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The named entries of each row and KV head, in memory of their own: keys [B or 1, G, N, D], values
    [B or 1, G, N, E], slots [B, G, K] int64 → [B, G, K, D], [B, G, K, E]."""
    rows = torch.arange(keys.shape[0], device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[:, None]
    return keys[rows, heads, slots], values[rows, heads, slots]


@compact_kv.register_fake
def _(keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return keys.new_empty(*slots.shape, keys.shape[-1]), values.new_empty(*slots.shape, values.shape[-1])


def kept_slots(keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots that stay, ascending, at the right end of `count` columns.

    keep [..., N] bool with at most `count` True in any row → slots [..., count] int64 and valid [..., count] bool,
    which is False in the columns that a row with fewer does not need; those hold slots that do not stay.
    """
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)
    slots = order[..., order.shape[-1] - count :]
    return slots, keep.gather(-1, slots)
