"""Keys and values of one layer, with the prompt column of each: lengths may differ by layer, row and head.

Shapes: B batch, G KV heads, N entries, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, overload

import torch
from torch import Tensor

from flexasl.errors import FlexASLError
from flexasl.ops import compact_kv, kept_slots
from flexasl.quantizing import dequantize, name_of, primitives, quantize


class LayerCache:
    """What one layer remembers. All tensors are None until the first `append`.

    With `slack`, storage is made for so many entries more than needed whenever it must grow, so that decode copies
    nothing but the new entry; without, it holds the entries and no more. kv_dtype `"int8"` or `"fp8"`: keys and values
    are stored in eight bits, with scales; None: as they come.
    """

    def __init__(self, slack: int = 0, kv_dtype: str | None = None) -> None:
        self.slack = slack
        self.begin(kv_dtype)

    def begin(self, kv_dtype: str | None) -> None:
        """Forgets everything, and stores what comes by this `kv_dtype`; raises `UnsupportedError` where it cannot."""
        if kv_dtype is not None:
            primitives(kv_dtype)
        self.kv_dtype = kv_dtype
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._length = 0
        self._states: tuple[Tensor, ...] = ()
        self._columns: Tensor | None = None
        self._valid: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self.seen = 0
        """Columns of the sequence so far, dropped ones included."""
        self.uncroppable = 0
        """Columns that cannot be cropped, because entries that their queries would need again have been dropped."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Keys and values as they are in memory, [B, G, N, D]; with a `kv_dtype` their scales after them, [B, G, N, 1].
        Empty before the first `append`."""
        return tuple(_front(states, 2, self._length) for states in self._states)

    @property
    def keys(self) -> Tensor | None:
        """[B, G, N, D] in the model's dtype; made anew each time where there is a `kv_dtype`."""
        return self._read(0)

    @property
    def values(self) -> Tensor | None:
        """[B, G, N, D], likewise."""
        return self._read(1)

    @property
    def columns(self) -> Tensor | None:
        """[B, N], or [B, G, N] where heads differ, int64: the column of the sequence that each entry came from."""
        return None if self._columns is None else _front(self._columns, -1, self._length)

    @property
    def valid(self) -> Tensor | None:
        """Bool like `columns`, False at padding; None where there is none."""
        return None if self._valid is None else _front(self._valid, -1, self._length)

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None, seen: int) -> None:
        """Adds entries [B, G, M, D] at columns [B, M], of which valid [B, M] is False at padding, as `seen` more
        columns. Columns and valid may also differ by head: [B, G, M]."""
        states = self._encoded(keys, values)
        if self._states:
            self._make_room(columns, valid, seen)
            self._write(states)
            return
        self.seen += seen
        self._dtype = keys.dtype
        self._hold(tuple(map(_owned, states)), columns, valid)

    def extend(self, columns: Tensor, valid: Tensor | None, seen: int) -> tuple[Tensor, Tensor]:
        """As `append`, but leaves the new entries' keys and values to the caller, who writes them at the end of the
        tensors returned [B, G, N + M, D], and then calls `settle` with these."""
        self._make_room(columns, valid, seen)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return keys, values

    def settle(self, keys: Tensor, values: Tensor, count: int) -> None:
        """Stores the last `count` entries of what `extend` gave, which are in place already without a `kv_dtype`."""
        if self.kv_dtype is not None:
            self._write(self._encoded(keys[:, :, -count:], values[:, :, -count:]))

    def restore(
        self,
        stored: Sequence[Tensor],
        columns: Tensor,
        valid: Tensor | None,
        *,
        dtype: torch.dtype,
        seen: int,
        uncroppable: int,
    ) -> None:
        """Remembers these entries, shapes as the properties', without copying them; dtype is the model's. They may be
        mapped from a file: new entries find no room and go into larger storage, so nothing is written into tensors that
        are given here."""
        self.begin(name_of(stored[0].dtype))
        self._hold(tuple(stored), columns, valid)
        self._dtype, self.seen, self.uncroppable = dtype, seen, uncroppable

    @classmethod
    def stacked(cls, caches: Sequence[LayerCache], slack: int = 0) -> Self:
        """The rows of several caches of one layer [B, G, N, D], each with its own N, behind one another: shorter ones
        are padded on the left. They must have read equally many columns. Entries are copied, once, into storage that
        has the slack already, in the model's dtype whatever they were stored in."""
        assert len({cache.seen for cache in caches}) == 1
        held = [(cache.keys, cache.values) for cache in caches if cache.keys is not None and cache.values is not None]
        marks = [_marks(cache, keys.shape[1]) for cache, (keys, _) in zip(caches, held, strict=True)]
        keys, values, columns, valid = (
            _stacked(parts, slack) for parts in (*zip(*held, strict=True), *zip(*marks, strict=True))
        )
        if all(cache.columns is not None and cache.columns.dim() == 2 for cache in caches):
            columns, valid = columns[:, 0].contiguous(), valid[:, 0].contiguous()
        made, length = cls(slack), keys.shape[2] - slack
        made._hold((keys, values), columns, None if bool(valid[..., :length].all()) else valid)
        made._length, made._dtype = length, keys.dtype
        made.seen, made.uncroppable = caches[0].seen, max(cache.uncroppable for cache in caches)
        return made

    def keep(self, slots: Tensor, valid: Tensor | None) -> None:
        """Keeps the entries at slots [B, G, K], of which valid [B, G, K] is False where a head has fewer; frees the
        rest."""
        assert self.columns is not None
        stored = self.stored
        pairs = (compact_kv(*pair, slots) for pair in zip(stored[::2], stored[1::2]))
        columns = self.columns if self.columns.dim() == 3 else self.columns[:, None].expand(-1, slots.shape[1], -1)
        self._hold(tuple(states for pair in pairs for states in pair), columns.gather(2, slots), valid)

    def retain(self, wanted: Tensor) -> None:
        """Keeps the valid entries that are wanted, bool like `columns`; moves two numbers to the host."""
        if self.valid is not None:
            wanted = wanted & self.valid
        if wanted.dim() == 2:
            wanted = wanted[:, None].expand(-1, self._states[0].shape[1], -1)
        counts = wanted.sum(-1)
        most, least = torch.stack([counts.max(), counts.min()]).tolist()
        slots, valid = kept_slots(wanted, most)
        self.keep(slots, None if most == least else valid)

    def crop(self, count: int) -> None:
        """Forgets the last `count` columns of the sequence; what was pruned before them stays pruned."""
        if self.columns is None or count == 0:
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
        states = tuple(states[:, :, :length].clone() for states in self.stored)
        columns, left = self.columns[..., :length].clone(), left[..., :length]
        self._hold(states, columns, None if bool(left.all()) else left.clone())

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the batch rows named, in that order; a row may be named more than once."""
        if self.columns is None:
            return
        rows = rows.to(self.columns.device)
        valid = None if self.valid is None else self.valid[rows]
        self._hold(tuple(states[rows] for states in self.stored), self.columns[rows], valid)

    def replace_rows(self, rows: Sequence[int], other: LayerCache) -> None:
        """Takes what `other` [len(rows), G, K, D] holds in place of these rows' entries; frees what no row needs."""
        assert self._states and self.kv_dtype == other.kv_dtype
        batch, heads = self._states[0].shape[:2]
        mine, new = ((*cache.stored, *_marks(cache, heads)) for cache in (self, other))
        at = torch.tensor(rows, device=mine[0].device)
        if len(rows) == batch:
            order = at.argsort()
            held = [states[order] for states in new]
        else:
            width = max(mine[0].shape[2], new[0].shape[2])
            held = [_widened(states, width) for states in mine]
            for states, others in zip(held, new):
                states[at] = _widened(others, width)
        self._hold(tuple(held[:-2]), *held[-2:])
        assert self.columns is not None
        self.retain(torch.ones_like(self.columns, dtype=torch.bool))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with their scales and without the slack."""
        return sum(states.nbytes for states in self.stored)

    @property
    def nbytes_unquantized(self) -> int:
        """Bytes that as many entries would take in the model's dtype."""
        return sum(states.numel() * self._dtype.itemsize for states in self.stored[:2] if self._dtype is not None)

    def _read(self, part: int) -> Tensor | None:
        if not self._states:
            return None
        stored = self.stored
        if self.kv_dtype is None:
            return stored[part]
        assert self._dtype is not None
        return dequantize(stored[part], stored[part + 2], self._dtype)

    def _encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """As `stored` would have them."""
        if self.kv_dtype is None:
            return keys, values
        if keys.shape[-1] == values.shape[-1]:  # one call in place of two: for a new token, calls are all the time
            numbers, scales = quantize(torch.cat([keys, values], 1), self.kv_dtype)
            return (*numbers.chunk(2, 1), *scales.chunk(2, 1))
        (keys, key_scales), (values, value_scales) = (quantize(states, self.kv_dtype) for states in (keys, values))
        return keys, values, key_scales, value_scales

    def _make_room(self, columns: Tensor, valid: Tensor | None, seen: int) -> None:
        """All of `extend` but the keys and values."""
        assert self._columns is not None
        count = columns.shape[-1]
        self.seen += seen
        heads = self._states[0].shape[1]
        if columns.dim() == 3 and self._columns.dim() == 2:
            self._columns, self._valid = _by_head(self._columns, heads), _by_head(self._valid, heads)
        elif columns.dim() == 2 and self._columns.dim() == 3:
            columns, valid = _by_head(columns, heads), _by_head(valid, heads)
        if valid is not None and self._valid is None:
            self._valid = torch.ones_like(self._columns, dtype=torch.bool)
        length = self._length + count
        if length > self._states[0].shape[2]:
            most = length + self.slack
            self._states = tuple(_grown(states, 2, self._length, most) for states in self._states)
            self._columns = _grown(self._columns, -1, self._length, most)
            self._valid = None if self._valid is None else _grown(self._valid, -1, self._length, most)
        self._columns[..., self._length : length] = columns
        if self._valid is not None:
            self._valid[..., self._length : length] = True if valid is None else valid
        self._length = length

    def _write(self, states: tuple[Tensor, ...]) -> None:
        """Puts these [B, G, M, D or 1] where room was made."""
        for held, new in zip(self._states, states, strict=True):
            held[:, :, self._length - new.shape[2] : self._length] = new

    def _hold(self, states: tuple[Tensor, ...], columns: Tensor, valid: Tensor | None) -> None:
        self._states, self._columns, self._valid = states, columns, valid
        self._length = states[0].shape[2]


