"""One batch of prompts on its way through the layers: what every integration and `replay` share.

Shapes: B batch, H query heads, G KV heads, N prompt columns (padding on the left), M slots of the current layer,
W window, P = M - W prefix slots, K kept slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention, Scoring
from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.masks import Visibility
from flexasl.ops import gather_tokens, kept_slots, top_k_entries, top_p_entries
from flexasl.policies.base import Policy
from flexasl.selector import LayerSelector, Selection

Observer = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Entries:
    """Cache entries that one layer keeps: slots [B, G, K] int64, ascending; valid [B, G, K] bool, or None for all."""

    slots: Tensor
    valid: Tensor | None


class Prefill:
    """The tokens that a batch of prompts still has at each layer, and what each layer's attention changes about that.

    At every layer call `observe` with the layer's queries and keys, then, once the layer has run, `advance`; after the
    last one `close`. With `propagate="mask"` nothing before `close` waits for the device or depends on what was
    decided, so that a compiler can take all layers as one graph.
    """

    def __init__(
        self,
        policy: Policy,
        config: ASLConfig,
        num_layers: int,
        lengths: Sequence[int],
        *,
        tokens: int | None = None,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
    ) -> None:
        """config is resolved by the policy; lengths are each row's real tokens, at the right end of `tokens` columns.

        observer(layer, scores [B, G, P]), where given, sees the pooled scores of every layer, and the rule then also
        runs in rows that are too short to lose a token.
        """
        self.policy = policy
        self.config = config
        self.num_layers = num_layers
        self.lengths = list(lengths)
        self.tokens = max(self.lengths) if tokens is None else tokens
        self.counts = list(lengths)
        self.device = torch.device(device)
        columns = torch.arange(self.tokens, device=self.device)
        starts = torch.tensor([self.tokens - n for n in self.lengths], device=self.device)
        self.columns = columns.expand(len(self.lengths), -1)
        """[B, M] int64: the prompt column of each slot."""
        self.valid = None if min(self.lengths) == self.tokens else columns >= starts[:, None]
        """[B, M] bool: False at padding; None where there is none."""
        self.selections: dict[int, Selection] = {}
        self.scored: list[int] = []
        self._observer = observer
        self._fresh: list[Selection] = []
        self._visible: Visibility | None = None
        self._masks = config.propagate == "mask"
        self._stays: Tensor | None = None
        self._chosen = torch.full((len(self.lengths),), -1, device=self.device)
        self.selector = LayerSelector(
            config, self.lengths, tokens=self.tokens, rows=self._open_rows(), device=self.device
        )

    @property
    def width(self) -> int:
        """Slots M of the current layer."""
        return self.columns.shape[1]

    @property
    def visible(self) -> Visibility:
        """Who sees whom among the slots of the current layer."""
        if self._visible is None:
            self._visible = Visibility(self.columns, self.columns, self.valid)
        return self._visible

    def observe(
        self, layer: int, query: Tensor, key: Tensor, attention: FlexASLAttention, sinks: Tensor | None = None
    ) -> Entries | None:
        """Scores the layer's tokens where a decision needs it: query [B, H, at least W, D], of which the last W count,
        key [B, G, M, D], both after rotary.

        Returns the cache entries to keep, or None for all.
        """
        decides, compresses = self.selector.needs(layer), self._over_budget()
        if self.width <= self.config.window or not (decides or compresses or self._observer):
            return None
        rows = self.selector.rows
        alone = not (compresses or self._observer) and len(rows) < len(self.lengths)
        subset = torch.tensor(rows, device=self.device) if alone else slice(None)
        states = (query[subset, :, -self.config.window :], key[subset])
        scoring = Scoring(self.config.window, self.config.kernel_size, self.config.pooling)
        view: dict[str, Any] = {
            "valid": None if self.valid is None else self.valid[subset],
            "positions": self.columns[subset],
            "sinks": sinks,
        }
        scores = attention.scores(*states, scoring, **view)
        self.scored.append(layer)
        if self._observer is not None:
            self._observer(layer, scores)
        if decides:
            token_scores = scores.sum(1) if alone or len(rows) == len(self.lengths) else scores[rows].sum(1)
            settled = self.selector.observe(layer, token_scores)
            if self._masks:
                self._mask_out(layer, settled)
            else:
                self._fresh = self.selector.select(layer, settled)
                self.selections.update((made.row, made) for made in self._fresh)
        if not compresses:
            return None
        share = None
        if self.config.kv_top_p is not None:
            queries = query.shape[1] // key.shape[1] * self.config.window
            share = attention.scores(*states, scoring, **view, whole=True) / queries
        return self._entries(scores, share)

    def advance(self) -> Tensor | None:
        """After a layer: the slots [B, K] int64 that go on to the next one, or None where all do."""
        if self._stays is not None:
            self.valid, self._stays, self._visible = self._stays, None, None
        if not self._fresh:
            return None
        keep = self.columns.new_ones(self.columns.shape, dtype=torch.bool) if self.valid is None else self.valid.clone()
        for made in self._fresh:
            keep[made.row] = made.keep[self.tokens - self.width :]
            self._count(made.row)
        self._fresh = []
        slots, valid = kept_slots(keep, max(self.counts))
        self.columns = gather_tokens(self.columns, slots)
        self.valid = None if min(self.counts) == self.width else valid
        self._visible = None
        return slots

    @property
    def dropped(self) -> Tensor | None:
        """[B, M] bool: slots of the last layer that stand for no token of their row; None where nothing was dropped."""
        if self.valid is None or not (self._masks or self.selections):
            return None
        return ~self.valid & (self._chosen >= 0).any() if self._masks else ~self.valid

    def close(self) -> dict[int, Tensor]:
        """After the last layer: where tokens were masked out, the columns [B, N] bool that each layer's cache keeps."""
        if not self._masks:
            return {}
        starts = torch.tensor([self.tokens - n for n in self.lengths], device=self.device)
        whole = self.columns >= starts[:, None]
        for row, layer in enumerate(self._chosen.tolist()):
            if layer >= 0:
                assert self.valid is not None
                self.selections[row] = Selection(row, layer, self.valid[row])
                self.selector.traces[row].cut(layer)
                self._count(row)
        kept = {}
        for layer in range(min((made.layer + 1 for made in self.selections.values()), default=0), self.num_layers):
            kept[layer] = whole.clone()
            for row, made in self.selections.items():
                if layer > made.layer:
                    kept[layer][row] = made.keep
        return kept if self.selections else {}

    def _mask_out(self, layer: int, settled: Tensor | None) -> None:
        """Marks what the rows that settled at this layer drop, without looking at which they are."""
        if settled is None:
            return
        rows = torch.tensor(self.selector.rows, device=self.device)
        now = settled & (self._chosen[rows] < 0)
        if self.valid is None:
            self.valid = self.columns.new_ones(self.columns.shape, dtype=torch.bool)
        keep = torch.where(now[:, None], self.selector.choose(), self.valid[rows])
        self._stays = self.valid.index_copy(0, rows, keep)
        self._chosen = self._chosen.index_copy(0, rows, torch.where(now, layer, self._chosen[rows]))

    def _count(self, row: int) -> None:
        self.counts[row] = min(self.config.token_budget(self.lengths[row]), self.lengths[row])

    def kept_positions(self, row: int) -> Tensor:
        """Prompt positions, ascending, 0 = the row's first real token, of the tokens that the deepest layers saw."""
        columns = self.columns[row] if self.valid is None else self.columns[row][self.valid[row]]
        return columns - (self.tokens - self.lengths[row])

    def reason(self, row: int) -> str:
        """Why the row was pruned where it was, or was not pruned: one sentence."""
        config, made, length = self.config, self.selections.get(row), self.lengths[row]
        trace = self.selector.traces.get(row)
        if not self.policy.prunes_tokens:
            return f"policy {self.policy.name!r} lets every token through every layer"
        if trace is None:
            return f"the prompt's {length} tokens are within the budget of {config.token_budget(length)}"
        if config.min_layer == config.max_layer:
            return f"the policy selects at layer {config.max_layer}"
        assert config.tau is not None
        if made is not None and trace.variance_ratio[-1] < config.tau:
            return f"the variance ratio fell to {trace.variance_ratio[-1]:.3f}, below tau={config.tau}"
        lowest = min(trace.variance_ratio, default=float("nan"))
        waited = f"the variance ratio never fell below tau={config.tau} (lowest {lowest:.3f})"
        if made is None:
            return f"{waited}; if_never='keep' keeps every token"
        return f"{waited} by max_layer={config.max_layer}; if_never='select' selects there"

    def _open_rows(self) -> list[int]:
        if not self.policy.prunes_tokens:
            return []
        least = self.config.window if self._observer else None
        return [
            row for row, n in enumerate(self.lengths) if n > (self.config.token_budget(n) if least is None else least)
        ]

    def _over_budget(self) -> bool:
        limit = self._limits()
        return any(count > most for count, most in zip(self.counts, limit, strict=True))

    def _limits(self) -> list[int]:
        """Cache entries that each row may keep at this layer; with top-p, its tokens where it has more than the
        budget."""
        if self.config.kv_top_p is not None:
            return [self.config.token_budget(n) for n in self.lengths]
        if self.config.kv_budget is not None:
            return [min(self.config.cache_budget(n) or n, m) for n, m in zip(self.lengths, self.counts, strict=True)]
        return self.counts

    def _entries(self, scores: Tensor, share: Tensor | None) -> Entries:
        """What the cache keeps by scores [B, G, P], or by share [B, G, M] of attention where that is given."""
        limits, window = self._limits(), self.config.window
        over = torch.tensor([m > most for m, most in zip(self.counts, limits, strict=True)], device=self.device)
        batch, _, prefix = scores.shape
        if share is not None:
            assert self.config.kv_top_p is not None
            keep = top_p_entries(share, self.config.kv_top_p, window, self.valid)
        else:
            budget = torch.tensor([max(0, most - window) for most in limits], device=self.device)
            valid = None if self.valid is None else self.valid[:, :prefix]
            keep = top_k_entries(scores, budget, window, valid)
        everything = keep.new_ones(batch, 1, self.width) if self.valid is None else self.valid[:, None]
        keep = torch.where(over[:, None, None], keep, everything)
        if share is not None:
            count = keep.sum(-1)
            most, least = torch.stack([count.max(), count.min()]).tolist()
        else:
            most, least = max(limits), min(limits)
        slots, valid = kept_slots(keep, most)
        return Entries(slots, None if least == most else valid)


def left_padded_lengths(attention_mask: Tensor) -> list[int]:
    """Real tokens per row of a mask [B, N] that is 0 at padding; raises `UnsupportedError` unless padding is on the
    left."""
    mask = attention_mask.bool()
    if mask.dim() != 2 or not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise UnsupportedError(
            "attention_mask has padding on the right or between tokens; pad prompts on the left (padding_side='left')"
        )
    return [int(count) for count in mask.sum(1).tolist()]
