"""A batch of prompts on its way through the layers: what every integration and `replay` share.

Shapes: B batch, H query heads, G KV heads, N positions of the padded batch, T tokens of all rows at the current layer,
M those of the longest row, W window, P = M - W scored tokens, K kept entries, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention, Scoring
from flexasl.checks import instance
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.ops import kept_indices
from flexasl.policies import contract
from flexasl.policies.base import Policy
from flexasl.rows import Rows
from flexasl.rows_attention import Scored, scores
from flexasl.selectors.base import Prompts, Selection, Selector

Observer = Callable[[int, Tensor], None]

Entries = tuple[Tensor, Tensor | None]
"""Cache entries that a layer keeps: tokens [B, G, K] int64, ascending in each row; valid [B, G, K] bool, None for
all."""


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
        ranking_layers: Sequence[int] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        observer: Observer | None = None,
        rows: Rows | None = None,
    ) -> None:
        """config is resolved by the policy; lengths are each row's real tokens, at the right end of `tokens` positions;
        ranking_layers are those whose ranks count (default: all). reduce sums token scores [R, P] over the processes
        that hold a part of the heads each.

        observer(layer, scores [B, G, P]), where given, sees the scores of every layer, and the rule then also runs in
        rows that are too short to lose a token. rows, where given, are tokens that were selected from these prompts and
        are read alone; none of them is dropped.
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
        self.ranking_layers = ranking_layers
        self.rows = self._with_scoring_tokens(
            Rows.left_padded(self.lengths, self.tokens, self.device) if rows is None else rows
        )
        """The tokens that the current layer runs on."""
        self.counts = list(self.rows.lengths)
        """Each row's tokens that go on from the current layer."""
        self.selections: dict[int, list[Selection]] = {}
        """By row, in order of layers."""
        self.scored: list[int] = []
        """Layers that were scored."""
        self.ran: list[list[int]] = []
        """By layer and row, the tokens that the layer ran on."""
        self.reread: dict[int, list[int]] = {}
        """By layer, the rows of which all layers up to it have read the selected tokens again."""
        self._observer = observer
        self._reduce = reduce
        own = policy.score is not None
        self._score = functools.partial(contract.score_of, policy) if own else Scored.window_scores
        self._fresh: list[Selection] = []
        self._masks = config.propagate == "mask"
        self._kept: Tensor | None = None
        self._chosen = torch.full((len(self.lengths),), -1, dtype=torch.int64, device=self.device)
        least = config.window if observer else None
        over = [row for row, n in enumerate(self.lengths) if n > (config.token_budget(n) if least is None else least)]
        prompts = Prompts(self.lengths, over, self.tokens, num_layers, ranking_layers, self.device)
        self.selector = contract.selector_of(policy, config, prompts) if rows is None else Selector()
        self.retention = policy.retention(config, num_layers)
        self._most = contract.limits_of(policy, config, self.retention, num_layers, self.lengths)

    def needs(self, layer: int) -> bool:
        """Whether `observe` needs the queries of each row's window at this layer."""
        by_scores = self.retention.goes_by != "nothing" and self._over_limit(layer)
        return self.rows.width > self.config.window and bool(self._decides(layer) or by_scores or self._observer)

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        query: Tensor | None,
        key: Tensor,
        attention: FlexASLAttention,
        sinks: Tensor | None = None,
        *,
        groups: int | None = None,
        rows: Rows | None = None,
    ) -> Entries | None:
        """Scores the layer's tokens where a decision needs it: query [1, H, K, D] of the tokens `rows.queries(W)`, None
        where the layer does not need it, and key [1, G, T, D], both after rotary.

        Returns the cache entries to keep, or None for all. groups is how many heads the cache has, where these are
        fewer than those of the keys. rows is how keys are laid out, where cached ones are among them.
        """
        self.ran.append(list(self.rows.lengths))
        compresses = self.rows.width > self.config.window and self._over_limit(layer)
        groups, made, share = key.shape[1] if groups is None else groups, None, None
        if query is not None and self.needs(layer):
            undecided, by = self.selector.rows, self.retention.goes_by if compresses else "nothing"
            wanted = undecided if by == "nothing" and self._observer is None else range(len(self.lengths))
            own = self.rows if rows is None else rows
            how: dict[str, Any] = {"score": self._score, "mass": by == "attention"}
            made, mass = scores(own, attention, query, key, self._scoring(), wanted, sinks, **how)
            self.scored.append(layer)
            if self._observer is not None:
                self._observer(layer, made)
            if self._decides(layer):
                totals = (made if len(wanted) == len(undecided) else made[list(undecided)]).sum(1)
                self.selector.observe(layer, totals if self._reduce is None else self._reduce(totals))
                self._select(layer)
            share = None if mass is None else mass / (query.shape[1] // key.shape[1] * self.config.window)
        if not compresses:
            return None
        seen = made if share is None else share
        if seen is not None and groups < key.shape[1]:
            heads = seen.unflatten(1, (groups, -1))
            seen = heads.sum(2) if share is None else heads.mean(2)
        return self._entries(layer, seen, groups)

    @property
    def first_drop(self) -> int | None:
        """The earliest layer after which tokens may be missing, -1 where layers are to read again what was selected;
        None where all tokens go through all layers."""
        over = any(count > self.config.token_budget(count) for count in self.lengths)
        if self._masks or not over or not self.selector.rows:
            return None
        return -1 if self.policy.second_pass else self.selector.first_layer

    @property
    def fresh(self) -> list[int]:
        """Rows that were selected from at this layer; empty again once they have advanced."""
        return [selection.row for selection in self._fresh]

    def advance(self) -> Tensor | None:
        """After a layer: which of its tokens [K] int64 go on to the next one, or None where all do."""
        if self._kept is not None:
            self.rows, self._kept = self.rows.masked(self._kept), None
        if not self._fresh:
            return None
        before, made = self.rows, {selection.row: selection for selection in self._fresh}
        self._fresh = []
        going = []
        for row, (start, length) in enumerate(zip(before.starts, before.lengths)):
            if row in made:
                self.counts[row] = made[row].count
                going.append(start + kept_indices(made[row].keep[-length:], self.counts[row])[0])
            else:
                going.append(torch.arange(start, start + length, dtype=torch.int64, device=self.device))
        tokens = torch.cat(going)
        self.rows = self._with_scoring_tokens(Rows(self.counts, before.positions[tokens], contiguous=False))
        return tokens

    @property
    def dropped(self) -> Tensor | None:
        """[T] bool: tokens that the last layer ran on although their row had dropped them; None where there are
        none."""
        return None if self.rows.kept is None else ~self.rows.kept

    def gone(self) -> Tensor | None:
        """[B, N] bool: tokens that do not come out of the last layer; None where all do."""
        kept = self.rows.kept
        if kept is None and self.rows.total == sum(self.lengths):
            return None
        kept = torch.ones(self.rows.total, dtype=torch.bool, device=self.device) if kept is None else kept
        firsts = torch.tensor([self.tokens - n for n in self.lengths], dtype=torch.int64, device=self.device)
        real = torch.arange(self.tokens, dtype=torch.int64, device=self.device) >= firsts[:, None]
        return real & ~self._padded(kept)

    def close(self) -> dict[int, Tensor]:
        """After the last layer: where tokens were masked out, the positions [B, N] bool that each layer's cache
        keeps."""
        if not self._masks:
            return {}
        whole = self._padded(torch.ones(self.rows.total, dtype=torch.bool, device=self.device))
        last = None if self.rows.kept is None else self._padded(self.rows.kept)
        counts = [] if last is None else last.sum(-1).tolist()
        for row, layer in enumerate(self._chosen.tolist()):
            if layer >= 0:
                assert last is not None
                self.counts[row] = counts[row]
                self.selections[row] = [Selection(row, layer, last[row], self.counts[row])]
                if row in self.selector.traces:
                    self.selector.traces[row].cut(layer)
        kept: dict[int, Tensor] = {}
        for row, selections in self.selections.items():
            for selection in selections:
                for layer in range(selection.layer + 1, self.num_layers):
                    kept.setdefault(layer, whole.clone())[row] = selection.keep
        return kept

    def kept_positions(self, row: int) -> Tensor:
        """Prompt positions, ascending, 0 = the row's first real token, of the tokens that the deepest layers saw."""
        own, kept = self.rows.of(row), self.rows.kept
        positions = self.rows.positions[own] if kept is None else self.rows.positions[own][kept[own]]
        return positions - (self.tokens - self.lengths[row])

    def reason(self, row: int) -> str:
        """Why the row was pruned where it was, or was not pruned: one sentence."""
        made: Any = self.selector.reason(row, self.selections.get(row, [None])[-1])
        return str(instance(f"policy {self.policy.name!r}: reason", made, str, "a text", ConfigError))

    def _with_scoring_tokens(self, rows: Rows) -> Rows:
        rows.scoring_tokens = contract.scoring_tokens_of(self.policy, rows, self.config)
        return rows

    def _decides(self, layer: int) -> bool:
        return bool(self.selector.rows) and self.selector.needs(layer)

    def _scoring(self) -> Scoring:
        assert self.config.kernel_size is not None and self.config.pooling is not None
        return Scoring(self.config.window, self.config.kernel_size, self.config.pooling)

    def _select(self, layer: int) -> None:
        if self._masks:
            self._mask_out(layer, self.selector.mask(layer))
            return
        first, made = self.selector.first_layer, self.selector.select(layer)
        self._fresh = contract.checked_selections(self.policy, made, layer, first, self.rows, self.config.window)
        for selection in self._fresh:
            self.selections.setdefault(selection.row, []).append(selection)

    def _mask_out(self, layer: int, decided: tuple[Tensor, Tensor] | None) -> None:
        """Marks what the rows that select at this layer drop, without looking at which they are."""
        if decided is None:
            return
        selects, keep = decided
        rows = torch.tensor(self.selector.rows, dtype=torch.int64, device=self.device)
        now = selects & (self._chosen[rows] < 0)
        kept = self.rows.kept
        if kept is None:
            kept = torch.ones(self.rows.total, dtype=torch.bool, device=self.device)
        padded = self._padded(kept)
        keep = torch.where(now[:, None], keep, padded[rows])
        self._kept = padded.index_copy(0, rows, keep).flatten()[self.rows.flat(self.tokens)]
        self._chosen = self._chosen.index_copy(0, rows, torch.where(now, layer, self._chosen[rows]))

    def _padded(self, marks: Tensor) -> Tensor:
        """Marks [T] bool in the padded batch [B, N], False at padding."""
        batch = len(self.lengths)
        padded = marks.new_zeros(batch * self.tokens)
        return padded.index_copy(0, self.rows.flat(self.tokens), marks).view(batch, self.tokens)

    def _over_limit(self, layer: int) -> bool:
        return any(count > most for count, most in zip(self.counts, self._limits(layer), strict=True))

    def _limits(self, layer: int) -> list[int]:
        """Cache entries up to which each row keeps all at this layer."""
        limits = []
        for row, (count, most) in enumerate(zip(self.counts, self._most[layer], strict=True)):
            # What is read again after the selection is stored then.
            later = self.policy.second_pass and row in self.selector.rows
            limits.append(count if most is None or later else min(most, count))
        return limits

    def _entries(self, layer: int, seen: Tensor | None, groups: int) -> Entries:
        """What the cache keeps, by scores [B, G, P] or shares of attention [B, G, M]."""
        limits = self._limits(layer)
        most = torch.tensor(limits, dtype=torch.int64, device=self.device)
        keep = contract.entries_of(self.policy, self.retention, seen, most, self.config.window, self.rows, groups)
        if self.retention.exact:
            highest, lowest = max(limits), min(limits)
        else:
            count = keep.sum(-1)
            highest, lowest = torch.stack([count.max(), count.min()]).tolist()
        indices, valid = kept_indices(keep, highest)
        tokens = self.rows.as_batch()[0][:, None].expand(-1, groups, -1).gather(2, indices)
        return tokens, None if lowest == highest else valid
