"""New tokens that continue sequences: nothing is pruned, and caches grow.

Shapes: B batch, G KV heads, M new tokens, N keys, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention
from flexasl.attention_spec import AttentionSpec
from flexasl.cache import SPARE, LayerCache
from flexasl.compiling import bare
from flexasl.forward_pass import ForwardPass, still_valid
from flexasl.layer_step import LayerStep
from flexasl.masks import SettledMask, Visibility


class TokenPass(ForwardPass):
    """The pass over new tokens [B, M] after those that the caches hold."""

    caches: Sequence[LayerCache]

    def __init__(
        self, caches: Sequence[LayerCache], positions: Tensor, valid: Tensor | None, *, compiled: bool = False
    ) -> None:
        """valid [B, positions so far] bool is False at padding, None where there is none."""
        super().__init__(caches, positions, compiled=compiled)
        self._valid = valid
        self._new_valid = None if valid is None else valid.gather(1, positions)
        self._masks: dict[int, Visibility] = {}

    def before_layer(self, layer: int, attention: FlexASLAttention, hidden: Tensor) -> tuple[Tensor, LayerStep]:
        """Room is made in the layer's cache for the new tokens."""
        return hidden, self._step(layer, attention)

    def table(self, states: Tensor) -> Tensor:
        if not self._compiled:
            return states
        for known, made in self._tables:
            if known is states:
                return made
        made = bare(states.expand(self.positions.shape[0], *states.shape[1:]).contiguous())
        self._tables.append((states, made))
        return made

    def after_layer(self, layer: int, step: LayerStep, hidden: Tensor) -> Tensor:
        cache, window = self.caches[layer], step.module.sliding_window
        assert step.keys is not None and step.values is not None
        if step.room:
            cache.commit(step.keys, step.values, self._tokens)
        else:
            cache.take(step.keys, step.values)
        self.caches[0].unfinished = True
        if window is not None and self._tokens > 1:  # after a single token it waits until storage must grow
            cache.forget(window, min(SPARE, window // 2))
        return hidden

    def _step(self, layer: int, attention: FlexASLAttention) -> LayerStep:
        """That of new tokens over a cache."""
        window, cache = attention.sliding_window, self.caches[layer]
        if self._tokens == 1 and self._valid is None and not attention.spec.needs_positions(cache.seen + 1):
            held = cache.tight
            if held is not None:  # the new token sees all of it, and joining tensors is all there is to do
                return LayerStep(attention, keys=held[0], values=held[1], room=False)
        cut = self._compiled and self._tokens == 1 and attention.kernel != "flex"
        keys, values = cache.extend(self.positions, self._new_valid, self._tokens, window, whole=cut)
        count = min(window, keys.shape[2]) if cut and window is not None else keys.shape[2]
        visible = self._visible(cache, count, attention.spec)
        if not cut:
            if self._compiled and visible is not None:
                attention.prepare(visible, self.positions)
            return LayerStep(attention, visible=visible, keys=keys, values=values)
        # The same to a graph whatever lengths, sliding window and mask.
        if visible is not None:
            mask = visible.whole_mask(attention.spec)
            visible = SettledMask(bare(mask.expand(-1, keys.shape[1], -1, -1).contiguous()))
        reach = None if window is None else count
        return LayerStep(attention, visible=visible, keys=bare(keys), values=bare(values), cut=True, reach=reach)

    def _visible(self, cache: LayerCache, count: int, spec: AttentionSpec) -> Visibility | None:
        """Who sees whom among the last `count` entries of a cache that has room for the new ones; None where one new
        token sees them all."""
        if cache.is_aligned(count) and (self._valid is not None or not cache.is_padded):
            return None if self._tokens == 1 and self._valid is None else self._aligned(cache, count)
        positions, valid = cache.marks(count)
        valid = still_valid(self._valid, positions, valid)
        if self._tokens == 1 and valid is None and not spec.needs_positions(cache.seen + self._tokens):
            return None
        return Visibility(self.positions, positions, valid)

    def _aligned(self, cache: LayerCache, count: int) -> Visibility:
        """Who sees whom where the entries are those of the last `count` positions: the same for all such layers."""
        made = self._masks.get(count)
        if made is None:
            stop = self._past + self._tokens
            at = torch.arange(stop - count, stop, dtype=torch.int64, device=self.positions.device)
            at = at.expand(self.positions.shape[0], -1)
            valid = None if self._valid is None else self._valid[:, stop - count :]
            known = cache.marks(count)[1]
            if valid is not None and known is not None:
                valid = valid & (known if known.dim() == 2 else known[:, 0])
            made = self._masks[count] = Visibility(self.positions, at, valid)
        return made
