"""One forward pass of a decoder: the glue between a framework's layers and the rooms below.

Shapes: B batch, H query heads, G KV heads, M new tokens, N keys, W window, D head dim, K kept slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.masks import Visibility
from flexasl.ops import gather_tokens
from flexasl.policies import Policy
from flexasl.prefill import Prefill
from flexasl.report import Report, RowReport


class LayerStep:
    """What one layer's attention needs in this pass, and what it leaves behind: tensors only, so that a compiler can
    take the layer as one graph.

    Give it the new keys and values with `update`, then attend with what that returns.
    """

    def __init__(
        self,
        attention: FlexASLAttention,
        visible: Visibility | None,
        keys: Tensor | None,
        values: Tensor | None,
    ) -> None:
        self.attention = attention
        self.visible = visible
        self.keys = keys
        """[B, G, N, D]: the cache, with room for the new keys at its end; None for a prompt."""
        self.values = values
        self.new: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        """A prompt's queries, keys and values, and its sinks."""

    def update(self, key: Tensor, value: Tensor, *ignored: object) -> tuple[Tensor, Tensor]:
        """Takes the layer's new keys and values [B, G, M, D]; returns all that its queries may see [B, G, N, D]."""
        if self.keys is None or self.values is None:
            return key, value
        count = key.shape[2]
        self.keys[:, :, -count:] = key
        self.values[:, :, -count:] = value
        return self.keys, self.values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        """query [B, H, M, D] over key, value [B, G, N, D] → [B, H, M, D]."""
        if self.keys is None:
            self.new = (query, key, value, sinks)
        return self.attention(query, key, value, self.visible, sinks=sinks)


