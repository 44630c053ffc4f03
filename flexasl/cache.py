"""Keys and values of one layer, with the prompt position of each: lengths may differ by layer, row and head.

Shapes: B batch, G KV heads, N entries, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from flexasl.checks import renamed
from flexasl.entries import by_head, grown, owned, span, stack_rows, widened
from flexasl.errors import FlexASLError
from flexasl.gradients import refuse_gradients
from flexasl.numbers import on_device, read_together
from flexasl.ops import compact_kv, kept_indices
from flexasl.quantizing import dequantize, name_of, primitives, quantize_both

SPARE = 64
"""Tokens that can be cropped once new ones have made a sliding window drop entries; half the window where that is
less."""
POSITIONS = 64
"""Positions that are written down at a time."""


class _Coming(NamedTuple):
    """Entries that there is room for, behind those that are held."""

    entries: int = 0
    seen: int = 0
    aligned: bool = True
    """Whether they are those of the next positions in all rows and heads."""


NO_GRADIENTS = "no gradients flow through a cache in eight bits; patch the model with kv_dtype=None"


class LayerCache:
    """Keys and values of one layer, with the position of each. All tensors are None until the first `append`.

    Copies and pickles have the values alone, without an autograd graph.

    Args:
        slack: Entries that storage is made larger by whenever it must grow, so that decode copies only the new entry.
        kv_dtype: `"int8"` or `"fp8"`: keys and values are stored in eight bits, with scales. None: as they come.
    """

    def __init__(self, slack: int = 0, kv_dtype: str | None = None) -> None:
        self.slack = slack
        self.record_past = False
        """Whether a sliding window drops nothing that a crop of all positions since the last crop would need."""
        self.begin(kv_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_states": tuple(states.detach() for states in self._states)}

    def fresh(self) -> LayerCache:
        """An empty one with the same slack."""
        return LayerCache(self.slack)

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
        self._positions: Tensor | None = None
        self._valid: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._coming = _Coming()
        self._aligned = 0  # of the last entries, how many are known to stand at the last positions; see `is_aligned`
        self._padded = False  # whether padding may be among those
        self._recorded = 0
        self._had_gradients = False
        self.unfinished = False
        """Whether the last pass has stored entries, here or in deeper layers, and did not come to its end."""
        self.seen = 0
        """Positions of the sequence so far, dropped ones included."""
        self.uncroppable = 0
        """Positions that cannot be cropped, because entries that their queries would need again have been dropped."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Keys and values as they are in memory, [B, G, N, D]; with a `kv_dtype` their scales after them, [B, G, N, 1].
        Empty before the first `append`."""
        return tuple(span(states, 2, 0, self._length) for states in self._states)

    @property
    def keys(self) -> Tensor | None:
        """[B, G, N, D] in the model's dtype; made anew each time where there is a `kv_dtype`."""
        return self._read(0, 0, self._length) if self._states else None

    @property
    def values(self) -> Tensor | None:
        """[B, G, N, D], likewise."""
        return self._read(1, 0, self._length) if self._states else None

    @property
    def rows(self) -> int | None:
        """B; None before the first `append`."""
        return None if self._positions is None else self._positions.shape[0]

    @property
    def positions(self) -> Tensor | None:
        """[B, N], or [B, G, N] where heads differ, int64: each entry's position in the padded sequence."""
        return None if self._positions is None else span(self._positions, -1, 0, self._length)

    @property
    def columns(self) -> Tensor | None:
        """Deprecated name of `positions`."""
        renamed("LayerCache.columns", "LayerCache.positions")
        return self.positions

    @property
    def valid(self) -> Tensor | None:
        """Bool like `positions`, False at padding; None where there is none."""
        return None if self._valid is None else span(self._valid, -1, 0, self._length)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        seen: int,
        *,
        aligned: bool = False,
    ) -> None:
        """Adds entries [B, G, M, D] at positions [B, M], of which valid [B, M] is False at padding, as `seen` more
        positions. Positions and valid may also differ by head: [B, G, M]. aligned: the entries that are valid stand at
        the last M of these positions, in order."""
        aligned = aligned or (valid is None and positions.shape[-1] == seen)
        self._padded |= aligned and valid is not None
        states = self._encoded(keys, values)
        if self._states:
            self._make_room(positions, valid, seen, aligned=aligned)
            self._write(states)
            self._count()
            return
        self.seen += seen
        self._dtype = keys.dtype
        self._hold(tuple(map(owned, states)), positions, valid, positions.shape[-1] if aligned else 0)

    def extend(
        self,
        positions: Tensor,
        valid: Tensor | None,
        seen: int,
        sliding_window: int | None = None,
        *,
        whole: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `append`, but leaves the new entries' keys and values to the caller, who writes them at the end of the
        tensors returned [B, G, N + M, D], and then calls `commit` with these; until then the cache is as it was.

        With a sliding_window N is at most the `sliding_window - 1` entries that the first new token may see, or all
        that are held where `whole`. Where storage must grow, older ones are dropped, but for those that a crop by
        `SPARE` tokens needs.
        """
        self._make_room(positions, valid, seen, sliding_window)
        self._padded |= valid is not None
        first = 0 if sliding_window is None or whole else max(0, self._length - sliding_window + 1)
        end = self._length + self._coming.entries
        return self._read(0, first, end), self._read(1, first, end)

    def commit(self, keys: Tensor, values: Tensor, count: int) -> None:
        """Stores the last `count` entries of what `extend` gave, which are in place already without a `kv_dtype`."""
        if self.kv_dtype is not None:
            self._write(self._encoded(keys[:, :, -count:], values[:, :, -count:]))
        self._count()

    def marks(self, count: int) -> tuple[Tensor, Tensor | None]:
        """`positions` and `valid` of the last `count` entries, those that `extend` made room for among them."""
        assert self._positions is not None
        end = self._length + self._coming.entries
        valid = None if self._valid is None else span(self._valid, -1, end - count, end)
        return span(self._positions, -1, end - count, end), valid

    def is_aligned(self, count: int) -> bool:
        """Whether the last `count` entries, counted as by `marks`, are known to stand at the last `count` positions, in
        order, in all rows and heads, but for padding, which is not valid."""
        return count <= (self._aligned + self._coming.entries if self._coming.aligned else 0)

    @property
    def is_padded(self) -> bool:
        """Whether there may be padding among those."""
        return self._padded

    @property
    def tight(self) -> tuple[Tensor, ...] | None:
        """Keys and values [B, G, N, D] where all are of real tokens, as they came and without slack, so that `take`
        may follow; None otherwise."""
        if self.slack or self.kv_dtype is not None or self._valid is not None:
            return None
        return self._states if self._states and self._states[0].shape[2] == self._length else None

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Holds these keys and values [B, G, N + 1, D] in place of its own: those that `tight` gave, and those of the
        next position. Copies nothing, and writes positions down for many tokens at a time."""
        assert self._positions is not None
        self._states = (keys, values)
        if self._length == self._positions.shape[-1]:
            coming = torch.arange(self.seen, self.seen + POSITIONS, dtype=torch.int64, device=self._positions.device)
            self._positions = torch.cat([self._positions, coming.expand(*self._positions.shape[:-1], -1)], -1)
        self._length, self._aligned, self.seen = self._length + 1, self._aligned + 1, self.seen + 1

    def restore(
        self,
        stored: Sequence[Tensor],
        positions: Tensor,
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
        count = positions.shape[-1]
        whole = valid is None and bool((positions[..., :1] == seen - count).all())
        self._hold(tuple(stored), positions, valid, count if whole else 0)
        self._dtype, self.seen, self.uncroppable = dtype, seen, uncroppable

    @classmethod
    def stacked(cls, caches: Sequence[LayerCache], slack: int = 0) -> Self:
        """The rows of several caches of one layer [B, G, N, D], each with its own N, behind one another: shorter ones
        are padded on the left. They must have read equally many positions. Entries are copied, once, into storage that
        has the slack already, in the model's dtype whatever they were stored in."""
        assert len({cache.seen for cache in caches}) == 1
        held = [(cache.keys, cache.values) for cache in caches if cache.keys is not None and cache.values is not None]
        marks = [_marks(cache, keys.shape[1]) for cache, (keys, _) in zip(caches, held, strict=True)]
        keys, values, positions, valid = (
            stack_rows(parts, slack) for parts in (*zip(*held, strict=True), *zip(*marks, strict=True))
        )
        if all(cache.positions is not None and cache.positions.dim() == 2 for cache in caches):
            positions, valid = positions[:, 0].contiguous(), valid[:, 0].contiguous()
        made, length = cls(slack), keys.shape[2] - slack
        aligned = min(cache._aligned for cache in caches)
        made._hold((keys, values), positions, None if bool(valid[..., :length].all()) else valid, aligned)
        made._length, made._dtype = length, keys.dtype
        made._padded = any(cache._padded for cache in caches)
        made.seen, made.uncroppable = caches[0].seen, max(cache.uncroppable for cache in caches)
        return made

    def keep(self, indices: Tensor, valid: Tensor | None) -> None:
        """Keeps the entries at indices [B, G, K], of which valid [B, G, K] is False where a head has fewer; frees the
        rest. Indices and valid may also be [B, K], for all heads, where positions are."""
        assert self.positions is not None
        stored, heads = self.stored, self._states[0].shape[1]
        every = indices if indices.dim() == 3 else indices[:, None].expand(-1, heads, -1)
        pairs = (compact_kv(*pair, every) for pair in zip(stored[::2], stored[1::2]))
        positions = self.positions if indices.dim() == self.positions.dim() else by_head(self.positions, heads)
        self._hold(tuple(states for pair in pairs for states in pair), positions.gather(-1, indices), valid)

    def retain(self, wanted: Tensor) -> None:
        """Keeps the valid entries that are wanted, bool like `positions`; moves two numbers to the host."""
        self._retain(wanted, None)

    def _retain(self, wanted: Tensor, later: Retained | None) -> None:
        if later is None:
            retain_all([(self, wanted)])
        else:
            later.append((self, wanted))

    def forget(self, sliding_window: int, spare: int = 0, later: Retained | None = None) -> None:
        """Drops the entries that no later token can see through the sliding window, even after a crop by `spare`
        tokens, or of what is recorded. later, where given, takes down what the host would have to read numbers for, for
        `retain_all`."""
        count = self._needed(sliding_window, spare)
        if self._positions is None or self.seen <= count:
            return
        self._bar(count, sliding_window)
        if self._aligned >= min(count, self._length):
            self._cut(max(0, self._length - count), self._length, min(count, self._aligned))
        else:
            assert self.positions is not None
            self._retain(self.positions >= self.seen - count, later)

    def activate_past_recording(self) -> None:
        """From now on all positions since the last crop, or since now, can be cropped."""
        self.record_past, self._recorded = True, self.seen

    def crop(self, count: int) -> None:
        """Forgets the last `count` positions of the sequence; what was pruned before them stays pruned. Raises
        `FlexASLError` where entries that the sequence would need again have been dropped."""
        seen = max(0, self.seen - count)
        if self._positions is not None and 0 < seen < self.uncroppable and count > 0:
            raise FlexASLError(
                f"crop by {count} tokens would need entries that the sliding window has dropped; crop at most "
                f"{self.seen - self.uncroppable}, or call activate_past_recording() on the cache before they are read"
            )
        self.seen = self._recorded = seen
        self.uncroppable = min(self.uncroppable, seen)
        if self.positions is None or count == 0:
            return
        if self._aligned >= count:
            self._cut(0, self._length - count, self._aligned - count)
        else:
            self.retain(self.positions < seen)
        if self._valid is not None and self._positions is not None:
            # Padding may have the positions of tokens that are gone.
            self._positions = self._positions.clamp(max=max(0, seen - 1))

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the batch rows named, in that order; a row may be named more than once."""
        if self.positions is None:
            return
        rows = rows.to(self.positions.device)
        valid = None if self.valid is None else self.valid[rows]
        self._hold(tuple(states[rows] for states in self.stored), self.positions[rows], valid, self._aligned)

    def replace_rows(self, rows: Sequence[int], other: LayerCache, later: Retained | None = None) -> None:
        """Takes what `other` [len(rows), G, K, D] holds in place of these rows' entries; frees what no row needs, or
        takes it down in `later`, as `forget`."""
        assert self._states and self.kv_dtype == other.kv_dtype
        batch, heads = self._states[0].shape[:2]
        mine, new = ((*cache.stored, *_marks(cache, heads)) for cache in (self, other))
        at = on_device(rows, mine[0].device)
        if len(rows) == batch:
            order = at.argsort()
            held = [states[order] for states in new]
        else:
            width = max(mine[0].shape[2], new[0].shape[2])
            held = [widened(states, width) for states in mine]
            for states, others in zip(held, new):
                states[at] = widened(others, width)
        self._hold(tuple(held[:-2]), held[-2], held[-1])
        assert self.positions is not None
        self._retain(torch.ones_like(self.positions, dtype=torch.bool), later)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with their scales and without the slack."""
        return sum(states.nbytes for states in self.stored)

    @property
    def state_bytes(self) -> int:
        """Bytes of states that the layer keeps beside keys and values."""
        return 0

    @property
    def nbytes_unquantized(self) -> int:
        """Bytes that as many entries would take in the model's dtype."""
        return sum(states.numel() * self._dtype.itemsize for states in self.stored[:2] if self._dtype is not None)

    def _read(self, part: int, first: int, end: int) -> Tensor:
        """Keys (0) or values (1) from one entry to another."""
        stored = [span(states, 2, first, end) for states in self._states[part::2]]
        if self.kv_dtype is None:
            return stored[0]
        assert self._dtype is not None
        made = dequantize(stored[0], stored[1], self._dtype)
        return refuse_gradients(made, NO_GRADIENTS) if self._had_gradients and torch.is_grad_enabled() else made

    def _encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """As `stored` would have them."""
        if self.kv_dtype is None:
            return keys, values
        self._had_gradients |= torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        return quantize_both(keys, values, self.kv_dtype)

    def _make_room(
        self,
        positions: Tensor,
        valid: Tensor | None,
        seen: int,
        sliding_window: int | None = None,
        *,
        aligned: bool = True,
    ) -> None:
        """All of `extend` but the keys and values."""
        assert self._positions is not None
        heads = self._states[0].shape[1]
        if positions.dim() == 3 and self._positions.dim() == 2:
            self._positions, self._valid = by_head(self._positions, heads), by_head(self._valid, heads)
        elif positions.dim() == 2 and self._positions.dim() == 3:
            positions, valid = by_head(positions, heads), by_head(valid, heads)
        if valid is not None and self._valid is None:
            self._valid = torch.ones_like(self._positions, dtype=torch.bool)
        count = positions.shape[-1]
        # What was made under inference mode cannot be written into outside of it; with gradients, earlier steps need
        # the storage as it was.
        full = self._length + count > self._states[0].shape[2]
        locked = self._states[0].is_inference() and not torch.is_inference_mode_enabled()
        if full or locked or self._states[0].requires_grad:
            self._grow(count, sliding_window)
        room = slice(self._length, self._length + count)
        self._positions[..., room] = positions
        if self._valid is not None:
            self._valid[..., room] = True if valid is None else valid
        self._coming = _Coming(count, seen, aligned)

    def _grow(self, count: int, sliding_window: int | None) -> None:
        """Moves into storage for `count` more entries and the slack, without what a sliding window can do without."""
        kept, slack = self._length, self.slack
        if sliding_window is not None:
            spare = min(SPARE, sliding_window // 2)
            needed = self._needed(sliding_window, spare)
            if needed < kept:
                kept = needed
                self._bar(needed, sliding_window)
            slack = min(slack, spare)
        moved = slice(self._length - kept, self._length)
        most = kept + count + slack
        self._states = tuple(grown(states[:, :, moved], 2, most) for states in self._states)
        assert self._positions is not None
        self._positions = grown(self._positions[..., moved], -1, most)
        self._valid = None if self._valid is None else grown(self._valid[..., moved], -1, most)
        self._length, self._aligned = kept, min(self._aligned, kept)

    def _needed(self, sliding_window: int, spare: int) -> int:
        """Last positions that a sliding window must not drop. Their entries are among as many last ones: of the entries
        behind an entry, each is of another position."""
        recorded = self.seen - self._recorded if self.record_past else 0
        return sliding_window - 1 + max(spare, recorded)

    def _bar(self, needed: int, sliding_window: int) -> None:
        """Notes that entries before the last `needed` positions are gone."""
        self.uncroppable = max(self.uncroppable, self.seen - needed + sliding_window - 1)

    def _count(self) -> None:
        """The entries that there was room for are held now."""
        count, seen, aligned = self._coming
        # Where the positions that only padding has were left out, there is a gap to the entries before.
        before = self._aligned if count == seen else 0
        self._aligned = before + count if aligned else 0
        self._length, self.seen, self._coming = self._length + count, self.seen + seen, _Coming()

    def _cut(self, first: int, end: int, aligned: int) -> None:
        """Keeps the entries from one to another, and frees the rest."""
        assert self._positions is not None
        if (first, end) == (0, self._length):
            return
        states = tuple(states[:, :, first:end].clone() for states in self._states)
        valid = None if self._valid is None else self._valid[..., first:end].clone()
        self._hold(states, self._positions[..., first:end].clone(), valid, aligned)

    def _write(self, states: tuple[Tensor, ...]) -> None:
        """Puts these [B, G, M, D or 1] where room was made."""
        for held, new in zip(self._states, states, strict=True):
            held[:, :, self._length : self._length + self._coming.entries] = new

    def _hold(self, states: tuple[Tensor, ...], positions: Tensor, valid: Tensor | None, aligned: int = 0) -> None:
        self._states, self._positions, self._valid = states, positions, valid
        self._length, self._aligned, self._coming = states[0].shape[2], aligned, _Coming()


Retained = list[tuple[LayerCache, Tensor]]
"""Caches, and which of its entries each is to keep, bool like its `positions`."""


def retain_all(wanted: Retained) -> None:
    """`LayerCache.retain` of several caches by one read of the device."""
    marks = [keep if cache.valid is None else keep & cache.valid for cache, keep in wanted]
    counts = [keep.sum(-1) for keep in marks]
    ends = read_together([torch.stack([count.max(), count.min()]) for count in counts])
    for (cache, _), keep, (most, least) in zip(wanted, marks, ends, strict=True):
        indices, valid = kept_indices(keep, most)
        cache.keep(indices, None if most == least else valid)


def _marks(cache: LayerCache, heads: int) -> tuple[Tensor, Tensor]:
    """Positions and validity of a cache's entries by head: [B, G, N]."""
    assert cache.positions is not None
    positions = cache.positions if cache.positions.dim() == 3 else by_head(cache.positions, heads)
    if cache.valid is None:
        return positions, torch.ones_like(positions, dtype=torch.bool)
    return positions, cache.valid if cache.valid.dim() == 3 else by_head(cache.valid, heads)
