"""From ranks to the tokens that stay, and moving them together.

Shapes: B batch, N slots, P = N - W prefix slots, W window, K kept slots.
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


def kept_slots(keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots that stay, ascending, at the right end of `count` columns.

    keep [..., N] bool with at most `count` True in any row → slots [..., count] int64 and valid [..., count] bool,
    which is False in the columns that a row with fewer does not need; those hold slots that do not stay.
    """
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)
    slots = order[..., order.shape[-1] - count :]
    return slots, keep.gather(-1, slots)


def gather_slots(states: Tensor, slots: Tensor) -> Tensor:
    """The named slots of each row in memory of their own: states [B, N, ...], slots [B, K] → [B, K, ...]."""
    if states.shape[0] != slots.shape[0]:
        states = states.expand(slots.shape[0], *states.shape[1:])
    index = slots.view(*slots.shape, *[1] * (states.dim() - 2)).expand(*slots.shape, *states.shape[2:])
    return states.gather(1, index)
