"""Who may attend to whom, from positions and validity.

Shapes: B batch, G KV heads, H query heads, M queries, N keys, T tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexasl.attention_spec import AttentionSpec, within

BLOCK = 128
"""Tokens per side of a block of a `BlockMask`."""


class Visibility:
    """Which keys each query attends to: those at its own position or before it, inside the sliding window, and valid.

    query_positions [B, M] int; key_positions [B, N] int, or [B, G, N] where KV heads differ; key_valid bool like
    key_positions, False at padding, None where there is none. Only differences between positions count. The
    M queries are the last M keys, in ascending order, and each attends to itself even where it is not valid, so that no
    row of the softmax is empty; with M = N all keys must ascend. A mask is built once per sliding window, for all
    layers.

    query_at [M] int64: which keys are the queries', ascending, where these are not the last ones. first_seen [B, M]
    int: the first position that a query may attend to, as in one sequence of several prompts. last_seen [B, M] int:
    the last one, where that is after its own, as for the tokens of an image that attend to each other; by at most so
    many tokens `ahead`.
    """

    ahead = 0

    def __init__(
        self,
        query_positions: Tensor,
        key_positions: Tensor,
        key_valid: Tensor | None = None,
        *,
        query_at: Tensor | None = None,
        first_seen: Tensor | None = None,
        last_seen: Tensor | None = None,
        ahead: int = 0,
    ) -> None:
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.key_valid = key_valid
        self.query_at = query_at
        self.first_seen = first_seen
        self.last_seen = query_positions if last_seen is None else last_seen
        self.ahead = ahead
        self._dense: dict[int | None, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._chunked: dict[int, Visibility] = {}
        self._blocks: dict[tuple[int | None, int], BlockMask] = {}

    @classmethod
    def last(cls, queries: int, keys: int, device: torch.device | str = "cpu") -> Visibility:
        """Visibility without padding or gaps: the queries are the last of so many keys."""
        at = torch.arange(keys, dtype=torch.int64, device=device)[None]
        return cls(at[:, keys - queries :], at)

    def in_chunks(self, size: int) -> Visibility:
        """The same, where a query sees nothing before its own chunk of so many positions."""
        made = self._chunked.get(size)
        if made is None:
            base = 0 if self.first_seen is None else self.first_seen
            first = base + (self.query_positions - base) // size * size
            further: Any = {"query_at": self.query_at, "last_seen": self.last_seen, "ahead": self.ahead}
            made = Visibility(self.query_positions, self.key_positions, self.key_valid, first_seen=first, **further)
            self._chunked[size] = made
        return made

    def dense(self, sliding_window: int | None = None) -> Tensor:
        """bool [B, 1 or G, M, N], True where a query attends to a key."""
        made = self._dense.get(sliding_window)
        if made is None:
            made = self._dense[sliding_window] = self.tile(slice(None), slice(None), sliding_window)
        return made

    def tile(self, queries: slice, keys: slice, sliding_window: int | None = None) -> Tensor:
        """`dense` for some queries and the keys that these need, not stored."""
        query = self.query_positions[:, None, queries, None]
        key = _by_head(self.key_positions)[:, :, None, keys]
        allowed = key <= self.last_seen[:, None, queries, None]
        if sliding_window is not None:
            allowed = allowed & within(query, key, sliding_window)
        if self.first_seen is not None:
            allowed = allowed & (key >= self.first_seen[:, None, queries, None])
        if self.key_valid is None:
            return allowed
        allowed = allowed & _by_head(self.key_valid)[:, :, None, keys]
        at = torch.arange(self.key_positions.shape[-1], dtype=torch.int64, device=self.key_positions.device)
        return allowed | (self._own[queries, None] == at[keys])

    def mask(self, spec: AttentionSpec, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """What queries see of keys under a specification, [B, 1 or G, M, N], not stored."""
        made = spec.mask(self.query_positions[:, queries], self.key_positions[..., keys], self.tile(queries, keys))
        assert made is not None
        return made

    @property
    def _own(self) -> Tensor:
        """Which keys are the queries' own: [M] int64."""
        if self.query_at is not None:
            return self.query_at
        queries, keys = self.query_positions.shape[1], self.key_positions.shape[-1]
        return torch.arange(keys - queries, keys, dtype=torch.int64, device=self.key_positions.device)

    def whole_mask(self, spec: AttentionSpec) -> Tensor:
        """`mask` of all queries and keys, made once."""
        made = self._whole.get(spec.text)
        if made is None:
            made = self._whole[spec.text] = self.mask(spec)
        return made

    def block_mask(self, sliding_window: int | None = None, heads: int = 1) -> BlockMask:
        """The same for `flex_attention`; heads is H, and matters where KV heads differ.

        Block lists come from the first and last position of each block, without an M x N mask. All that they leave out
        `mask_mod` leaves out too, because uncompiled flex_attention does not read them. For a single query they leave
        out the padding before each row.
        """
        heads = 1 if self.key_positions.dim() == 2 else heads
        made = self._blocks.get((sliding_window, heads))
        if made is None:
            make = self._make_blocks if self.query_positions.shape[1] > 1 else self._make_row_ends
            made = self._blocks[sliding_window, heads] = make(sliding_window, heads)
        return made

    def _make_row_ends(self, sliding_window: int | None, heads: int) -> BlockMask:
        """The blocks that a new token needs of each row: those from its first visible key on."""
        seen = self.dense(sliding_window)[:, :, 0]
        rows, groups, keys = seen.shape
        blocks, device = -(-keys // BLOCK), seen.device
        first = seen.any(1).to(torch.uint8).argmax(-1, keepdim=True) // BLOCK
        at = torch.arange(blocks, dtype=torch.int64, device=device)
        listed = (first + at).clamp(max=blocks - 1).int()[:, None, None].contiguous()
        flat = seen.flatten().clone()
        row_step = torch.full((), groups * keys if rows > 1 else 0, dtype=torch.int64, device=device)
        heads_at = None
        if groups > 1:
            first_keys = torch.arange(0, groups * keys, keys, dtype=torch.int64, device=device)
            heads_at = first_keys.repeat_interleave(heads // groups, output_size=heads)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at = b * row_step + k
            return flat[at if heads_at is None else at + heads_at[h]]

        return BlockMask.from_kv_blocks(
            (blocks - first).int()[:, None].contiguous(),
            listed,
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(1, keys),
            compute_q_blocks=torch.is_grad_enabled(),
        )

    def _make_blocks(self, sliding_window: int | None, heads: int) -> BlockMask:
        key = _by_head(self.key_positions)
        valid = torch.ones_like(key, dtype=torch.bool) if self.key_valid is None else _by_head(self.key_valid)
        key, valid = torch.broadcast_tensors(key, valid)  # rows may share positions and differ in what is valid
        queries, keys = self.query_positions.shape[1], key.shape[2]
        at = torch.arange(queries, dtype=torch.int64, device=key.device)
        highest = torch.iinfo(key.dtype).max
        lowest = torch.iinfo(key.dtype).min
        # Heads share their block lists: a block is worth computing where any head sees a pair of it.
        first = _blocks(key.masked_fill(~valid, highest), highest).amin(-1).amin(1)[:, None]
        last = _blocks(key.masked_fill(~valid, lowest), lowest).amax(-1).amax(1)[:, None]
        whole = _blocks(valid, False).all(-1).all(1)[:, None]
        earliest = _blocks(self.query_positions, highest).amin(-1)[:, :, None]
        latest = _blocks(self.query_positions, lowest).amax(-1)[:, :, None]
        some = first <= _blocks(self.last_seen, lowest).amax(-1)[:, :, None]
        full = whole & (last <= _blocks(self.last_seen, highest).amin(-1)[:, :, None])
        if sliding_window is not None:
            # Guarded by `some`, whose blocks hold real positions, so that nothing overflows.
            oldest = earliest - sliding_window
            some = some & (last > oldest)
            full = full & (first > latest - sliding_window)
        if self.first_seen is not None:
            some = some & (last >= _blocks(self.first_seen, highest).amin(-1)[:, :, None])
            full = full & (first >= _blocks(self.first_seen, lowest).amax(-1)[:, :, None])
        # The diagonal, on which every query sees itself.
        diagonal = torch.zeros(some.shape[1:], dtype=torch.bool, device=key.device)
        diagonal[at // BLOCK, self._own // BLOCK] = True
        full = full & _covered(queries, self.query_positions.device)[None, :, None]
        return BlockMask.from_kv_blocks(
            *_listed((some | diagonal) & ~full),
            *_listed(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=self._mask_mod(sliding_window, heads, key, valid),
            seq_lengths=(queries, keys),
            # For gradients alone; inside an op of a graph torch cannot make them.
            compute_q_blocks=torch.is_grad_enabled(),
        )

    def _mask_mod(self, sliding_window: int | None, heads: int, key: Tensor, valid: Tensor) -> Any:
        """One function for all masks, whose differences are in the tensors that it captures, so that a compiler makes
        no graph for each. Tensors only: flex_attention on CPU does not compile with an int that dynamo made dynamic."""
        (rows, queries), (_, groups, keys), device = self.query_positions.shape, key.shape, key.device
        # Copies, because a compiler makes other graphs for views.
        query, ends, seen, real = (
            states.flatten().clone() for states in (self.query_positions, self.last_seen, key, valid)
        )
        lowest = torch.iinfo(query.dtype).min
        oldest = torch.full_like(query, lowest) if sliding_window is None else query - sliding_window
        oldest = oldest if self.first_seen is None else torch.maximum(oldest, self.first_seen.flatten() - 1)
        own = self._own.clone()
        heads_at = None
        if groups > 1:
            first_keys = torch.arange(0, groups * keys, keys, dtype=torch.int64, device=device)
            heads_at = first_keys.repeat_interleave(heads // groups, output_size=heads)
        query_step = torch.full((), queries if rows > 1 else 0, dtype=torch.int64, device=device)
        key_step = torch.full((), groups * keys if key.shape[0] > 1 else 0, dtype=torch.int64, device=device)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            mine, at = b * query_step + q, b * key_step + k
            if heads_at is not None:
                at = at + heads_at[h]
            return ((seen[at] <= ends[mine]) & (seen[at] > oldest[mine]) & real[at]) | (own[q] == k)

        return sees


class FixedMask(Visibility):
    """One bool mask [B, 1 or G, M, N], sliding window included, which a graph takes as the tensor that it is."""

    key_valid = first_seen = None

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def dense(self, sliding_window: int | None = None) -> Tensor:
        return self._mask

    def tile(self, queries: slice, keys: slice, sliding_window: int | None = None) -> Tensor:
        return self._mask[:, :, queries, keys]

    def mask(self, spec: AttentionSpec, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        return self.tile(queries, keys)


def _by_head(states: Tensor) -> Tensor:
    return states[:, None] if states.dim() == 2 else states


def _blocks(states: Tensor, rest: int | bool) -> Tensor:
    """[..., N] in blocks [..., N / T, T], the last one filled up with `rest`."""
    missing = -states.shape[-1] % BLOCK
    if missing:
        filler = states.new_full((*states.shape[:-1], missing), rest)
        states = torch.cat([states, filler], -1)
    return states.unflatten(-1, (-1, BLOCK))


def _covered(queries: int, device: torch.device) -> Tensor:
    """Whether each block of queries has all its queries."""
    blocks = -(-queries // BLOCK)
    return (torch.arange(1, blocks + 1, dtype=torch.int64, device=device) * BLOCK) <= queries


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """A `BlockMask`'s counts [B, 1, M / T] and indices [B, 1, M / T, N / T] of the blocks wanted [B, M / T, N / T]."""
    counts = wanted.sum(-1, dtype=torch.int32)[:, None]
    indices = wanted.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]
    return counts.contiguous(), indices.contiguous()
