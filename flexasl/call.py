"""One forward pass of a decoder: the glue between a framework's layers and the rooms below.

Shapes: B batch, H query heads, G KV heads, M new tokens, N keys, T tokens of all prompts at the current layer,
D head dim, C width of hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.errors import UnsupportedError
from flexasl.masks import Visibility
from flexasl.ops import compact_kv, gather_tokens
from flexasl.packing import Continued, Packed
from flexasl.policies import Policy
from flexasl.prefill import Entries, Prefill
from flexasl.report import Report, RowReport


class LayerStep:
    """What one layer's attention needs in this pass, and what it leaves behind: tensors only, so that a compiler can
    take the layer as one graph.

    Give it the new keys and values with `update`, then attend with what that returns.
    """

    def __init__(
        self,
        attention: FlexASLAttention,
        *,
        packed: Packed | Continued | None = None,
        visible: Visibility | None = None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        room: bool = True,
    ) -> None:
        self.attention = attention
        self.packed = packed
        """A prompt's tokens; None in a pass that continues sequences, token by token or without pruning."""
        self.visible = visible
        self.keys = keys
        """[B, G, N, D]: the cache, with room for the new keys at its end, or, before a prompt, without. None before the
        first one."""
        self.values = values
        self.room = room
        """Whether there is room for new tokens; otherwise `update` makes larger tensors."""
        self.scored: tuple[Tensor, Tensor, Tensor | None] | None = None
        """A prompt's queries, keys and sinks."""
        self.cached: tuple[Tensor, Tensor] | None = None
        """What the cache is to remember of a prompt."""

    def update(self, key: Tensor, value: Tensor, *ignored: object, **also: object) -> tuple[Tensor, Tensor]:
        """Takes the layer's new keys and values [B, G, M, D]; returns all that its queries may see [B, G, N, D]."""
        if self.packed is not None:
            self.cached = (key, value)
        if self.keys is None or self.values is None:
            return key, value
        if isinstance(self.packed, Continued):
            return self.packed.join(self.keys, key), self.packed.join(self.values, value)
        if not self.room:
            self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
            return self.keys, self.values
        count = key.shape[2]
        self.keys[:, :, -count:] = key
        self.values[:, :, -count:] = value
        return self.keys, self.values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        """query [B, H, M, D] over key, value [B, G, N, D] → [B, H, M, D]."""
        if self.packed is None:
            out: Tensor = self.attention.forward(query, key, value, self.visible, sinks=sinks)
            return out
        self.scored = (query, key, sinks)
        return self.packed.attend(self.attention, query, key, value, sinks)

    def in_groups(self, run: Callable[[slice], Tensor]) -> Tensor:
        """A layer's output [1, T, C] for packed prompts, some rows at a time: run(tokens) gives it for these tokens."""
        packed, outputs, scored, cached = self.packed, [], [], []
        assert isinstance(packed, Packed)
        for tokens, group in packed.groups():
            self.packed = group
            outputs.append(run(tokens))
            assert self.scored is not None
            scored.append(self.scored)
            cached.append(self.cached)
        self.packed = packed
        queries, keys, sinks = zip(*scored)
        self.scored = torch.cat(queries, 2), torch.cat(keys, 2), sinks[0]
        if self.cached is not None:
            new, values = zip(*cached)
            self.cached = self.scored[1] if new[0] is keys[0] else torch.cat(new, 2), torch.cat(values, 2)
        return torch.cat(outputs, 1)


