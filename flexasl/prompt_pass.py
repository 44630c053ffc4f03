"""Prompts on their way through the layers: made rows, scored, pruned, remembered.

Shapes: B batch, G KV heads, M prompt tokens, T tokens of all prompts at the current layer, D head dim, C width of
hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.asking import spans
from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache, retain_all
from flexasl.checks import instance
from flexasl.clock import Clock
from flexasl.errors import ConfigError, FlexASLError
from flexasl.forward_pass import NO_ATTENTION, ForwardPass, look_up, still_valid
from flexasl.layer_step import LayerStep
from flexasl.ops import compact_kv, gather_tokens
from flexasl.prefill import Prefill
from flexasl.report import THE_LAST, Report, RowReport, SelectionReport, Spans
from flexasl.rows import Rows
from flexasl.second_pass import Rerun, read_again, refuse_second_pass
from flexasl.states import LayerStates


class PromptPass(ForwardPass):
    """The pass over a batch of prompts, or over a later turn that is pruned like one. Layers see one row [1, T, C]."""

    prefill: Prefill

    def __init__(
        self,
        caches: Sequence[LayerCache | LayerStates] | None,
        prefill: Prefill,
        positions: Tensor,
        valid: Tensor | None = None,
        *,
        compiled: bool = False,
        rerun: Rerun | None = None,
        unpacks: bool = False,
        lenders: Mapping[int, int] | None = None,
        in_order: Container[int] = (),
    ) -> None:
        """valid, of a later turn [B, positions so far] bool, is False at padding, None where there is none. rerun: what
        policies with a second pass need. unpacks: as long as no token was dropped, layers give their outputs in the
        prompt's own shape. in_order: layers where no token sees later ones, though elsewhere some do."""
        super().__init__(caches, positions, valid, compiled=compiled, lenders=lenders, in_order=in_order)
        if prefill.rows.batch_rows is None:
            refuse_second_pass(prefill, rerun)
        if self._past == 0:
            for cache in caches or ():
                cache.begin(prefill.config.kv_dtype)
        self.prefill = prefill
        self._unpacks = unpacks
        self._unpacked = True
        self.rerun = rerun
        self._windows: dict[int, int] = {}
        self._later: dict[tuple[Rows, int], Rows] = {}
        """Of the tokens of layers, these after so many cached entries, the same at all layers."""
        self._clock = Clock(positions.device)

    def before_layer(self, layer: int, attention: FlexASLAttention | None, hidden: Tensor) -> tuple[Tensor, LayerStep]:
        if self._unpacked:
            hidden, self._unpacked = self._pack_all(hidden), False
        if attention is None:
            return hidden, LayerStep(None, rows=self.prefill.rows)
        lender = self._lender(layer)
        if lender is not None:
            return hidden, LayerStep(attention, rows=lender.rows, lender=lender)
        # A graph leaves queries behind in any case, so that layers that need none are no other graph.
        scored = self.prefill.config.window if self._compiled or self.prefill.needs(layer) else 0
        rows = self.prefill.rows.in_order if layer in self._in_order else self.prefill.rows
        firsts = self._firsts if attention.spec.counts_from_start else None
        if self._past == 0:
            rows = rows if firsts is None else rows.counted_from(firsts)
            return hidden, self._lending(layer, LayerStep(attention, rows=rows, scored=scored))
        assert self.caches is not None
        cache = self.caches[layer]
        assert isinstance(cache, LayerCache) and cache.positions is not None
        rows = self._after(cache, rows)
        rows = rows if firsts is None else rows.counted_from(firsts)
        step = LayerStep(attention, rows=rows, scored=scored, keys=cache.keys, values=cache.values)
        return hidden, self._lending(layer, step)

    def after_layer(self, layer: int, step: LayerStep, hidden: Tensor) -> Tensor:
        """Remembers and scores the tokens, and may drop some."""
        prefill, last = self.prefill, layer + 1 == self.prefill.num_layers
        dropped = prefill.rows.total < sum(prefill.lengths)
        if step.module is None or step.borrows:
            prefill.pass_over()
        else:
            self._observe(layer, step, step.module)
        fresh, before, tokens = prefill.fresh, prefill.rows, prefill.advance()
        if self.caches is not None:
            self.caches[0].unfinished = True
            cache = self.caches[layer]
            if isinstance(cache, LayerStates):
                cache.passed(self._tokens, dropped)
            elif step.module is not None:
                self._forget(cache, layer, step.module.sliding_window)
        if tokens is not None:
            self._tables.clear()
            self._later.clear()
        if self._unpacks and before.contiguous and not last:
            self._unpacked = True
            return self._unpack(hidden, before)
        if tokens is not None:
            hidden = gather_tokens(hidden, tokens[None])
            if self.rerun is not None:
                hidden = read_again(self, layer, fresh, hidden, self.rerun)
        return self._finish(hidden) if last else hidden

    def again(self, caches: Sequence[LayerCache | LayerStates] | None, prefill: Prefill) -> PromptPass:
        """A pass of some of the same tokens, alone."""
        same: dict[str, Any] = {"compiled": self._compiled, "lenders": self.lenders, "in_order": self._in_order}
        return PromptPass(caches, prefill, self.positions, **same)

    def blank_out(self, states: Tensor, positions: slice | Tensor = slice(None)) -> None:
        gone = self.prefill.gone()
        if gone is not None:
            shape = (*states.shape[:2], *[1] * (states.dim() - 2))
            states.masked_fill_(gone[:, positions].view(shape), float("nan"))

    def close(self) -> Report:
        """Drops what was masked out from the caches."""
        super().close()
        kept = self.prefill.close()
        retain_all(
            [
                (cache, look_up(kept[layer], cache.positions))
                for layer, cache in enumerate(self.caches or ())
                if layer in kept and isinstance(cache, LayerCache) and cache.positions is not None
            ]
        )
        return self._report(self._clock.stop())

    def _observe(self, layer: int, step: LayerStep, module: FlexASLAttention) -> None:
        """Scores the tokens, and remembers their keys and values."""
        if step.key is None:
            raise FlexASLError(NO_ATTENTION.format(layer))
        query, key, cached = step.query, step.key, step.cached
        step.query = step.key = step.cached = None
        groups = None if cached is None else cached[0].shape[1]
        entries = self.prefill.observe(layer, query, key, module, step.sinks, groups=groups, rows=step.rows)
        cache = None if self.caches is None else self.caches[layer]
        if isinstance(cache, LayerCache) and cached is not None:
            self._remember(cache, *cached, entries)

    def _remember(
        self, cache: LayerCache, keys: Tensor, values: Tensor, entries: tuple[Tensor, Tensor | None] | None
    ) -> None:
        """A prompt's keys and values [1, G, T, D], all of them or those entries."""
        rows = self.prefill.rows
        if entries is not None:
            tokens, valid = entries
            keys, values = compact_kv(keys, values, tokens)
            cache.append(keys, values, rows.positions[tokens] + self._past, valid, self._tokens)
            return
        tokens, real = rows.as_batch()
        if real is None:
            keys, values = (rows.parts[0].of(states, 2) for states in (keys, values))
        else:
            keys, values = compact_kv(keys, values, tokens[:, None].expand(-1, keys.shape[1], -1))
        positions = rows.positions[tokens] + self._past
        cache.append(keys, values, positions, real, self._tokens, aligned=rows.contiguous)

    def _after(self, cache: LayerCache, rows: Rows) -> Rows:
        """Tokens of a later turn after what a cache holds; made once, with their masks, where caches hold the same."""
        assert cache.positions is not None
        count = cache.positions.shape[-1]
        known = self._later.get((rows, count)) if cache.is_aligned(count) else None
        if known is None:
            known = rows.after(cache.positions, still_valid(self._valid, cache.positions, cache.valid), self._past)
            if cache.is_aligned(count):
                self._later[rows, count] = known
        return known

    def _forget(self, cache: LayerCache, layer: int, sliding_window: int | None) -> None:
        """Drops the entries that no later token can see through the sliding window."""
        if sliding_window is None or self._tokens == 1:
            return
        if not cache.record_past:
            self._windows[layer] = sliding_window
        cache.forget(sliding_window, later=self._old)

    def _row_beginnings(self) -> Tensor | None:
        if self._past > 0:
            return super()._row_beginnings()
        return self.prefill.rows.numbers([self._tokens - length for length in self.prefill.lengths])

    def _pack_all(self, hidden: Tensor) -> Tensor:
        self._check_tokens(hidden)
        return self._for_tokens(hidden)

    def _for_tokens(self, states: Tensor) -> Tensor:
        """A per-token tensor [B or 1, M, ...] of the prompts as [1, T, ...]."""
        rows, batch = self.prefill.rows, self.positions.shape[0]
        if states.shape[0] == 1 and batch > 1:
            return gather_tokens(states, rows.positions[None])
        states = states.reshape(1, -1, *states.shape[2:])
        if rows.total == states.shape[1] and rows.batch_rows is None:
            return states
        return gather_tokens(states, rows.flat(self._tokens)[None])

    def _finish(self, hidden: Tensor) -> Tensor:
        if self.prefill.rows.batch_rows is not None:
            return hidden
        kept = self.prefill.rows.kept
        if kept is not None:  # the last layer ran on tokens that their row had dropped
            hidden = hidden.masked_fill(~kept[:, None], self.blank)
        return self._unpack(hidden, self.prefill.rows)

    def _unpack(self, hidden: Tensor, rows: Rows) -> Tensor:
        """States [1, T, C] in the prompt's own shape [B, M, C]: 0 at padding, `blank` at others."""
        batch = self.positions.shape[0]
        places = batch * self._tokens
        if rows.total == places:
            return hidden.reshape(batch, self._tokens, -1)
        full = hidden.new_full((places, hidden.shape[2]), self.blank)
        for row, length in enumerate(self.prefill.lengths):
            full[row * self._tokens : (row + 1) * self._tokens - length] = 0
        full.index_copy_(0, rows.flat(self._tokens), hidden[0])
        return full.view(batch, self._tokens, -1)

    def _report(self, seconds: float | Callable[[], float]) -> Report:
        prefill = self.prefill
        caches = {at: cache for at, cache in enumerate(self.caches or ()) if isinstance(cache, LayerCache)}
        kept = {at: cache.positions.shape[-1] for at, cache in caches.items() if cache.positions is not None}
        whole = {at: min(cache.seen, self._windows.get(at, cache.seen + 1) - 1) for at, cache in caches.items()}
        full = (cache.nbytes_unquantized // max(1, kept[at]) * whole[at] for at, cache in caches.items())
        return Report(
            policy=prefill.policy.name,
            config=prefill.config.to_dict(),
            num_layers=prefill.num_layers,
            rows=row_reports(prefill),
            kv_tokens=tuple(kept.get(layer, 0) for layer in range(len(self.caches or ()))),
            kv_bytes=sum(cache.nbytes for cache in caches.values()),
            kv_bytes_full=sum(full),
            state_bytes=sum(cache.state_bytes for cache in self.caches or ()),
            prefill_seconds=seconds,  # type: ignore[arg-type]
        )


def row_reports(prefill: Prefill) -> tuple[RowReport, ...]:
    """What was decided for each row, after `Prefill.close`."""
    return tuple(_row_report(prefill, row, own) for row, own in enumerate(prefill.read_selections_passed()))


def _row_report(prefill: Prefill, row: int, passed: Tensor | None) -> RowReport:
    made, trace = prefill.selections.get(row, []), prefill.selector.traces.get(row)
    tokens, kept = prefill.lengths[row], prefill.counts[row]
    ranked_by, ranking = _ranked_by(prefill, row)
    return RowReport(
        prompt_tokens=tokens,
        kept_tokens=kept,
        selected_layer=made[-1].layer if made else None,
        selections=tuple(SelectionReport(layer=one.layer, kept_tokens=one.count) for one in made),
        reason=_reason(prefill, row),
        selection_spans=() if passed is None else tuple(_runs(passed > at) for at in range(len(made))),
        ranked_by=ranked_by,
        ranking_spans=ranking,
        scored_layers=tuple(prefill.scored),
        eval_layers=tuple(trace.eval_layers) if trace else (),
        variance=tuple(trace.variance) if trace else (),
        variance_ratio=tuple(trace.variance_ratio) if trace else (),
        lookup=tuple(trace.lookup) if trace else (),
        kept_positions=range(tokens) if passed is None else tuple((passed == len(made)).nonzero()[:, 0].tolist()),  # type: ignore[arg-type]
        layer_tokens=tuple(layer[row] for layer in prefill.ran),
        reread_layers=max((layer + 1 for layer, rows in prefill.reread.items() if row in rows), default=0),
    )


def _reason(prefill: Prefill, row: int) -> str:
    """Why the row was pruned where it was, or was not pruned: one sentence."""
    made: Any = prefill.selector.reason(row, prefill.selections.get(row, [None])[-1])
    return str(instance(f"policy {prefill.policy.name!r}: reason", made, str, "a text", ConfigError))


def _ranked_by(prefill: Prefill, row: int) -> tuple[str, Spans]:
    """Whose queries ranked the row's tokens: the question's text, its positions, or the last tokens; and their
    positions. Both are empty where nothing was ranked."""
    length, window = prefill.lengths[row], prefill.config.window
    limited = any(length > most for of_layer in prefill.limits if (most := of_layer[row]) is not None)
    if not prefill.scored or length <= window or not (row in prefill.over or limited):
        return "", ()
    if prefill.policy.scoring_tokens is not None:
        return f"tokens that policy {prefill.policy.name!r} names", ()
    asked, text = None if prefill.questions is None else prefill.questions.rows[row], prefill.question_texts[row]
    if asked is not None and asked.ranking:
        marks = torch.zeros(length, dtype=torch.bool, device="cpu")
        marks[asked.ranking] = True
        return text or spans(asked.ranking), _runs(marks)
    why = "too much text follows the question" if asked is not None else text
    last = f"{THE_LAST}{window} tokens" if window > 1 else f"{THE_LAST}token"
    return f"{last}; {why}" if why else last, ((length - window, length),)


def _runs(marks: Tensor) -> Spans:
    """The runs of True in marks [N] bool, on the CPU."""
    ends = torch.nn.functional.pad(marks.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return tuple(zip(ends[::2], ends[1::2]))