class Call:
    """State of one forward pass, made anew for each, so that no prompt leaves a trace on the next.

    For each layer in turn: `enter`, run the layer on `table` of its per-token inputs and on the step that `enter` gave,
    then `leave` with its output; in the end `finish`, and `close` once the model has run. With a `Prefill` the tokens
    are a prompt and may be pruned; without one they continue a sequence.
    """

    def __init__(
        self,
        caches: Sequence[LayerCache] | None,
        prefill: Prefill | None,
        columns: Tensor,
        valid: Tensor | None,
        *,
        compiled: bool = False,
    ) -> None:
        """columns [B, M] int64 are the new tokens' columns in the sequence; valid [B, columns so far] bool is False at
        padding, None where there is none. Only a prompt can do without caches. compiled: layers are graphs, which share
        what does not differ between them."""
        self.caches = caches
        self.prefill = prefill
        self._columns = columns
        self._valid = valid
        self._tokens = columns.shape[1]
        self._compiled = compiled
        self._slots: Tensor | None = None
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._windows: dict[int, int] = {}
        self._started = _clock(columns.device)

    @property
    def columns(self) -> Tensor:
        """Columns of the sequence [B, M] that the current layer's slots stand for."""
        return self._columns if self.prefill is None else self.prefill.columns

    @property
    def valid(self) -> Tensor | None:
        """Validity [B, M] of the current layer's slots; None where all are."""
        if self.prefill is not None:
            return self.prefill.valid
        return None if self._valid is None else self._valid.gather(1, self._columns)

    def table(self, states: Tensor) -> Tensor:
        """A per-token tensor [B or 1, tokens, ...] as the current layer's slots need it; gathered once per table."""
        if self._slots is None:
            return states
        held = self._tables.get(id(states))
        if held is None or held[0] is not states:
            batch = self.columns.shape[0]
            rows = states if states.shape[0] == batch else states.expand(batch, *states.shape[1:])
            held = self._tables[id(states)] = (states, gather_tokens(rows, self.columns))
        return held[1]

    def enter(self, layer: int, attention: FlexASLAttention) -> LayerStep:
        """What the layer's attention needs; in a pass over cached tokens, room is made for the new ones."""
        window = attention.sliding_window
        keys = values = None
        if self.prefill is not None:
            slides = window is not None and window < self._tokens
            visible = self.prefill.visible if slides or self.prefill.valid is not None else None
        else:
            assert self.caches is not None
            cache = self.caches[layer]
            keys, values = cache.extend(self._columns, self.valid, self._tokens)
            visible = self._visible(cache, window is not None and window < cache.seen)
        if self._compiled and visible is not None:
            attention.prepare(visible, self.columns)
        return LayerStep(attention, visible, keys, values)

    def leave(self, layer: int, step: LayerStep, hidden: Tensor) -> Tensor:
        """The layer's output [B, M, C] as the next layer takes it [B, K, C]; remembers and scores a prompt's tokens."""
        slots = None
        if self.prefill is not None:
            assert step.new is not None
            query, key, value, sinks = step.new
            step.new = None
            if self.caches is not None:
                self.caches[layer].append(key, value, self.columns, self.valid, self._tokens)
            entries = self.prefill.observe(layer, query, key, step.attention, sinks)
            if self.caches is not None and entries is not None:
                self.caches[layer].keep(entries.slots, entries.valid)
            slots = self.prefill.advance()
        if self.caches is not None and step.attention.sliding_window is not None and self._tokens > 1:
            self._windows[layer] = step.attention.sliding_window
            _forget_old(self.caches[layer], step.attention.sliding_window)
        if slots is None:
            return hidden
        self._slots = slots
        self._tables.clear()
        return gather_tokens(hidden, slots)

    def finish(self, hidden: Tensor) -> Tensor:
        """Final states in the prompt's own shape [B, tokens, C]: dropped tokens, which have none, are NaN."""
        if self.prefill is None:
            return hidden
        dropped = self.prefill.dropped
        states = hidden if dropped is None else torch.where(dropped[..., None], float("nan"), hidden)
        if self._slots is None:
            return states
        full = hidden.new_full((hidden.shape[0], self._tokens, hidden.shape[2]), float("nan"))
        return full.scatter_(1, self.columns[..., None].expand_as(states), states)

    def close(self) -> None:
        """After the model has run, outside any graph: drops what was masked out from the caches."""
        if self.prefill is None:
            return
        kept = self.prefill.close()
        for layer, cache in enumerate(self.caches or ()):
            if layer in kept and cache.columns is not None:
                cache.retain(_look_up(kept[layer], cache.columns))

    def report(self, policy: Policy) -> Report:
        """What was decided and saved; call it once, after `close`."""
        prefill = self.prefill
        assert prefill is not None
        seconds = _clock(self._columns.device) - self._started
        caches = self.caches or []
        kept = [cache.keys.shape[2] for cache in caches if cache.keys is not None]
        used = sum(cache.nbytes for cache in caches)
        whole = [min(prefill.tokens, self._windows.get(layer, prefill.tokens + 1) - 1) for layer in range(len(kept))]
        full = sum(cache.nbytes // has * had for cache, has, had in zip(caches, kept, whole, strict=True))
        return Report(
            policy=policy.name,
            config=prefill.config.to_dict(),
            num_layers=prefill.num_layers,
            rows=tuple(_row_report(prefill, row) for row in range(len(prefill.lengths))),
            kv_tokens=tuple(kept),
            kv_bytes=used,
            kv_bytes_full=full,
            prefill_seconds=seconds,
        )

    def _visible(self, cache: LayerCache, slides: bool) -> Visibility | None:
        assert cache.columns is not None
        valid = cache.valid
        if self._valid is not None:
            current = _look_up(self._valid, cache.columns)
            valid = current if valid is None else valid & current
        if self._tokens == 1 and valid is None and not slides:
            return None
        return Visibility(self._columns, cache.columns, valid)


def _look_up(valid: Tensor, columns: Tensor) -> Tensor:
    if columns.dim() == 3:
        valid = valid[:, None].expand(-1, columns.shape[1], -1)
    return valid.gather(-1, columns)


def _forget_old(cache: LayerCache, sliding_window: int) -> None:
    """Drops the entries that no later token can see through the sliding window."""
    if cache.seen < sliding_window or cache.columns is None:
        return
    cache.uncroppable = cache.seen
    cache.retain(cache.columns > cache.seen - sliding_window)


def _row_report(prefill: Prefill, row: int) -> RowReport:
    made, trace = prefill.selections.get(row), prefill.selector.traces.get(row)
    return RowReport(
        prompt_tokens=prefill.lengths[row],
        kept_tokens=prefill.counts[row],
        selected_layer=None if made is None else made.layer,
        reason=prefill.reason(row),
        scored_layers=tuple(prefill.scored),
        eval_layers=tuple(trace.eval_layers) if trace else (),
        variance=tuple(trace.variance) if trace else (),
        variance_ratio=tuple(trace.variance_ratio) if trace else (),
        kept_positions=tuple(prefill.kept_positions(row).tolist()),
    )


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
