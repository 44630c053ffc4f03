"""One forward pass of a decoder: the glue between a framework's layers and the rooms below.

Shapes: B batch, H query heads, G KV heads, M new tokens, N keys, D head dim, K kept slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from flexasl.attention import attend
from flexasl.cache import LayerCache
from flexasl.masks import causal_mask
from flexasl.ops import gather_slots, kept_slots
from flexasl.policies import Policy
from flexasl.prefill import Prefill
from flexasl.report import Report, RowReport


class Call:
    """State of one forward pass, made anew for each, so that no prompt leaves a trace on the next.

    For each layer in turn: `incoming`, `append` to its cache (unless there is none), `attend`, then `leave` with the
    layer's output. With a `Prefill` the tokens are a prompt and may be pruned; without one they continue a sequence.
    """

    def __init__(
        self, caches: Sequence[LayerCache] | None, prefill: Prefill | None, columns: Tensor, valid: Tensor | None
    ) -> None:
        """columns [B, M] int64 are the new tokens' columns in the sequence; valid [B, columns so far] bool is False at
        padding, None where there is none."""
        self.caches = caches
        self.prefill = prefill
        self._columns = columns
        self._valid = valid
        self._tokens = columns.shape[1]
        self._slots: Tensor | None = None
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}
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
            held = self._tables[id(states)] = (states, gather_slots(states, self.columns))
        return held[1]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the layer's new keys and values [B, G, M, D]; returns all that it now has [B, G, N, D]."""
        assert self.caches is not None
        cache = self.caches[layer]
        cache.append(key, value, self.columns, self.valid, self._tokens)
        if self.prefill is not None:
            return key, value
        assert cache.keys is not None and cache.values is not None
        return cache.keys, cache.values

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """Attention of the layer's new tokens: query [B, H, M, D] over key, value [B, G, N, D] → [B, H, M, D]."""
        mask = self._mask(layer, query.shape[2], key.shape[2], sliding_window)
        causal = mask is None and query.shape[2] > 1
        out = attend(query, key, value, mask=mask, causal=causal, scale=scale)
        if self.prefill is not None:
            entries = self.prefill.observe(layer, query, key, scale=scale, sliding_window=sliding_window)
            if self.caches is not None and entries is not None:
                self.caches[layer].keep(entries.slots, entries.valid)
        if self.caches is not None and sliding_window is not None and query.shape[2] > 1:
            self._windows[layer] = sliding_window
            _forget_old(self.caches[layer], sliding_window)
        return out

    def leave(self, hidden: Tensor) -> Tensor:
        """The layer's output [B, M, C] as the next layer takes it [B, K, C]."""
        slots = None if self.prefill is None else self.prefill.advance()
        if slots is None:
            return hidden
        self._slots = slots
        self._tables.clear()
        self._masks.clear()
        return gather_slots(hidden, slots)

    def restore(self, hidden: Tensor) -> Tensor:
        """Final states in the prompt's own shape [B, tokens, C]: dropped tokens, which have none, are NaN."""
        if self._slots is None:
            return hidden
        full = hidden.new_full((hidden.shape[0], self._tokens, hidden.shape[2]), float("nan"))
        columns, states = self.columns, hidden
        if self.valid is not None:
            states = torch.where(self.valid[..., None], hidden, float("nan"))
        return full.scatter_(1, columns[..., None].expand_as(states), states)

    def report(self, policy: Policy) -> Report:
        """What was decided and saved; call it once, when the prompt's last layer has run."""
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

    def _mask(self, layer: int, queries: int, keys: int, sliding_window: int | None) -> Tensor | None:
        if self.prefill is not None:
            slides = sliding_window is not None and sliding_window < self._tokens
            if self.prefill.valid is None and not slides:
                return None
            made = self._masks.get((queries, sliding_window))
            if made is None:
                made = causal_mask(self.columns, self.columns, self.valid, sliding_window if slides else None)
                self._masks[queries, sliding_window] = made
            return made
        if self.caches is None:
            return None if queries == 1 else causal_mask(self.columns, self.columns, self.valid, sliding_window)
        cache = self.caches[layer]
        assert cache.columns is not None
        slides = sliding_window is not None and sliding_window < cache.seen
        valid = cache.valid
        if self._valid is not None:
            current = _look_up(self._valid, cache.columns)
            valid = current if valid is None else valid & current
        if queries == 1 and valid is None and not slides:
            return None
        return causal_mask(self.columns, cache.columns, valid, sliding_window if slides else None)


def _look_up(valid: Tensor, columns: Tensor) -> Tensor:
    if columns.dim() == 3:
        valid = valid[:, None].expand(-1, columns.shape[1], -1)
    return valid.gather(-1, columns)


def _forget_old(cache: LayerCache, sliding_window: int) -> None:
    """Drops the entries that no later token can see through the sliding window."""
    assert cache.keys is not None and cache.columns is not None
    if cache.seen < sliding_window:
        return
    cache.uncroppable = cache.seen
    keep = cache.columns > cache.seen - sliding_window
    if cache.valid is not None:
        keep = keep & cache.valid
    if keep.dim() == 2:
        keep = keep[:, None].expand(-1, cache.keys.shape[1], -1)
    counts = keep.sum(-1)
    most, least = int(counts.max()), int(counts.min())
    slots, valid = kept_slots(keep, most)
    cache.keep(slots, None if most == least else valid)


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
