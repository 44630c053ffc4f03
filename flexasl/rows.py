"""Prompts of different lengths, one after another without padding (varlen): a row costs what its own tokens cost.

Shapes: B rows, N positions of the padded batch, T tokens of all rows together, M tokens of a row, E cached entries of a
row, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.attention_spec import AttentionSpec
from flexasl.errors import UnsupportedError
from flexasl.masks import Visibility
from flexasl.numbers import on_device

APART = 2**32
"""Positions between the beginnings of rows where these are one sequence."""
GROUP = 2048
"""Tokens that several rows may have together where a layer runs on some rows at a time; a longer row runs alone."""


class EqualRows(NamedTuple):
    """Neighbouring rows of one length, which can be seen as a batch."""

    first: int
    """Their first row."""
    number: int
    start: int
    """Their first token."""
    length: int

    def of(self, states: Tensor, dim: int) -> Tensor:
        """Their part of varlen states, whose dim 0 is 1, as a batch: [1, ..., T, ...] → [number, ..., M, ...]."""
        own = states.narrow(dim, self.start, self.number * self.length)
        return own.unflatten(dim, (self.number, self.length)).squeeze(0).movedim(dim - 1, 0)

    def after(self, entries: int) -> EqualRows:
        """The same rows in states where so many cached entries stand before each row."""
        return self._replace(start=self.start + self.first * entries, length=self.length + entries)


class Rows:
    """The tokens that there are at some layer: those of row 0, then those of row 1, and so on. What is derived of them
    is made once."""

    def __init__(
        self,
        lengths: Sequence[int],
        positions: Tensor,
        *,
        kept: Tensor | None = None,
        contiguous: bool = True,
        layout: Tensor | None = None,
        batch_rows: Sequence[int] | None = None,
    ) -> None:
        """lengths: each row's tokens; positions [T] int64: their places in the padded batch, ascending in each row,
        whose last token is at the end; kept [T] bool: False at tokens that are masked out, None where none is;
        contiguous: whether no token is missing within a row; layout: the attribute, if there already; batch_rows:
        which rows of the batch these are, if not all."""
        self.lengths = list(lengths)
        self.positions = positions
        self.kept = kept
        self.contiguous = contiguous
        if layout is None:
            layout = torch.tensor([int(contiguous), *self.lengths], dtype=torch.int64, device="cpu")
        self.layout = layout
        """[1 + B] int64 on the host: contiguous, then lengths; a graph that takes these as a tensor is good for all."""
        self.batch_rows = batch_rows
        self.scoring_tokens: Sequence[Tensor | None] | None = None
        """Of each row, the places [W] int64 among its tokens of those whose queries are scored; None, for a row or for
        all: the last ones."""
        self.controls: Sequence[int] = [0] * len(self.lengths)
        """Of each row, how many of the first of these are controls."""
        self.silent: Sequence[Tensor | None] | None = None
        """Of each row, which of its scoring tokens [W] bool give nothing, in rows of which tokens are masked out."""
        self.past: tuple[Tensor, Tensor | None, int] | None = None
        """Cached entries before the tokens of each row: positions int64 and validity bool (None for all), [B, E] or
        [B, G, E], and how many positions of the padded sequence came before."""
        self.last_seen: Tensor | None = None
        """[T] int64: up to which position a token sees others, where some see later ones; see `Visibility`."""
        self.ahead = 0
        self.firsts: Tensor | None = None
        """[B] int64: the position of each row's first token, where attention counts from there."""
        self.starts = [sum(self.lengths[:row]) for row in range(len(self.lengths))]
        self.total = sum(self.lengths)
        self.width = max(self.lengths)
        self._visible: dict[int, Visibility] = {}
        self._together: Visibility | None = None
        self._queries: dict[int, Tensor] = {}
        self._groups: list[tuple[slice, Rows]] = []
        self._singles: list[tuple[slice, Rows]] = []
        self._in_order: Rows | None = None
        self._counted: Rows | None = None
        self._made: dict[Any, Any] = {}
        """What depends on lengths and positions alone, shared by `Rows` that differ in anything else."""
        self.parts = _equal(self.lengths, self.starts)
        """The rows, as few batches."""

    @classmethod
    def left_padded(cls, lengths: Sequence[int], tokens: int, device: torch.device) -> Rows:
        """All tokens of rows that were padded on the left to so many."""
        at = torch.arange(tokens, dtype=torch.int64, device=device)
        return cls(lengths, torch.cat([at[tokens - length :] for length in lengths]))

    def seeing(self, last_seen: Tensor | None, ahead: int) -> Rows:
        """These tokens, which see as far."""
        self.last_seen, self.ahead = last_seen, ahead
        return self

    @property
    def in_order(self) -> Rows:
        """The same tokens, each of which sees none after it."""
        if self.last_seen is None:
            return self
        if self._in_order is None:
            self._in_order = self.masked(self.kept).seeing(None, 0)
        return self._in_order

    def counted_from(self, firsts: Tensor) -> Rows:
        """The same tokens, whose attention counts positions from these [B] int64, each row's first one."""
        if self._counted is None:
            self._counted = self.masked(self.kept)
            self._counted.past, self._counted.firsts = self.past, firsts
        return self._counted

    def masked(self, kept: Tensor | None) -> Rows:
        """The same tokens, of which some are masked out."""
        return self._alike(kept).seeing(self.last_seen, self.ahead)

    def after(self, positions: Tensor, valid: Tensor | None, seen: int) -> Rows:
        """The same tokens after what a cache holds."""
        made = self._alike(None).seeing(None if self.last_seen is None else self.last_seen + seen, self.ahead)
        made.past = positions, valid, seen
        return made

    def _alike(self, kept: Tensor | None) -> Rows:
        made = Rows(self.lengths, self.positions, kept=kept, contiguous=self.contiguous, layout=self.layout)
        made.scoring_tokens, made.controls, made._made = self.scoring_tokens, self.controls, self._made
        return made

    def of(self, row: int) -> slice:
        """Where the row's tokens are."""
        return slice(self.starts[row], self.starts[row] + self.lengths[row])

    def groups(self) -> list[tuple[slice, Rows]]:
        """Neighbouring rows of at most `GROUP` tokens, or a longer row alone: where its tokens are, and those rows."""
        if self._groups:
            return self._groups
        firsts = [0]
        for row, (start, length) in enumerate(zip(self.starts, self.lengths)):
            if row > firsts[-1] and start + length - self.starts[firsts[-1]] > GROUP:
                firsts.append(row)
        self._groups = [self._group(*some) for some in zip(firsts, [*firsts[1:], len(self.lengths)])]
        return self._groups

    def singles(self) -> list[tuple[slice, Rows]]:
        """Each row alone: where its tokens are, and the row."""
        if len(self.lengths) == 1:
            return [(slice(0, self.total), self)]
        if not self._singles:
            self._singles = [self._group(row, row + 1) for row in range(len(self.lengths))]
        return self._singles

    @property
    def lengths_on_device(self) -> Tensor:
        """[B] int64."""
        # On the host they are there already, as an input of graphs.
        on_host = self.positions.device == self.layout.device
        return self._once("lengths", lambda: self.layout[1:] if on_host else self.numbers(self.lengths))

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32: where rows begin, and the end."""
        return self._once("cu_seqlens", lambda: F.pad(self.lengths_on_device.cumsum(0), (1, 0)).int())

    def numbers(self, values: Sequence[int]) -> Tensor:
        """Whole numbers of the host [len(values)] int64 on the rows' device, to read only; equal ones are made once."""
        return self._once((*values,), lambda: on_device(values, self.positions.device))

    def flat(self, tokens: int) -> Tensor:
        """Each token's place [T] int64 in a padded batch [B, tokens] whose rows are laid out one after another."""
        return self._once(("flat", tokens), lambda: self._flat(tokens))

    def _flat(self, tokens: int) -> Tensor:
        rows = self.numbers(self.batch_rows or range(len(self.lengths)))
        return rows.repeat_interleave(self.lengths_on_device, output_size=self.total) * tokens + self.positions

    def as_batch(self) -> tuple[Tensor, Tensor | None]:
        """Where the tokens are of the rows as a left-padded batch: tokens [B, width] int64, and which are real
        [B, width] bool, None where all are."""
        made: tuple[Tensor, Tensor | None] = self._once("batch", self._as_batch)
        return made

    def _as_batch(self) -> tuple[Tensor, Tensor | None]:
        ends = self.lengths_on_device.cumsum(0)
        at = torch.arange(-self.width, 0, dtype=torch.int64, device=self.positions.device)
        tokens = ends[:, None] + at
        if min(self.lengths) == self.width:
            return tokens, None
        real = at >= -self.lengths_on_device[:, None]
        return tokens.where(real, ends[:, None] - 1), real

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling():  # a graph makes equal ones once; to look numbers up would bind it to them
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def queries(self, window: int) -> Tensor:
        """Where the tokens are whose queries are scored, those `scoring_tokens` or each row's last `window`, all of a
        row that has fewer: [K] int64."""
        made = self._queries.get(window)
        if made is None:
            device, parts = self.positions.device, []
            for own, start, n in zip(self.scoring_tokens or [None] * len(self.lengths), self.starts, self.lengths):
                span = start + max(0, n - window), start + n
                parts.append(torch.arange(*span, dtype=torch.int64, device=device) if own is None else start + own)
            made = self._queries[window] = torch.cat(parts)
        return made

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Each row's cached entries [B, G, E, D], and its new ones [1, G, T, D] after them: [1, G, B E + T, D]."""
        made = []
        for part in self.parts:
            joined = torch.cat([held[part.first : part.first + part.number], part.of(new, 2)], 2)
            made.append(joined.transpose(0, 1).flatten(1, 2))
        return torch.cat(made, 1)[None]

    def visible(self, part: EqualRows) -> Visibility:
        """Who sees whom in these rows."""
        made = self._visible.get(part.first)
        if made is None:
            at, valid = self.view(part)
            if self.past is None and self.contiguous and self.last_seen is None:
                at = at[:1]
            own = at[..., self.entries :]
            last_seen = None if self.last_seen is None else part.of(self.last_seen[None], 1)
            further: Any = {"last_seen": last_seen, "ahead": self.ahead}
            made = self._visible[part.first] = Visibility(own if own.dim() == 2 else own[:, 0], at, valid, **further)
        return made

    def together(self) -> Visibility:
        """Who sees whom among the tokens of all rows as one sequence [1, T], over keys as `join` lays them out: nobody
        beyond the own row."""
        if self._together is None:
            numbers = self.numbers(range(len(self.lengths)))
            rows = numbers.repeat_interleave(self.lengths_on_device, output_size=self.total)
            own, first = self.positions if self.firsts is None else self.positions - self.firsts[rows], rows * APART
            own, first = (own + first)[None], first[None]
            further: Any = {"first_seen": first, "ahead": self.ahead}
            if self.last_seen is not None:
                further["last_seen"] = self.last_seen[None] + first
            if self.past is None:
                made = Visibility(own, own, None if self.kept is None else self.kept[None], **further)
            else:
                places = torch.arange(self.total, dtype=torch.int64, device=rows.device) + (rows + 1) * self.entries
                at, valid = self._joined_view(numbers)
                made = Visibility(own + self.past[2], at, valid, query_at=places, **further)
            self._together = made
        return self._together

    def _joined_view(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions, those of each row `APART` after the last one's, and validity of all keys as `join` lays them out:
        [1, N] or [1, G, N]. numbers [B] int64: 0 to B - 1."""
        found: list[list[Tensor]] = [[], []]
        for part in self.parts:
            at, valid = self.view(part)
            first = numbers[part.first : part.first + part.number] * APART
            at = at + first.view(-1, *[1] * (at.dim() - 1))
            for states, kind in zip((at, valid), found):
                if states is not None:
                    kind.append(states.movedim(0, -2).flatten(-2)[None])
        positions, marks = found
        return torch.cat(positions, -1), torch.cat(marks, -1) if marks else None

    @property
    def entries(self) -> int:
        """E."""
        return 0 if self.past is None else self.past[0].shape[-1]

    def view(self, part: EqualRows) -> tuple[Tensor, Tensor | None]:
        """Positions and validity of the past and of the rows' own tokens: [number, E + M] or [number, G, E + M]."""
        new = part.of(self.positions[None], 1)
        if self.firsts is not None:
            firsts = self.firsts[part.first : part.first + part.number, None]
            new = new - firsts
        if self.past is None:
            return new, None if self.kept is None else part.of(self.kept[None], 1)
        (held, valid, seen), some = self.past, slice(part.first, part.first + part.number)
        held, new, valid = held[some], new + seen, None if valid is None else valid[some]
        if self.firsts is not None:
            held = held - (firsts[:, None] if held.dim() == 3 else firsts)
        if held.dim() == 3:
            new = new[:, None].expand(-1, held.shape[1], -1)
        if valid is not None:
            valid = torch.cat([valid, valid.new_ones(new.shape)], -1)
        return torch.cat([held, new], -1), valid

    def follow_order(self, spec: AttentionSpec) -> bool:
        """Whether order within each row tells all of attention: no past, no mask, no position that is missing where
        positions count."""
        whole = self.kept is None and self.past is None and self.last_seen is None
        return whole and (self.contiguous or not spec.needs_positions())

    def _group(self, first: int, stop: int) -> tuple[slice, Rows]:
        lengths = self.lengths[first:stop]
        tokens = slice(self.starts[first], self.starts[first] + sum(lengths))
        kept = None if self.kept is None else self.kept[tokens].clone()
        made = Rows(lengths, self.positions[tokens].clone(), kept=kept, contiguous=self.contiguous)
        made.scoring_tokens = None if self.scoring_tokens is None else self.scoring_tokens[first:stop]
        made.controls = self.controls[first:stop]
        if self.past is not None:
            held, valid, seen = self.past
            made.past = held[first:stop], None if valid is None else valid[first:stop], seen
        made.firsts = None if self.firsts is None else self.firsts[first:stop]
        return tokens, made.seeing(None if self.last_seen is None else self.last_seen[tokens].clone(), self.ahead)

    def has_mask(self, spec: AttentionSpec, part: EqualRows) -> bool:
        """Whether there is more to these rows' attention than causal order."""
        if self.kept is not None or self.past is not None or self.last_seen is not None:
            return True
        return spec.needs_positions(part.length if self.contiguous else None)


def _equal(lengths: list[int], starts: list[int]) -> list[EqualRows]:
    parts: list[EqualRows] = []
    for row, length in enumerate(lengths):
        if parts and parts[-1].length == length:
            parts[-1] = parts[-1]._replace(number=parts[-1].number + 1)
        else:
            parts.append(EqualRows(row, 1, starts[row], length))
    return parts


def by_token(states: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """What `pick` makes of a per-token tensor [B, M, ...], or [B, 1, M, ...] with a dimension for heads."""
    if states.dim() == 4 and states.shape[1] == 1:
        return pick(states.transpose(1, 2)).transpose(1, 2)
    return pick(states)


def left_padded_lengths(attention_mask: Tensor, name: str = "attention_mask") -> list[int]:
    """Real tokens per row of a mask [B, N] that is 0 at padding; raises `UnsupportedError`, which calls it by this
    name, unless padding is on the left."""
    mask = attention_mask.bool()
    if mask.dim() != 2:
        _refuse_padding(name)
    # One read: whether a real token stands right before padding, then the tokens of each row.
    breaks = ((mask[:, :-1] & ~mask[:, 1:]).any() | ~mask[:, -1].all()).view(1)
    broken, *tokens = torch.cat([breaks, mask.sum(-1)]).tolist()
    if 0 in tokens:
        raise UnsupportedError(f"{name} has no token in row {tokens.index(0)}, only padding; give each row a token")
    if broken:
        _refuse_padding(name)
    return tokens


def _refuse_padding(name: str) -> NoReturn:
    raise UnsupportedError(
        f"{name} has padding on the right or between tokens; pad prompts on the left (padding_side='left')"
    )
