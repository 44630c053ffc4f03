"""Keys and values of one layer, with the prompt column of each: lengths may differ by layer, row and head.

Shapes: B batch, G KV heads, N entries, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexasl.errors import FlexASLError


class LayerCache:
    """What one layer remembers. All tensors are None until the first `append`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.keys: Tensor | None = None
        """[B, G, N, D]."""
        self.values: Tensor | None = None
        self.columns: Tensor | None = None
        """[B, N], or [B, G, N] where heads differ, int64: the column of the sequence that each entry came from."""
        self.valid: Tensor | None = None
        """Bool like `columns`, False at padding; None where there is none."""
        self.seen = 0
        """Columns of the sequence so far, dropped ones included."""
        self.uncroppable = 0
        """Columns that cannot be cropped, because entries that their queries would need again have been dropped."""

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None, seen: int) -> None:
        """Adds entries [B, G, M, D] at columns [B, M], of which valid [B, M] is False at padding, as `seen` more
        columns."""
        self.seen += seen
        if self.keys is None or self.values is None or self.columns is None:
            self.keys, self.values, self.columns, self.valid = _owned(keys), _owned(values), columns, valid
            return
        if self.columns.dim() == 3:
            columns = columns[:, None].expand(-1, self.columns.shape[1], -1)
            valid = None if valid is None else valid[:, None].expand_as(columns)
        if valid is not None or self.valid is not None:
            old = torch.ones_like(self.columns, dtype=torch.bool) if self.valid is None else self.valid
            new = torch.ones_like(columns, dtype=torch.bool) if valid is None else valid
            self.valid = torch.cat([old, new], -1)
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        self.columns = torch.cat([self.columns, columns], -1)

    def keep(self, slots: Tensor, valid: Tensor | None) -> None:
        """Keeps the entries at slots [B, G, K], of which valid [B, G, K] is False where a head has fewer; frees the
        rest."""
        assert self.keys is not None and self.values is not None and self.columns is not None
        index = slots[..., None]
        self.keys = self.keys.gather(2, index.expand(*slots.shape, self.keys.shape[-1]))
        self.values = self.values.gather(2, index.expand(*slots.shape, self.values.shape[-1]))
        columns = self.columns if self.columns.dim() == 3 else self.columns[:, None].expand(-1, slots.shape[1], -1)
        self.columns = columns.gather(2, slots)
        self.valid = valid

    def crop(self, count: int) -> None:
        """Forgets the last `count` columns of the sequence; what was pruned before them stays pruned."""
        if self.keys is None or self.values is None or self.columns is None or count == 0:
            return
        if max(0, self.seen - count) < self.uncroppable:
            raise FlexASLError(
                f"crop by {count} tokens would need entries that the sliding window has dropped; "
                f"crop at most {self.seen - self.uncroppable}"
            )
        self.seen = max(0, self.seen - count)
        left = self.columns < self.seen
        if self.valid is not None:
            left = left & self.valid
        used = left.flatten(0, -2).any(0).nonzero()
        length = 0 if len(used) == 0 else int(used[-1]) + 1
        self.keys, self.values = self.keys[:, :, :length].clone(), self.values[:, :, :length].clone()
        self.columns, left = self.columns[..., :length].clone(), left[..., :length]
        self.valid = None if bool(left.all()) else left.clone()

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the batch rows named, in that order; a row may be named more than once."""
        for name in ("keys", "values", "columns", "valid"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[rows.to(held.device)])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(held.numel() * held.element_size() for held in (self.keys, self.values) if held is not None)


def _owned(states: Tensor) -> Tensor:
    """The same values in storage that holds nothing else, so that no view keeps a larger tensor alive."""
    if states.untyped_storage().nbytes() == states.numel() * states.element_size():
        return states
    return states.clone(memory_format=torch.contiguous_format)
