"""Prompts of different lengths behind one another, without padding: a row costs what its own tokens cost.

Shapes: B rows, N columns of the padded batch, T tokens of all rows together, M tokens of a row, E cache entries of a
row, H query heads, G KV heads, D head dim, W window, P = M - W prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.attention import FlexASLAttention, Scoring
from flexasl.attention_spec import AttentionSpec
from flexasl.kernels import attention_gradients
from flexasl.masks import Visibility

GROUP = 2048
"""Tokens that several rows may have together where a layer runs on some rows at a time; a longer row runs alone."""


class Run(NamedTuple):
    """Neighbouring rows of one length, which can be seen as a batch."""

    first: int
    """Their first row."""
    rows: int
    start: int
    """Their first token."""
    length: int

    def of(self, states: Tensor, dim: int) -> Tensor:
        """The run's part of packed states, whose dim 0 is 1, as a batch: [1, ..., T, ...] → [rows, ..., M, ...]."""
        own = states.narrow(dim, self.start, self.rows * self.length)
        return own.unflatten(dim, (self.rows, self.length)).squeeze(0).movedim(dim - 1, 0)


class Packed:
    """Which tokens there are at some layer: those of row 0, then those of row 1, and so on.

    lengths are the rows' tokens; columns [T] int64 the places of all tokens in the padded batch, ascending in each row,
    whose last token is at the end; stays [T] bool is False at tokens that are masked out, None where none is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        columns: Tensor,
        stays: Tensor | None = None,
        gaps: bool = False,
        layout: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """gaps: whether tokens are missing within rows; layout: the attribute, if there already; rows: which rows of
        the batch these are, if not all."""
        self.lengths = list(lengths)
        self.columns = columns
        self.stays = stays
        self.gaps = gaps
        if layout is None:
            layout = torch.tensor([int(gaps), *self.lengths], dtype=torch.int64, device="cpu")
        self.layout = layout
        """[1 + B] int64 on the host: gaps, then lengths; a graph that is given these as a tensor is good for all."""
        self.rows = rows
        self.starts = [sum(self.lengths[:row]) for row in range(len(self.lengths))]
        self.total = sum(self.lengths)
        self.width = max(self.lengths)
        self._visible: dict[int, Visibility] = {}
        self._last: dict[int, Tensor] = {}
        self._groups: list[tuple[slice, Packed]] = []

    @classmethod
    def left_padded(cls, lengths: Sequence[int], tokens: int, device: torch.device) -> Packed:
        """All tokens of rows that were padded on the left to so many."""
        at = torch.arange(tokens, dtype=torch.int64, device=device)
        return cls(lengths, torch.cat([at[tokens - length :] for length in lengths]))

    def masked(self, stays: Tensor) -> Packed:
        """The same tokens, of which some are masked out."""
        return Packed(self.lengths, self.columns, stays, self.gaps, self.layout)

    def runs(self) -> list[Run]:
        """The rows, as few batches."""
        runs: list[Run] = []
        for row, length in enumerate(self.lengths):
            if runs and runs[-1].length == length:
                runs[-1] = runs[-1]._replace(rows=runs[-1].rows + 1)
            else:
                runs.append(Run(row, 1, self.starts[row], length))
        return runs

    def groups(self) -> list[tuple[slice, Packed]]:
        """Neighbouring rows of at most `GROUP` tokens, or a longer row alone: where its tokens are, and those rows as
        `Packed`; made once."""
        if not self._groups:
            firsts = [0]
            for row, (start, length) in enumerate(zip(self.starts, self.lengths)):
                if row > firsts[-1] and start + length - self.starts[firsts[-1]] > GROUP:
                    firsts.append(row)
            self._groups = [self._group(*some) for some in zip(firsts, [*firsts[1:], len(self.lengths)])]
        return self._groups

    def row_of(self) -> Tensor:
        """The row of each token: [T] int64."""
        device = self.columns.device
        if self.rows is None:
            rows = torch.arange(len(self.lengths), dtype=torch.int64, device=device)
        else:
            rows = torch.tensor(self.rows, dtype=torch.int64, device=device)
        counts = self.layout[1:].to(device)
        return rows.repeat_interleave(counts, output_size=self.total)

    def flat(self, tokens: int) -> Tensor:
        """Each token's place [T] int64 in a padded batch [B, tokens] whose rows are laid out behind one another."""
        return self.row_of() * tokens + self.columns

    def as_batch(self) -> tuple[Tensor, Tensor | None]:
        """Where to find the rows as a left-padded batch: tokens [B, width] int64, and which are real [B, width] bool,
        None where all are."""
        device = self.columns.device
        stops = [start + length for start, length in zip(self.starts, self.lengths)]
        ends = torch.tensor(stops, dtype=torch.int64, device=device)
        at = torch.arange(-self.width, 0, dtype=torch.int64, device=device)
        tokens = ends[:, None] + at
        if min(self.lengths) == self.width:
            return tokens, None
        real = at >= -self.layout[1:].to(device)[:, None]
        return tokens.where(real, ends[:, None] - 1), real

    def attend(
        self, attention: FlexASLAttention, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of each row to itself: query [1, H, T, D], key, value [1, G, T, D] → [1, H, T, D]."""
        if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and self._is_one_plain_row(attention)):
            spec = attention.spec.text
            return packed_attention(query, key, value, self.layout, self.columns, self.stays, sinks, spec)
        if len(self.lengths) == 1:
            visible = None if self._is_one_plain_row(attention) else self.visible(self.runs()[0])
            return attention(query, key, value, visible, sinks=sinks)
        out = []
        for run in self.runs():
            states = (run.of(tensor, 2) for tensor in (query, key, value))
            mixed = attention(*states, self.visible(run) if self._masks(attention, run) else None, sinks=sinks)
            out.append(mixed.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)[None].transpose(1, 2)

    def last(self, window: int) -> Tensor:
        """Where the last `window` tokens of each row are, or all of a row that has fewer: [K] int64; made once."""
        made = self._last.get(window)
        if made is None:
            device = self.columns.device
            spans = [
                (start + max(0, length - window), start + length) for start, length in zip(self.starts, self.lengths)
            ]
            parts = [torch.arange(first, stop, dtype=torch.int64, device=device) for first, stop in spans]
            made = self._last[window] = torch.cat(parts)
        return made

    def scores(
        self,
        attention: FlexASLAttention,
        query: Tensor,
        key: Tensor,
        scoring: Scoring,
        rows: Sequence[int],
        sinks: Tensor | None = None,
        *,
        mass: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Window scores of some rows, by query [1, H, K, D] of the `last` tokens and key [1, G, T, D]:
        [rows, G, width - W] float32, each row's at the right end; 0 where a row has no such token. With `mass` also the
        attention that each token gets, [rows, G, width]."""

        def seen(run: Run, some: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            stays = None if self.stays is None else run.of(self.stays[None], 1)[some]
            return run.of(key, 2)[some], run.of(self.columns[None], 1)[some], stays

        return self.scores_of(attention, query, scoring, rows, seen, sinks, mass)

    def scores_of(
        self,
        attention: FlexASLAttention,
        query: Tensor,
        scoring: Scoring,
        rows: Sequence[int],
        seen: Callable[[Run, Any], tuple[Tensor, Tensor, Tensor | None]],
        sinks: Tensor | None,
        mass: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As `scores`; seen(run, some) gives keys [some, G, N, D], their columns and their validity of a run's rows,
        whose own tokens are the last of the N."""
        window, found = scoring.window, []
        for run, some, count in self._runs_of(rows):
            keys, at, valid = seen(run, some)
            if run.length <= window:
                found.append([query.new_zeros(count, keys.shape[1], 0, dtype=torch.float32)] * (1 + mass))
                continue
            before = sum(min(length, window) for length in self.lengths[: run.first])
            states = Run(run.first, run.rows, before, window).of(query, 2)[some], keys
            made = attention.scores(*states, scoring, valid=valid, positions=at, sinks=sinks, mass=mass)
            found.append([part[..., keys.shape[2] - run.length :] for part in (made if mass else (made,))])
        scores, *masses = (
            _right_aligned(parts, wide) for parts, wide in zip(zip(*found), (max(0, self.width - window), self.width))
        )
        return scores, masses[0] if masses else None

    def visible(self, run: Run) -> Visibility:
        """Who sees whom in the run's rows."""
        made = self._visible.get(run.first)
        if made is None:
            at = run.of(self.columns[None], 1)
            at = at if self.gaps else at[:1]
            stays = None if self.stays is None else run.of(self.stays[None], 1)
            made = self._visible[run.first] = Visibility(at, at, stays)
        return made

    def _runs_of(self, rows: Sequence[int]) -> list[tuple[Run, Any, int]]:
        """The runs that hold these rows, where in the run they are, and how many."""
        found: list[tuple[Run, Any, int]] = []
        for run in self.runs():
            wanted = [row - run.first for row in rows if run.first <= row < run.first + run.rows]
            if wanted:
                every = len(wanted) == run.rows
                some = slice(None) if every else torch.tensor(wanted, dtype=torch.int64, device=self.columns.device)
                found.append((run, some, len(wanted)))
        return found

    def _group(self, first: int, stop: int) -> tuple[slice, Packed]:
        lengths = self.lengths[first:stop]
        tokens = slice(self.starts[first], self.starts[first] + sum(lengths))
        stays = None if self.stays is None else self.stays[tokens].clone()
        return tokens, Packed(lengths, self.columns[tokens].clone(), stays, self.gaps)

    def _is_one_plain_row(self, attention: FlexASLAttention) -> bool:
        return len(self.lengths) == 1 and not self._masks(attention, Run(0, 1, 0, self.total))

    def _masks(self, attention: FlexASLAttention, run: Run) -> bool:
        """Whether there is more to a run's attention than causal order."""
        return self.stays is not None or attention.spec.needs_positions(None if self.gaps else run.length)


class Continued:
    """Packed tokens of a later turn, each row after what a layer's cache holds of it."""

    def __init__(self, packed: Packed, columns: Tensor, valid: Tensor | None, past: int) -> None:
        """columns int64 and valid bool, [B, E] or [B, G, E], are those of the layer's cache; past is how many columns
        the sequence has had before the turn."""
        self.packed = packed
        self.past = past
        self.entries = columns.shape[-1]
        """E."""
        self._columns, self._valid = columns, valid

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Each row's cache entries [B, G, E, D], and its new ones [1, G, T, D] after them: [1, G, B E + T, D]."""
        parts = []
        for run in self.packed.runs():
            joined = torch.cat([held[run.first : run.first + run.rows], run.of(new, 2)], 2)
            parts.append(joined.transpose(0, 1).flatten(1, 2))
        return torch.cat(parts, 1)[None]

    def attend(
        self, attention: FlexASLAttention, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """As `Packed.attend`, over joined keys and values [1, G, B E + T, D]."""
        out = []
        for run in self.packed.runs():
            at, valid = self._view(run)
            new = at[..., self.entries :]
            visible = Visibility(new if new.dim() == 2 else new[:, 0], at, valid)
            states = (self._joined(run).of(tensor, 2) for tensor in (key, value))
            mixed = attention(run.of(query, 2), *states, visible, sinks=sinks)
            out.append(mixed.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)[None].transpose(1, 2)

    def scores(
        self,
        attention: FlexASLAttention,
        query: Tensor,
        key: Tensor,
        scoring: Scoring,
        rows: Sequence[int],
        sinks: Tensor | None = None,
        *,
        mass: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Packed.scores`, of the new tokens alone."""

        def seen(run: Run, some: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            keys, (at, valid) = self._joined(run).of(key, 2)[some], self._view(run)
            return (keys, at[some], None) if valid is None else _padding_first(keys, at[some], valid[some])

        return self.packed.scores_of(attention, query, scoring, rows, seen, sinks, mass)

    def _joined(self, run: Run) -> Run:
        """The run among joined keys."""
        return Run(run.first, run.rows, run.start + run.first * self.entries, self.entries + run.length)

    def _view(self, run: Run) -> tuple[Tensor, Tensor | None]:
        """Columns of the sequence, and validity, of the run's entries and new tokens: [rows, E + M] or
        [rows, G, E + M]."""
        rows = slice(run.first, run.first + run.rows)
        held = self._columns[rows]
        new = run.of(self.packed.columns[None], 1) + self.past
        valid = None if self._valid is None else self._valid[rows]
        if held.dim() == 3:
            new = new[:, None].expand(-1, held.shape[1], -1)
        if valid is not None:
            valid = torch.cat([valid, valid.new_ones(new.shape)], -1)
        return torch.cat([held, new], -1), valid


def _padding_first(keys: Tensor, at: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, G, N, D] with their columns and validity, [B, N] or [B, G, N], in an order that has no padding of an
    earlier turn between real tokens, which scores pool over."""
    order = valid.to(torch.uint8).argsort(dim=-1, stable=True)
    by_head = order if order.dim() == 3 else order[:, None].expand(-1, keys.shape[1], -1)
    return keys.take_along_dim(by_head[..., None], 2), at.gather(-1, order), valid.gather(-1, order)


def _right_aligned(parts: Sequence[Tensor], width: int) -> Tensor:
    """[..., N] of several rows each, one behind the other, 0 on the left of shorter ones: [sum of rows, ..., width]."""
    wide = [F.pad(part, (width - part.shape[-1], 0)) for part in parts]
    return wide[0] if len(wide) == 1 else torch.cat(wide)


@torch.library.custom_op("flexasl::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    columns: Tensor,
    stays: Tensor | None,
    sinks: Tensor | None,
    spec: str,
) -> Tensor:
    """`Packed.attend` as one node of a graph, for any number of rows of any lengths, which `Packed.layout`
    tells."""
    attention = FlexASLAttention.of(AttentionSpec.from_text(spec))
    gaps, *lengths = layout.tolist()
    out = Packed(lengths, columns, stays, bool(gaps), layout).attend(attention, query, key, value, sinks)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)


@torch.library.custom_op("flexasl::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    columns: Tensor,
    stays: Tensor | None,
    sinks: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty where there are none) by that of `packed_attention`'s output."""
    gaps, *lengths = layout.tolist()
    packed = Packed(lengths, columns, stays, bool(gaps), layout)
    rule, found = AttentionSpec.from_text(spec), []
    for run in packed.runs():
        own, wanted, keys, values = (run.of(tensor, 2) for tensor in (query, grad, key, value))
        found.append(attention_gradients(rule, wanted, own, keys, values, packed.visible(run), sinks))
    *parts, of_sinks = zip(*found)
    joined = [torch.cat([made.transpose(1, 2).flatten(0, 1) for made in part]) for part in parts]
    queries, keys, values = (part[None].transpose(1, 2).contiguous() for part in joined)
    for_sinks = query.new_empty(0) if sinks is None else torch.stack(of_sinks).sum(0).to(sinks.dtype)
    return queries, keys, values, for_sinks


@packed_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = query.new_empty(0) if settings[3] is None else torch.empty_like(settings[3])
    wanted, keys, values = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return wanted, keys, values, sinks


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sinks = ctx.saved_tensors[-1]
    *states, of_sinks = packed_attention_backward(grad, *ctx.saved_tensors, ctx.spec)
    return *states, None, None, None, None if sinks is None else of_sinks, None


packed_attention.register_autograd(_attention_backward, setup_context=_remember)