class Call:
    """State of one forward pass, made anew for each, so that no prompt leaves a trace on the next.

    `start` with the hidden states; for each layer in turn: `enter`, run the layer on `table` of its per-token inputs
    and on the step that `enter` gave, then `leave` with its output; in the end `finish`, and `close` once the model has
    run. With a `Prefill` the tokens are prompts, which may be pruned, and layers see them as one row without padding;
    without one they continue sequences.
    """

    def __init__(
        self,
        caches: Sequence[LayerCache] | None,
        prefill: Prefill | None,
        columns: Tensor,
        valid: Tensor | None,
        *,
        compiled: bool = False,
        rerun: Callable[[Call, int], Tensor] | None = None,
        unpacks: bool = False,
    ) -> None:
        """columns [B, M] int64 are the new tokens' columns in the sequence; valid [B, columns so far] bool is False at
        padding, None where there is none. Only a prompt can do without caches; with a `Prefill` and caches that hold
        something it is a later turn, which is pruned like a prompt. compiled: layers are graphs, which share what does
        not differ between them. rerun(call, layer) runs the model's layers from the first to this one under another
        call, and returns the last output; policies with a second pass need it. unpacks: as long as no token was
        dropped, layers give their outputs in the prompt's own shape, and take these by `start`."""
        again = prefill is not None and prefill.packed.rows is not None
        if prefill is not None and prefill.policy.second_pass and rerun is None and not again:
            raise UnsupportedError(
                f"policy {prefill.policy.name!r} reads tokens twice, which this model's adapter cannot do; "
                "give a policy of one pass, such as 'asl'"
            )
        self._past = 0 if not caches else caches[0].seen
        if prefill is not None and self._past == 0:
            for cache in caches or ():
                cache.begin(prefill.config.kv_dtype)
        self.caches = caches
        self.prefill = prefill
        self.columns = columns
        self._valid = valid
        self._tokens = columns.shape[1]
        self._compiled = compiled
        self._unpacks = unpacks
        self.unpacked = True
        """Whether hidden states have the model's own shape [B, M, C] now, and are to be given to `start`."""
        self.rerun = rerun
        self.step: LayerStep | None = None
        """That of the layer that runs, for adapters whose layers take one object all the way down to attention."""
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._windows: dict[int, int] = {}
        self._started = 0.0 if prefill is None else _clock(columns.device)

    def start(self, hidden: Tensor) -> Tensor:
        """The first layer's input [B, M, C] as the layers take it: prompts as [1, T, C]. Raises `UnsupportedError`
        where others have changed its shape."""
        if self.prefill is None:
            return hidden
        if hidden.shape[:2] != self.columns.shape:
            raise UnsupportedError(
                f"hidden states are {list(hidden.shape)} where {list(self.columns.shape)} tokens came in; a hook on a "
                "patched model must leave their number as it is"
            )
        self.unpacked = False
        return self._pack(hidden)

    def table(self, states: Tensor) -> Tensor:
        """A per-token tensor [B or 1, M, ...] as the current layer's tokens need it; made once per table."""
        if self.prefill is None:
            return states
        for known, made in self._tables:
            if known is states:
                return made
        made = self._pack(states)
        self._tables.append((states, made))
        return made

    def enter(self, layer: int, attention: FlexASLAttention) -> LayerStep:
        """What the layer's attention needs; in a pass over cached tokens, room is made for the new ones."""
        if self.prefill is not None and self._past == 0:
            return LayerStep(attention, packed=self.prefill.packed)
        assert self.caches is not None
        window, cache = attention.sliding_window, self.caches[layer]
        if self.prefill is not None:
            continued = Continued(self.prefill.packed, cache.columns, self._valid_entries(cache), self._past)  # type: ignore[arg-type]
            return LayerStep(attention, packed=continued, keys=cache.keys, values=cache.values)
        if self._tokens == 1 and self._valid is None and (window is None or cache.seen < window):
            held = cache.tight
            if held is not None:  # the new token sees all of it, and joining tensors is all there is to do
                return LayerStep(attention, keys=held[0], values=held[1], room=False)
        new = None if self._valid is None else self._valid.gather(1, self.columns)
        keys, values = cache.extend(self.columns, new, self._tokens)
        visible = self._visible(cache, window is not None and window < cache.seen)
        if self._compiled and visible is not None:
            attention.prepare(visible, self.columns)
        return LayerStep(attention, visible=visible, keys=keys, values=values)

    def leave(self, layer: int, step: LayerStep, hidden: Tensor) -> Tensor:
        """The layer's output as the next layer takes it; remembers and scores a prompt's tokens, and may drop some."""
        tokens, prefill = None, self.prefill
        if prefill is not None:
            assert step.scored is not None
            (query, key, sinks), cached = step.scored, step.cached
            step.scored = step.cached = None
            groups = None if cached is None else cached[0].shape[1]
            entries = prefill.observe(layer, query, key, step.attention, sinks, groups=groups, packed=step.packed)
            if self.caches is not None and cached is not None:
                self._remember(self.caches[layer], *cached, entries)
            fresh, before = prefill.fresh, prefill.packed
            tokens = prefill.advance()
        elif self.caches is not None:
            assert step.keys is not None and step.values is not None
            if not step.room:
                self.caches[layer].take(step.keys, step.values)
                return hidden
            self.caches[layer].settle(step.keys, step.values, self._tokens)
        if self.caches is not None and step.attention.sliding_window is not None and self._tokens > 1:
            self._windows[layer] = step.attention.sliding_window
            _forget_old(self.caches[layer], step.attention.sliding_window)
        if tokens is not None:
            self._tables.clear()
        if prefill is not None and self._unpacks and not before.gaps and layer + 1 < prefill.num_layers:
            self.unpacked = True
            return self._unpack(hidden, before)
        if tokens is None:
            return hidden
        hidden = gather_tokens(hidden, tokens[None])
        return self._read_again(layer, fresh, hidden) if self.rerun is not None else hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """The last layer's output in the prompt's own shape [B, M, C]: 0 at padding, NaN at tokens that were dropped,
        which have none."""
        if self.prefill is None or self.prefill.packed.rows is not None:
            return hidden
        if self.prefill.dropped is not None:
            hidden = hidden.masked_fill(self.prefill.dropped[:, None], float("nan"))
        return self._unpack(hidden, self.prefill.packed)

    def _unpack(self, hidden: Tensor, packed: Packed) -> Tensor:
        """States [1, T, C] of packed tokens in the prompt's own shape [B, M, C]: 0 at padding, NaN at other tokens."""
        assert self.prefill is not None
        batch = self.columns.shape[0]
        places = batch * self._tokens
        if packed.total == places:
            return hidden.reshape(batch, self._tokens, -1)
        full = hidden.new_full((places, hidden.shape[2]), float("nan"))
        for row, length in enumerate(self.prefill.lengths):
            full[row * self._tokens : (row + 1) * self._tokens - length] = 0
        full.index_copy_(0, packed.flat(self._tokens), hidden[0])
        return full.view(batch, self._tokens, -1)

    def _read_again(self, layer: int, rows: list[int], hidden: Tensor) -> Tensor:
        """The output [1, T, C] of this layer, for which these rows' tokens have been read as if they were the prompt.
        Caches up to here forget what was read of these rows before."""
        assert self.prefill is not None and self.rerun is not None
        prefill = self.prefill.again(rows)
        caches = None if self.caches is None else [LayerCache(cache.slack) for cache in self.caches[: layer + 1]]
        states = self.rerun(Call(caches, prefill, self.columns, None, compiled=self._compiled), layer)
        for mine, own in zip(self.caches or (), caches or ()):
            mine.replace_rows(rows, own)
        self.prefill.reread[layer] = rows
        packed = self.prefill.packed
        parts, new = list(hidden[0].split(packed.lengths)), states[0].split(prefill.packed.lengths)
        for row, part in zip(rows, new, strict=True):
            parts[row] = part
        return torch.cat(parts)[None]

    def _pack(self, states: Tensor) -> Tensor:
        """A per-token tensor [B or 1, M, ...] of the prompts as [1, T, ...]."""
        assert self.prefill is not None
        packed, batch = self.prefill.packed, self.columns.shape[0]
        if states.shape[0] == 1 and batch > 1:
            return gather_tokens(states, packed.columns[None])
        states = states.reshape(1, -1, *states.shape[2:])
        if packed.total == states.shape[1] and packed.rows is None:
            return states
        return gather_tokens(states, packed.flat(self._tokens)[None])

    def _remember(self, cache: LayerCache, keys: Tensor, values: Tensor, entries: Entries | None) -> None:
        """A prompt's keys and values [1, G, T, D], all of them or those entries."""
        assert self.prefill is not None
        packed = self.prefill.packed
        if entries is not None:
            keys, values = compact_kv(keys, values, entries.tokens)
            columns = packed.columns[entries.tokens] + self._past
            cache.append(keys, values, columns, entries.valid, self._tokens)
            return
        tokens, real = packed.as_batch()
        if real is None:
            run = packed.runs()[0]
            keys, values = run.of(keys, 2), run.of(values, 2)
        else:
            keys, values = compact_kv(keys, values, tokens[:, None].expand(-1, keys.shape[1], -1))
        cache.append(keys, values, packed.columns[tokens] + self._past, real, self._tokens)

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
        seconds = _clock(self.columns.device) - self._started
        caches = self.caches or []
        kept = [cache.columns.shape[-1] for cache in caches if cache.columns is not None]
        used = sum(cache.nbytes for cache in caches)
        whole = [min(cache.seen, self._windows.get(layer, cache.seen + 1) - 1) for layer, cache in enumerate(caches)]
        full = sum(cache.nbytes_unquantized // has * had for cache, has, had in zip(caches, kept, whole, strict=True))
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
        valid = self._valid_entries(cache)
        if self._tokens == 1 and valid is None and not slides:
            return None
        return Visibility(self.columns, cache.columns, valid)

    def _valid_entries(self, cache: LayerCache) -> Tensor | None:
        assert cache.columns is not None
        if self._valid is None:
            return cache.valid
        current = _look_up(self._valid, cache.columns)
        return current if cache.valid is None else cache.valid & current


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
        layer_tokens=tuple(layer[row] for layer in prefill.ran),
        reread_layers=max((layer + 1 for layer, rows in prefill.reread.items() if row in rows), default=0),
    )


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