def _marks(cache: LayerCache, heads: int) -> tuple[Tensor, Tensor]:
    """Columns and validity of a cache's entries by head: [B, G, N]."""
    assert cache.columns is not None
    columns = cache.columns if cache.columns.dim() == 3 else _by_head(cache.columns, heads)
    if cache.valid is None:
        return columns, torch.ones_like(columns, dtype=torch.bool)
    return columns, cache.valid if cache.valid.dim() == 3 else _by_head(cache.valid, heads)


def _widened(states: Tensor, width: int) -> Tensor:
    """[B, G, N, ...] → [B, G, width, ...], zero (False) on the left."""
    filler = states.new_zeros(*states.shape[:2], width - states.shape[2], *states.shape[3:])
    return torch.cat([filler, states], 2)


def _stacked(parts: Sequence[Tensor], slack: int) -> Tensor:
    """[B, G, N, ...] each → [sum of B, G, largest N + slack, ...], zero (False) on the left of shorter ones."""
    width, one = max(part.shape[2] for part in parts), parts[0]
    made = one.new_empty(sum(map(len, parts)), one.shape[1], width + slack, *one.shape[3:])
    for part, rows in zip(parts, made.split([len(part) for part in parts]), strict=True):
        rows[:, :, : width - part.shape[2]] = 0
        rows[:, :, width - part.shape[2] : width] = part
    return made


def _front(held: Tensor, dim: int, length: int) -> Tensor:
    return held if held.shape[dim] == length else held.narrow(dim, 0, length)


@overload
def _by_head(marks: Tensor, heads: int) -> Tensor: ...
@overload
def _by_head(marks: Tensor | None, heads: int) -> Tensor | None: ...
def _by_head(marks: Tensor | None, heads: int) -> Tensor | None:
    """[B, N] → [B, G, N]."""
    return None if marks is None else marks[:, None].repeat(1, heads, 1)


def _grown(held: Tensor, dim: int, length: int, capacity: int) -> Tensor:
    """The first `length` entries in storage for `capacity`."""
    shape = list(held.shape)
    shape[dim] = capacity
    larger = held.new_empty(shape)
    larger.narrow(dim, 0, length).copy_(held.narrow(dim, 0, length))
    return larger


def _owned(states: Tensor) -> Tensor:
    """The same values in storage that holds nothing else, so that no view keeps a larger tensor alive."""
    if (
        not torch.compiler.is_compiling()
        and states.untyped_storage().nbytes() == states.numel() * states.element_size()
    ):
        return states
    return states.clone(memory_format=torch.contiguous_format)
