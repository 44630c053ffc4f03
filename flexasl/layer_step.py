"""What one layer's attention does in a forward pass.

Shapes: B batch, H query heads, G KV heads, M new tokens, N keys, T tokens of all prompts, K scored tokens, D head dim,
C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.attention import FlexASLAttention
from flexasl.entries import owned
from flexasl.masks import FixedMask, Visibility
from flexasl.rows import Rows
from flexasl.rows_attention import attend


class LayerStep:
    """What one layer's attention needs in this pass, and what it returns: tensors only, so that a compiler can
    take the layer as one graph."""

    def __init__(
        self,
        module: FlexASLAttention | None,
        *,
        rows: Rows | None = None,
        scored: int = 0,
        visible: Visibility | None = None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        cut: bool = False,
        reach: int | None = None,
        room: bool = True,
        lender: LayerStep | None = None,
    ) -> None:
        """module: None for a layer without attention. scored: of how many last tokens of each prompt, where the rows
        name no others, the queries are left behind; 0 for none. cut: reach and visible stand for the sliding window.
        lender: the step whose keys and values are used in place of own ones."""
        self.module = module
        self._attends = module.unwindowed if cut and module is not None else module
        self.rows = rows
        """A prompt's tokens; None in a pass that continues sequences, token by token or without pruning."""
        self._window = scored
        self._scored = rows.queries(scored) if rows is not None and scored else None
        self.visible = visible
        self.keys = keys
        """[B, G, N, D]: the cache, with room for the new keys at its end, or, before a prompt, without. None before the
        first one."""
        self.values = values
        self.reach = reach
        """Where set, how many of the last keys a new token attends to."""
        self.room = room
        """Whether there is room for new tokens; otherwise `update` makes larger tensors."""
        self._updated = False
        self.past = 0
        """Positions before the new tokens of a pass that continues sequences."""
        self.query: Tensor | None = None
        """A prompt's queries [1, H, K, D] of the scored tokens."""
        self.key: Tensor | None = None
        """A prompt's keys."""
        self.sinks: Tensor | None = None
        self.cached: tuple[Tensor, Tensor] | None = None
        """What the cache is to remember of a prompt."""
        self.lends = False
        """Whether later layers use its keys and values."""
        self._lender = lender
        self._lent: tuple[Tensor, Tensor] | None = None

    @property
    def borrows(self) -> bool:
        """Whether its keys and values are those of an earlier layer."""
        return self._lender is not None

    def attention(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        """The layer's attention, over its own tokens and over what the cache holds.

        Args:
            query: [B, H, M, D] of the layer's tokens, rotary applied.
            key: [B, G, M, D], likewise.
            value: [B, G, M, D].
            sinks: [H] logits of a key that is not a token. None: no such key.

        Returns:
            [B, H, M, D].
        """
        return self.attend(query, *self.update(key, value), sinks)

    def update(self, key: Tensor, value: Tensor, *ignored: object, **also: object) -> tuple[Tensor, Tensor]:
        """The first half of `attention`, as transformers' caches have it: takes new keys and values [B, G, M, D];
        returns all that the queries may see [B, G, N, D]."""
        if self.rows is not None:
            key, value = self.cached = _alone(key), _alone(value)
        if self.keys is None or self.values is None:
            return key, value
        own = value.shape[3]
        if self.rows is not None:
            return self.rows.join(self.keys, key), self.rows.join(self.values[..., :own], value)
        if not self.room:
            value = F.pad(value, (0, self.values.shape[3] - own)) if self.values.shape[3] > own else value
            self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
            self._updated = True
            return self.keys, self.values[..., :own]
        count = key.shape[2]
        self.keys[:, :, -count:] = key
        self.values[:, :, -count:, :own] = value
        if self.reach is None:
            return self.keys, self.values[..., :own]
        first = self.keys.shape[2] - self.reach
        return self.keys[:, :, first:], self.values[:, :, first:]

    def update_indexer(self, index_key: Tensor, *ignored: object) -> Tensor:
        """After `update`, in layers that choose by keys of another kind which keys a query attends to: takes the new
        ones [B, M, E]; returns all [B, N, E]. Caches have them beside the values of their tokens."""
        index_key = index_key[:, None]
        if self.rows is not None:
            assert self.cached is not None
            self.cached = self.cached[0], torch.cat([self.cached[1], index_key], 3)
            if self.values is None:
                return index_key[:, 0]
            return self.rows.join(self.values[..., -index_key.shape[3] :], index_key)[:, 0]
        if self.values is None:
            return index_key[:, 0]
        count, width = index_key.shape[2:]
        self.values[:, :, -count:, -width:] = index_key
        return self.values[:, 0, :, -width:]

    def get_seq_length(self, *ignored: object) -> Any:
        """What, added to a token's place among the layer's, is its position in the padded sequence, for layers that
        look at positions themselves: tensor [T] for prompts."""
        if self.rows is None:
            return self.past
        at, seen = self.rows.positions, 0 if self.rows.past is None else self.rows.past[2]
        return at + seen - torch.arange(len(at), dtype=torch.int64, device=at.device)

    def seen(self, batch: int, queries: int, device: torch.device) -> Tensor:
        """Who sees whom, bool [B or 1, 1, M, N], before or after `update`; of prompts one row."""
        assert self.module is not None
        visible = self.visible if self.rows is None else self.rows.visible(self.rows.parts[0])
        if visible is not None:
            return visible.whole_mask(self.module.spec)
        assert self.keys is not None  # a new token that sees all
        keys = self.keys.shape[2] + (0 if self.room or self._updated else queries)
        return torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The second half: query [B, H, M, D] over key, value [B, G, N, D] → [B, H, M, D]. A step with a lender takes
        that one's key and value, whatever is given. chosen: which keys [B, M, K] each query attends to, of those that
        it sees; None for all."""
        assert self.module is not None and self._attends is not None
        if self._lender is not None:
            assert self._lender._lent is not None
            key, value = self._lender._lent
            if self.rows is not None:
                return attend(self.rows, self.module, query, key, value, sinks)
        mask = None
        if chosen is not None and chosen.shape[2] < key.shape[2]:
            picked = chosen.new_zeros(*chosen.shape[:2], key.shape[2], dtype=torch.bool)
            picked = picked.scatter(2, chosen.long(), True)[:, None]
            mask = FixedMask(picked & self.seen(chosen.shape[0], chosen.shape[1], key.device))
        if self.rows is None:
            if self.lends:
                self._lent = key, value
            out: Tensor = self._attends.forward(query, key, value, mask or self.visible, sinks=sinks)
            return out
        self.key, self.sinks = _alone(key), sinks
        if self.lends:
            self._lent = self.key, value
        self.query = None if self._scored is None else query.index_select(2, self._scored)
        if mask is not None:
            return self.module(query, self.key, value, mask, sinks=sinks)
        return attend(self.rows, self.module, query, self.key, value, sinks)

    def in_groups(self, run: Callable[[slice], Tensor], *, alone: bool = False) -> Tensor:
        """A layer's output [1, T, C] for prompts, some rows at a time, or each alone: run(tokens) gives it for these
        tokens."""
        rows, scored, held, parts, first = self.rows, self._scored, (self.keys, self.values), [], 0
        assert rows is not None
        for tokens, group in rows.singles() if alone else rows.groups():
            self.rows, self._scored = group, None if scored is None else group.queries(self._window)
            stop = first + len(group.lengths)
            self.keys, self.values = (None if states is None else states[first:stop] for states in held)
            parts.append((run(tokens), self.query, self.key, self.cached))
            first = stop
        self.rows, self._scored, (self.keys, self.values) = rows, scored, held
        outputs, queries, keys, cached = zip(*parts)
        if self.key is None:  # a layer without attention
            return torch.cat(outputs, 1)
        self.query = None if scored is None else torch.cat(queries, 2)
        self.key = torch.cat(keys, 2)
        if self.cached is not None:
            new, values = zip(*cached)
            self.cached = self.key if new[0] is keys[0] else torch.cat(new, 2), torch.cat(values, 2)
            self._lent = self.cached if self.lends else None
        return torch.cat(outputs, 1)


def _alone(states: Tensor) -> Tensor:
    """A prompt's keys or values, which stay while the rest of the layer runs, without the queries that some models
    project into the same memory."""
    return states if torch.compiler.is_compiling() else owned(states)
