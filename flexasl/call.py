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
from flexasl.attention_spec import AttentionSpec
from flexasl.cache import SPARE, LayerCache
from flexasl.compiling import bare
from flexasl.entries import owned
from flexasl.errors import UnsupportedError
from flexasl.masks import SettledMask, Visibility
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
        window: int = 0,
        visible: Visibility | None = None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        settled: bool = False,
        reach: int | None = None,
        room: bool = True,
    ) -> None:
        """window: of how many last queries of each prompt tokens may be scored. settled: the sliding window has been
        seen to, by the reach and by visible."""
        self.attention = attention
        self._attends = attention.unwindowed if settled else attention
        self.packed = packed
        """A prompt's tokens; None in a pass that continues sequences, token by token or without pruning."""
        self.window = window
        self.last = None if packed is None else _tokens(packed).last(window)
        """Where the prompts' last tokens are, whose queries are left behind."""
        self.visible = visible
        self.keys = keys
        """[B, G, N, D]: the cache, with room for the new keys at its end, or, before a prompt, without. None before the
        first one."""
        self.values = values
        self.reach = reach
        """Where set, how many of the last keys a new token sees."""
        self.room = room
        """Whether there is room for new tokens; otherwise `update` makes larger tensors."""
        self.scored: tuple[Tensor, Tensor, Tensor | None] | None = None
        """A prompt's last queries, its keys, and sinks."""
        self.cached: tuple[Tensor, Tensor] | None = None
        """What the cache is to remember of a prompt."""

    def update(self, key: Tensor, value: Tensor, *ignored: object, **also: object) -> tuple[Tensor, Tensor]:
        """Takes the layer's new keys and values [B, G, M, D]; returns all that its queries may see [B, G, N, D]."""
        if self.packed is not None:
            key, value = self.cached = _alone(key), _alone(value)
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
        if self.reach is None:
            return self.keys, self.values
        first = self.keys.shape[2] - self.reach
        return self.keys[:, :, first:], self.values[:, :, first:]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        """query [B, H, M, D] over key, value [B, G, N, D] → [B, H, M, D]."""
        if self.packed is None:
            out: Tensor = self._attends.forward(query, key, value, self.visible, sinks=sinks)
            return out
        assert self.last is not None
        key = _alone(key)
        self.scored = (query.index_select(2, self.last), key, sinks)
        return self.packed.attend(self.attention, query, key, value, sinks)

    def in_groups(self, run: Callable[[slice], Tensor]) -> Tensor:
        """A layer's output [1, T, C] for packed prompts, some rows at a time: run(tokens) gives it for these tokens."""
        packed, outputs, scored, cached = self.packed, [], [], []
        assert isinstance(packed, Packed)
        for tokens, group in packed.groups():
            self.packed, self.last = group, group.last(self.window)
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
        self.blank = float("nan")
        """What `finish` puts in the place of dropped tokens. NaN there becomes the gradients of all weights after the
        last layer; to train, set 0, and call `blank_out` on what these weights make of it."""
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._masks: dict[int, Visibility] = {}
        self._new_valid = None if valid is None or prefill is not None else valid.gather(1, columns)
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
        if self.prefill is None and not self._compiled:
            return states
        for known, made in self._tables:
            if known is states:
                return made
        if self.prefill is not None:
            made = self._pack(states)
        else:
            made = states.expand(self.columns.shape[0], *states.shape[1:])
        if self._compiled:
            made = bare(made.contiguous())
        self._tables.append((states, made))
        return made

    def enter(self, layer: int, attention: FlexASLAttention) -> LayerStep:
        """What the layer's attention needs; in a pass over cached tokens, room is made for the new ones."""
        scored = 0 if self.prefill is None else self.prefill.config.window
        if self.prefill is not None and self._past == 0:
            return LayerStep(attention, packed=self.prefill.packed, window=scored)
        assert self.caches is not None
        window, cache = attention.sliding_window, self.caches[layer]
        if self.prefill is not None:
            assert cache.columns is not None
            valid = self._valid_entries(cache.columns, cache.valid)
            continued = Continued(self.prefill.packed, cache.columns, valid, self._past)
            return LayerStep(attention, packed=continued, window=scored, keys=cache.keys, values=cache.values)
        if self._tokens == 1 and self._valid is None and not attention.spec.needs_positions(cache.seen + 1):
            held = cache.tight
            if held is not None:  # the new token sees all of it, and joining tensors is all there is to do
                return LayerStep(attention, keys=held[0], values=held[1], room=False)
        settles = self._compiled and self._tokens == 1 and attention.kernel != "flex"
        keys, values = cache.extend(self.columns, self._new_valid, self._tokens, window, whole=settles)
        count = min(window, keys.shape[2]) if settles and window is not None else keys.shape[2]
        visible = self._visible(cache, count, attention.spec)
        if settles:
            return self._settled(attention, visible, keys, values, count)
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
            if step.room:
                self.caches[layer].settle(step.keys, step.values, self._tokens)
            else:
                self.caches[layer].take(step.keys, step.values)
        if self.caches is not None:
            self.caches[0].unfinished = True
            self._forget_old(layer, step.attention.sliding_window)
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
        """The last layer's output in the prompt's own shape [B, M, C]: 0 at padding, `blank` (NaN) at tokens that were
        dropped, which have none."""
        if self.prefill is None or self.prefill.packed.rows is not None:
            return hidden
        if self.prefill.dropped is not None:
            hidden = hidden.masked_fill(self.prefill.dropped[:, None], self.blank)
        return self._unpack(hidden, self.prefill.packed)

    def _unpack(self, hidden: Tensor, packed: Packed) -> Tensor:
        """States [1, T, C] of packed tokens in the prompt's own shape [B, M, C]: 0 at padding, `blank` at others."""
        assert self.prefill is not None
        batch = self.columns.shape[0]
        places = batch * self._tokens
        if packed.total == places:
            return hidden.reshape(batch, self._tokens, -1)
        full = hidden.new_full((places, hidden.shape[2]), self.blank)
        for row, length in enumerate(self.prefill.lengths):
            full[row * self._tokens : (row + 1) * self._tokens - length] = 0
        full.index_copy_(0, packed.flat(self._tokens), hidden[0])
        return full.view(batch, self._tokens, -1)

    def blank_out(self, states: Tensor, columns: slice | Tensor = slice(None)) -> None:
        """Writes NaN, at tokens that were dropped, into what was made of `finish`'s output, or of some of its columns:
        [B, columns, ...]."""
        if self.prefill is not None:
            gone = self.prefill.gone()
            if gone is not None:
                states.masked_fill_(gone[:, columns].view(*states.shape[:2], *[1] * (states.dim() - 2)), float("nan"))

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
        columns, whole = packed.columns[tokens] + self._past, not packed.gaps
        cache.append(keys, values, columns, real, self._tokens, aligned=whole)

    def close(self) -> None:
        """After the model has run, outside any graph: drops what was masked out from the caches."""
        if self.caches:
            self.caches[0].unfinished = False
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
        full = sum(
            cache.nbytes_unquantized // max(1, has) * had for cache, has, had in zip(caches, kept, whole, strict=True)
        )
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

    def _settled(
        self, attention: FlexASLAttention, visible: Visibility | None, keys: Tensor, values: Tensor, count: int
    ) -> LayerStep:
        """A step that is the same to a graph whatever lengths, sliding window and mask. count: of how many last keys
        visible is."""
        window = attention.sliding_window
        if visible is not None:
            mask = visible.whole_mask(attention.spec)
            visible = SettledMask(bare(mask.expand(-1, keys.shape[1], -1, -1).contiguous()))
        reach = None if window is None else count
        return LayerStep(attention, visible=visible, keys=bare(keys), values=bare(values), settled=True, reach=reach)

    def _visible(self, cache: LayerCache, count: int, spec: AttentionSpec) -> Visibility | None:
        """Who sees whom among the last `count` entries of a cache that has room for the new ones; None where one new
        token sees them all."""
        if cache.is_aligned(count) and (self._valid is not None or not cache.is_padded):
            return None if self._tokens == 1 and self._valid is None else self._aligned(cache, count)
        columns, valid = cache.marks(count)
        valid = self._valid_entries(columns, valid)
        if self._tokens == 1 and valid is None and not spec.needs_positions(cache.seen + self._tokens):
            return None
        return Visibility(self.columns, columns, valid)

    def _aligned(self, cache: LayerCache, count: int) -> Visibility:
        """Who sees whom where the entries are those of the last `count` columns: the same for all such layers."""
        made = self._masks.get(count)
        if made is None:
            stop = self._past + self._tokens
            at = torch.arange(stop - count, stop, dtype=torch.int64, device=self.columns.device)
            at = at.expand(self.columns.shape[0], -1)
            valid = None if self._valid is None else self._valid[:, stop - count :]
            known = cache.marks(count)[1]
            if valid is not None and known is not None:
                valid = valid & (known if known.dim() == 2 else known[:, 0])
            made = self._masks[count] = Visibility(self.columns, at, valid)
        return made

    def _valid_entries(self, columns: Tensor, valid: Tensor | None) -> Tensor | None:
        if self._valid is None:
            return valid
        current = _look_up(self._valid, columns)
        return current if valid is None else valid & current

    def _forget_old(self, layer: int, sliding_window: int | None) -> None:
        """Drops the entries that no later token can see through the sliding window; after a single token this waits
        until storage must grow."""
        if sliding_window is None or self._tokens == 1:
            return
        assert self.caches is not None
        cache = self.caches[layer]
        if not cache.record_past:
            self._windows[layer] = sliding_window
        cache.forget(sliding_window, 0 if self.prefill is not None else min(SPARE, sliding_window // 2))


def _alone(states: Tensor) -> Tensor:
    """A prompt's keys or values, which stay while the rest of the layer runs, without the queries that some models
    project into the same memory."""
    return states if torch.compiler.is_compiling() else owned(states)


def _tokens(packed: Packed | Continued) -> Packed:
    return packed.packed if isinstance(packed, Continued) else packed


def _look_up(valid: Tensor, columns: Tensor) -> Tensor:
    if columns.dim() == 3:
        valid = valid[:, None].expand(-1, columns.shape[1], -1)
    return valid.gather(-1, columns)


def _row_report(prefill: Prefill, row: int) -> RowReport:
    made, trace = prefill.selections.get(row), prefill.selector.traces.get(row)
    tokens, kept = prefill.lengths[row], prefill.counts[row]
    return RowReport(
        prompt_tokens=tokens,
        kept_tokens=kept,
        selected_layer=None if made is None else made.layer,
        reason=prefill.reason(row),
        scored_layers=tuple(prefill.scored),
        eval_layers=tuple(trace.eval_layers) if trace else (),
        variance=tuple(trace.variance) if trace else (),
        variance_ratio=tuple(trace.variance_ratio) if trace else (),
        kept_positions=range(tokens) if kept == tokens else tuple(prefill.kept_positions(row).tolist()),  # type: ignore[arg-type]
        layer_tokens=tuple(layer[row] for layer in prefill.ran),
        reread_layers=max((layer + 1 for layer, rows in prefill.reread.items() if row in rows), default=0),
    )


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
