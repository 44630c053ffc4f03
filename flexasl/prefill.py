"""One batch of prompts on its way through the layers: what every integration and `replay` share.

Shapes: B batch, H query heads, G KV heads, N columns of the padded batch, T tokens of all rows at the current layer,
M those of the longest row, W window, P = M - W prefix tokens, K kept entries, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention, Scoring
from flexasl.checks import instance
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError, UnsupportedError
from flexasl.ops import kept_slots, top_k_entries, top_p_entries
from flexasl.packing import Continued, Packed
from flexasl.policies.base import Policy
from flexasl.policies.contract import budgets_of, steps_of
from flexasl.selector import LayerSelector, Selection, StepSelector, budget_of

Observer = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Entries:
    """Cache entries that one layer keeps: tokens [B, G, K] int64, ascending in each row; valid [B, G, K] bool, or None
    for all."""

    tokens: Tensor
    valid: Tensor | None


class Prefill:
    """The tokens that a batch of prompts still has at each layer, and what each layer's attention changes about that.

    Tokens are packed: all of one row, then all of the next, without padding (`Packed`). At every layer call `observe`
    with the layer's queries and keys, then, once the layer has run, `advance`; after the last one `close`. With
    `propagate="mask"` nothing before `close` waits for the device or depends on what was decided, so that a compiler
    can take all layers as one graph.
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
        voters: Sequence[int] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        observer: Observer | None = None,
        packed: Packed | None = None,
    ) -> None:
        """config is resolved by the policy; lengths are each row's real tokens, at the right end of `tokens` columns;
        voters are the layers whose ranks count (default: all). reduce sums token scores [R, P] over the processes that
        hold a part of the heads each.

        observer(layer, scores [B, G, P]), where given, sees the pooled scores of every layer, and the rule then also
        runs in rows that are too short to lose a token. packed, where given, are tokens that were selected from these
        prompts and are read alone; none of them is dropped.
        """
        instance("policy", policy, Policy, "an instance of a policy")
        refuse_open(instance("config", config, ASLConfig, "an ASLConfig"), num_layers)
        if not lengths:
            raise ConfigError("lengths is empty; give the tokens of each prompt")
        self.policy = policy
        self.config = config
        self.num_layers = num_layers
        self.lengths = list(lengths)
        self.tokens = max(self.lengths) if tokens is None else tokens
        self.device = torch.device(device)
        self.packed = Packed.left_padded(self.lengths, self.tokens, self.device) if packed is None else packed
        """The tokens that the current layer runs on."""
        self.counts = list(self.packed.lengths)
        """Each row's tokens that go on from the current layer."""
        self.selections: dict[int, Selection] = {}
        self.scored: list[int] = []
        self.ran: list[list[int]] = []
        """By layer and row, the tokens that the layer ran on."""
        self.reread: dict[int, list[int]] = {}
        """By layer, the rows of which all layers up to it have read the selected tokens again."""
        self._budgets = budgets_of(policy, config, num_layers, self.lengths)
        self._observer = observer
        self._reduce = reduce
        self._voters = voters
        self._fresh: list[Selection] = []
        self._masks = config.propagate == "mask"
        self._stays: Tensor | None = None
        self._chosen = torch.full((len(self.lengths),), -1, dtype=torch.int64, device=self.device)
        self.selector = self._selector([] if packed is not None else self._open_rows())

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        attention: FlexASLAttention,
        sinks: Tensor | None = None,
        *,
        groups: int | None = None,
        packed: Packed | Continued | None = None,
    ) -> Entries | None:
        """Scores the layer's tokens where a decision needs it: query [1, H, K, D] of each row's last tokens, as
        `packed.last(config.window)` names them, key [1, G, T, D], both after rotary.

        Returns the cache entries to keep, or None for all. groups is how many heads the cache has, where these are
        fewer than those of the keys. packed is how keys are laid out, where more than the layer's tokens have them.
        """
        self.ran.append(list(self.packed.lengths))
        decides, compresses = self.selector.needs(layer), self._over_budget(layer)
        by_position = self.policy.sinks is not None
        if self.packed.width <= self.config.window or not (decides or compresses or self._observer):
            return None
        groups = key.shape[1] if groups is None else groups
        undecided = self.selector.rows
        every = (compresses and not by_position) or self._observer is not None
        rows = range(len(self.lengths)) if every else undecided
        assert self.config.kernel_size is not None and self.config.pooling is not None
        scoring = Scoring(self.config.window, self.config.kernel_size, self.config.pooling)
        by_share = compresses and self.config.kv_top_p is not None
        share = None
        if decides or every:
            packed = self.packed if packed is None else packed
            scores, share = packed.scores(attention, query, key, scoring, rows, sinks, mass=by_share)
            self.scored.append(layer)
        if self._observer is not None:
            self._observer(layer, scores)
        if decides:
            totals = (scores if len(rows) == len(undecided) else scores[undecided]).sum(1)
            self._decide(layer, totals if self._reduce is None else self._reduce(totals))
        if not compresses:
            return None
        if by_position:
            return self._entries(layer, self._recency(groups), None)
        share = None if share is None else share / (query.shape[1] // key.shape[1] * self.config.window)
        if groups < key.shape[1]:
            scores = scores.unflatten(1, (groups, -1)).sum(2)
            share = None if share is None else share.unflatten(1, (groups, -1)).mean(2)
        return self._entries(layer, scores, share)

    @property
    def first_drop(self) -> int | None:
        """The earliest layer after which tokens may be missing, -1 where layers are to read again what was selected;
        None where all tokens go through all layers."""
        over = any(count > self.config.token_budget(count) for count in self.lengths)
        if self._masks or not over or not self.selector.rows:
            return None
        return -1 if self.policy.second_pass else self.selector.earliest

    @property
    def fresh(self) -> list[int]:
        """Rows that were selected from at this layer; empty again once they have advanced."""
        return [selection.row for selection in self._fresh]

    def advance(self) -> Tensor | None:
        """After a layer: which of its tokens [K] int64 go on to the next one, or None where all do."""
        if self._stays is not None:
            self.packed, self._stays = self.packed.masked(self._stays), None
        if not self._fresh:
            return None
        before, made = self.packed, {selection.row: selection for selection in self._fresh}
        self._fresh = []
        kept = []
        for row, (start, length) in enumerate(zip(before.starts, before.lengths)):
            if row in made:
                self.counts[row] = made[row].count
                keep = made[row].keep[before.columns[start : start + length]]
                kept.append(start + kept_slots(keep, self.counts[row])[0])
            else:
                kept.append(torch.arange(start, start + length, dtype=torch.int64, device=self.device))
        tokens = torch.cat(kept)
        self.packed = Packed(self.counts, before.columns[tokens], gaps=True)
        return tokens

    @property
    def dropped(self) -> Tensor | None:
        """[T] bool: tokens that the last layer ran on although their row had dropped them; None where there are
        none."""
        stays = self.packed.stays
        return None if stays is None else ~stays

    def gone(self) -> Tensor | None:
        """[B, N] bool: tokens that do not come out of the last layer; None where all do."""
        stays = self.packed.stays
        if stays is None and self.packed.total == sum(self.lengths):
            return None
        stays = torch.ones(self.packed.total, dtype=torch.bool, device=self.device) if stays is None else stays
        firsts = torch.tensor([self.tokens - n for n in self.lengths], dtype=torch.int64, device=self.device)
        real = torch.arange(self.tokens, dtype=torch.int64, device=self.device) >= firsts[:, None]
        return real & ~self._padded(stays)

    def close(self) -> dict[int, Tensor]:
        """After the last layer: where tokens were masked out, the columns [B, N] bool that each layer's cache keeps."""
        if not self._masks:
            return {}
        whole = self._padded(torch.ones(self.packed.total, dtype=torch.bool, device=self.device))
        stays = None if self.packed.stays is None else self._padded(self.packed.stays)
        for row, layer in enumerate(self._chosen.tolist()):
            if layer >= 0:
                assert stays is not None
                self.counts[row] = budget_of(self.config, self.lengths[row])
                self.selections[row] = Selection(row, layer, stays[row], self.counts[row])
                self.selector.traces[row].cut(layer)
        kept = {}
        for layer in range(min((made.layer + 1 for made in self.selections.values()), default=0), self.num_layers):
            kept[layer] = whole.clone()
            for row, made in self.selections.items():
                if layer > made.layer:
                    kept[layer][row] = made.keep
        return kept if self.selections else {}

    def again(self, rows: Sequence[int]) -> Prefill:
        """The prefill of these rows' selected tokens, alone."""
        starts, lengths = self.packed.starts, [self.packed.lengths[row] for row in rows]
        own = [self.packed.columns[starts[row] : starts[row] + self.packed.lengths[row]] for row in rows]
        packed = Packed(lengths, torch.cat(own), gaps=True, rows=rows)
        prompts = [self.lengths[row] for row in rows]
        settings: dict[str, Any] = {"tokens": self.tokens, "device": self.device, "voters": self._voters}
        return Prefill(self.policy, self.config, self.num_layers, prompts, packed=packed, **settings)

    def _decide(self, layer: int, scores: Tensor) -> None:
        """Takes token scores [R, P] of the undecided rows."""
        if isinstance(self.selector, StepSelector):
            self.selector.observe(layer, scores)
            starts, lengths = self.packed.starts, self.packed.lengths
            columns = [self.packed.columns[starts[row] : starts[row] + lengths[row]] for row in self.selector.rows]
            self._fresh = self.selector.select(layer, columns)
        else:
            settled = self.selector.observe(layer, scores)
            if self._masks:
                self._mask_out(layer, settled)
                return
            self._fresh = self.selector.select(layer, settled)
        self.selections.update((made.row, made) for made in self._fresh)

    def _selector(self, rows: list[int]) -> LayerSelector | StepSelector:
        prompts = {row: self.lengths[row] for row in rows}
        steps = steps_of(self.policy, self.config, self.num_layers, prompts, self._voters)
        if steps:
            return StepSelector(steps, self.tokens, self.config.window)
        settings: dict[str, Any] = {"tokens": self.tokens, "voters": self._voters, "device": self.device}
        return LayerSelector(self.config, self.lengths, rows=rows, **settings)

    def _mask_out(self, layer: int, settled: Tensor | None) -> None:
        """Marks what the rows that settled at this layer drop, without looking at which they are."""
        if settled is None:
            return
        assert isinstance(self.selector, LayerSelector)
        rows = torch.tensor(self.selector.rows, dtype=torch.int64, device=self.device)
        now = settled & (self._chosen[rows] < 0)
        stays = self.packed.stays
        if stays is None:
            stays = torch.ones(self.packed.total, dtype=torch.bool, device=self.device)
        padded = self._padded(stays)
        keep = torch.where(now[:, None], self.selector.choose(), padded[rows])
        self._stays = padded.index_copy(0, rows, keep).flatten()[self.packed.flat(self.tokens)]
        self._chosen = self._chosen.index_copy(0, rows, torch.where(now, layer, self._chosen[rows]))

    def _padded(self, marks: Tensor) -> Tensor:
        """Marks [T] bool in the padded batch [B, N], False at padding."""
        batch = len(self.lengths)
        padded = marks.new_zeros(batch * self.tokens)
        return padded.index_copy(0, self.packed.flat(self.tokens), marks).view(batch, self.tokens)

    def kept_positions(self, row: int) -> Tensor:
        """Prompt positions, ascending, 0 = the row's first real token, of the tokens that the deepest layers saw."""
        start, length = self.packed.starts[row], self.packed.lengths[row]
        columns = self.packed.columns[start : start + length]
        if self.packed.stays is not None:
            columns = columns[self.packed.stays[start : start + length]]
        return columns - (self.tokens - self.lengths[row])

    def reason(self, row: int) -> str:
        """Why the row was pruned where it was, or was not pruned: one sentence."""
        config, made, length = self.config, self.selections.get(row), self.lengths[row]
        trace = self.selector.traces.get(row)
        if not self.policy.prunes_tokens:
            return f"policy {self.policy.name!r} lets every token through every layer"
        if trace is None:
            return f"the prompt's {length} tokens are within the budget of {config.token_budget(length)}"
        if isinstance(self.selector, StepSelector):
            return f"the policy drops tokens step by step, from layer {config.min_layer} to layer {config.max_layer}"
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

    def _over_budget(self, layer: int) -> bool:
        return any(count > most for count, most in zip(self.counts, self._limits(layer), strict=True))

    def _limits(self, layer: int) -> list[int]:
        """Cache entries that each row may keep at this layer; with top-p, its tokens where it has more than the
        budget."""
        limits = []
        for row, (prompt, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            budget = self._budgets[layer][row]
            if self.policy.second_pass and row in self.selector.rows:
                # Its tokens are read again once they are selected.
                limits.append(count)
            elif self.config.kv_top_p is not None:
                limits.append(self.config.token_budget(prompt))
            else:
                limits.append(count if budget is None else min(budget, count))
        return limits

    def _recency(self, groups: int) -> Tensor:
        """Scores [B, G, P] float32 that rise towards the end, with the first tokens of each row above all."""
        assert self.policy.sinks is not None
        tokens, real = self.packed.as_batch()
        columns = self.packed.columns[tokens].float()
        first = 0 if real is None else real.int().argmax(1, keepdim=True)
        place = torch.arange(tokens.shape[1], dtype=torch.int64, device=self.device) - first
        scores = columns.masked_fill(place < self.policy.sinks, torch.inf)[:, : -self.config.window]
        return scores[:, None].expand(-1, groups, -1).contiguous()

    def _entries(self, layer: int, scores: Tensor, share: Tensor | None) -> Entries:
        """What the cache keeps by scores [B, G, P], or by share [B, G, M] of attention where that is given."""
        lengths, window = self.packed.lengths, self.config.window
        limits = self._limits(layer)
        over = torch.tensor([m > most for m, most in zip(lengths, limits)], dtype=torch.bool, device=self.device)
        tokens, real = self.packed.as_batch()
        if share is not None:
            assert self.config.kv_top_p is not None
            keep = top_p_entries(share, self.config.kv_top_p, window, real)
        else:
            left = [max(0, most - window) for most in limits]
            budget = torch.tensor(left, dtype=torch.int64, device=self.device)
            keep = top_k_entries(scores, budget, window, None if real is None else real[:, : scores.shape[2]])
        everything = keep.new_ones(keep.shape) if real is None else real[:, None]
        keep = torch.where(over[:, None, None], keep, everything)
        if share is not None:
            count = keep.sum(-1)
            most, least = torch.stack([count.max(), count.min()]).tolist()
        else:
            most, least = max(limits), min(limits)
        slots, valid = kept_slots(keep, most)
        tokens = tokens[:, None].expand(-1, keep.shape[1], -1).gather(2, slots)
        return Entries(tokens, None if least == most else valid)


def left_padded_lengths(attention_mask: Tensor, name: str = "attention_mask") -> list[int]:
    """Real tokens per row of a mask [B, N] that is 0 at padding; raises `UnsupportedError`, which calls it by this
    name, unless padding is on the left."""
    mask = attention_mask.bool()
    tokens: list[int] = mask.sum(-1).flatten().tolist()
    if 0 in tokens:
        raise UnsupportedError(f"{name} has no token in row {tokens.index(0)}, only padding; give each row a token")
    if mask.dim() != 2 or not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise UnsupportedError(
            f"{name} has padding on the right or between tokens; pad prompts on the left (padding_side='left')"
        )
    return tokens
