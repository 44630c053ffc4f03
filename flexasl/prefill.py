"""A batch of prompts on its way through the layers: what every integration and `replay` share.

Shapes: B batch, H query heads, G KV heads, N positions of the padded batch, T tokens of all rows at the current layer,
M those of the longest row, W window, P = M - W scored tokens, K kept entries, D head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.asking import Questions
from flexasl.attention import FlexASLAttention, Scoring
from flexasl.checks import instance
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.kept_entries import Entries, counts_of, kept_entries, wanted_entries
from flexasl.numbers import SharedReads, on_device, read_together
from flexasl.ops import kept_indices, over_heads
from flexasl.policies import contract
from flexasl.policies.base import Policy
from flexasl.rows import Rows
from flexasl.rows_attention import Scored, scores
from flexasl.selectors.base import Prompts, Selection, Selector

Observer = Callable[[int, Tensor], None]
Reduce = Callable[[Tensor, bool], Tensor]
"""Of token scores their sum over processes or, where the second is True, the highest."""


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
        reduce: Reduce | None = None,
        observer: Observer | None = None,
        rows: Rows | None = None,
        question: Sequence[Tensor | None] | None = None,
        question_texts: Sequence[str | None] | None = None,
        past: int = 0,
        last_seen: Tensor | None = None,
        ahead: int = 0,
    ) -> None:
        """config is resolved by the policy; lengths are each row's real tokens, at the right end of `tokens`
        positions; ranking_layers are those whose ranks count (default: all). reduce joins token scores [R, P] of the
        processes that hold a part of the heads each. observer(layer, scores [B, G, P]), where given, sees the scores
        of every layer, and the rule then also runs in rows that are too short to lose a token. rows, where given, are
        tokens that were selected from these prompts and are read alone; none of them is dropped.

        question: of each row, the positions [W] int64, in the padded batch and ascending, of the tokens that ask, which
        score the others and are kept; None: the window's. question_texts: what the report says of these. past:
        positions that came before. last_seen [B, N] int64: up to which position each token sees others, at most so
        many `ahead`; None where no token sees later ones.
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
        self.questions = None
        if question is not None:
            # A score of the policy's own compares nothing.
            compared = config if policy.score is None else config.replace(contrast=False)
            questions = Questions(question, self.lengths, self.tokens, compared, past)
            self.questions = questions if any(questions.rows) else None
        self.question_texts = list(question_texts or [None] * len(self.lengths))
        is_prompt = rows is None
        if rows is None:
            rows = Rows.left_padded(self.lengths, self.tokens, self.device)
            rows.seeing(None if last_seen is None else last_seen.flatten()[rows.flat(self.tokens)], ahead)
        self.rows = self._with_scoring_tokens(rows)
        """The tokens that the current layer runs on."""
        self.counts = list(self.rows.lengths)
        """Each row's tokens that pass from the current layer to the next."""
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
        self._masked: list[tuple[int, Tensor]] = []
        self._masked_rows: list[Tensor] = []
        """Under `propagate="mask"`, by layer what is left after it [B, N] bool, and the rows that selected [B] bool."""
        self._chosen = torch.full((len(self.lengths),), -1, dtype=torch.int64, device=self.device)
        least = config.window if observer else None
        enough = [config.token_budget(n) if least is None else least for n in self.lengths]
        self.over = [row for row, n in enumerate(self.lengths) if n > enough[row]]
        known = None if self.questions is None else self.questions.rows
        asked = [
            policy.scoring_tokens is not None or bool(own and own.ranking) for own in known or [None] * len(lengths)
        ]
        prompts = Prompts(self.lengths, self.over, self.tokens, num_layers, ranking_layers, self.device, asked)
        self.selector = contract.selector_of(policy, config, prompts) if is_prompt else Selector()
        self._reads = SharedReads()
        self.selector.look = self._reads.now
        self._packs = self._masks and not self.selector.once
        """Whether the selector has the tokens that are left of a row at the right end."""
        self.retention = policy.retention(config, num_layers)
        self.limits = contract.limits_of(policy, config, self.retention, num_layers, self.lengths)
        self._device_limits: Tensor | None = None
        if self._masks and self.device.type != "cpu":
            self._upload()

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
            how: dict[str, Any] = {"score": self._score, "mass": by == "attention", "pack": self._packs}
            made, mass = scores(own, attention, query, key, self._scoring(), wanted, sinks, **how)
            self.scored.append(layer)
            if self._observer is not None:
                self._observer(layer, made)
            share = None if mass is None else mass / (query.shape[1] // key.shape[1] * self.config.window)
        keep = None
        if compresses and not self.retention.exact and not self.policy.second_pass:
            keep = self._wanted(layer, made, share, groups, key.shape[1])
            self._reads.want(counts_of(keep))
        if made is not None and self._decides(layer):
            totals = self.over_heads(self._of_rows(made, undecided) if len(wanted) > len(undecided) else made)
            if self.questions is not None:
                totals = totals.masked_fill(self._asking(self.questions)[:, : totals.shape[1]], math.inf)
            self.selector.observe(layer, totals)
            self._select(layer)
        if not compresses:
            return None
        if keep is not None:
            return kept_entries(keep, self._reads.wanted(), self.rows)
        # What a second pass reads again is not known before the selection.
        keep, limits = self._wanted(layer, made, share, groups, key.shape[1]), self._limits(layer)
        if self.retention.exact:
            counts = [max(limits), min(limits)]
        elif self.rows.batch_rows is not None:  # `read_again` frees what is not valid in all layers, by one read
            counts = [self.rows.width, 0]
        else:
            counts = counts_of(keep).tolist()
        return kept_entries(keep, counts, self.rows)

    def _wanted(self, layer: int, made: Tensor | None, share: Tensor | None, groups: int, heads: int) -> Tensor:
        """The entries that the cache keeps of these rows, of as many heads as it has, by scores or shares of those that
        keys have."""
        seen = made if share is None else share
        if seen is not None and groups < heads:
            by_head = seen.unflatten(1, (groups, -1))
            seen = over_heads(by_head, 2, self.config.power) if share is None else by_head.mean(2)
        limits = self._limits(layer)
        always = None if self.questions is None else self.questions.kept(self.rows, limits)
        most = self._limits_on_device(layer, limits)
        return wanted_entries(self.retention, self.policy, seen, most, self.config.window, self.rows, groups, always)

    def _of_rows(self, states: Tensor, rows: Sequence[int]) -> Tensor:
        """Those [R, ...] of some rows, of states [B, ...]."""
        return states.index_select(0, self.rows.numbers(rows))

    def pass_over(self) -> None:
        """In the place of `observe` at a layer without attention, where nothing is scored."""
        self.ran.append(list(self.rows.lengths))

    def over_heads(self, scores: Tensor) -> Tensor:
        """Scores [R, G, P] of this process's KV heads as token scores [R, P] of all processes' heads."""
        totals = over_heads(scores, 1, self.config.power)
        return totals if self._reduce is None else self._reduce(totals, self.config.power == math.inf)

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
        """After a layer: which of its tokens [K] int64 pass to the next one, or None where all do."""
        if self._kept is not None:
            self.rows = self.rows.masked(self._kept)
            if self._packs and self.questions is not None:
                self.questions.set_scoring_tokens(self.rows, self._padded(self._kept).sum(-1))
            self._kept = None
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
        left = Rows(self.counts, before.positions[tokens], contiguous=False)
        left.seeing(None if before.last_seen is None else before.last_seen[tokens], before.ahead)
        self.rows = self._with_scoring_tokens(left)
        return tokens

    def gone(self) -> Tensor | None:
        """[B, N] bool: tokens that do not come out of the last layer; None where all do."""
        kept = self.rows.kept
        if kept is None and self.rows.total == sum(self.lengths):
            return None
        kept = torch.ones(self.rows.total, dtype=torch.bool, device=self.device) if kept is None else kept
        firsts = self.rows.numbers(self._firsts)
        real = torch.arange(self.tokens, dtype=torch.int64, device=self.device) >= firsts[:, None]
        return real & ~self._padded(kept)

    def close(self) -> dict[int, Tensor]:
        """After the last layer: where tokens were masked out, the positions [B, N] bool that each layer's cache
        keeps."""
        if not self._masks:
            return {}
        whole = self._padded(torch.ones(self.rows.total, dtype=torch.bool, device=self.device))
        read = read_together([*(left.sum(-1) for _, left in self._masked), *self._masked_rows])
        for place, (layer, left) in enumerate(self._masked):
            counts, selected = read[place], read[len(self._masked) + place]
            for row in (row for row, selects in enumerate(selected) if selects):
                self.counts[row] = counts[row]
                self.selections.setdefault(row, []).append(Selection(row, layer, left[row], counts[row]))
        budgets = self.selector.budgets
        for row, selections in self.selections.items():
            if row in self.selector.traces and (budgets is None or selections[-1].count == budgets[row][-1]):
                self.selector.traces[row].cut(selections[-1].layer)
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

    def selections_passed(self, row: int) -> Tensor:
        """How many selections each token of the row's prompt has passed: [length] int16."""
        length = self.lengths[row]
        passed = torch.zeros(length, dtype=torch.int16, device=self.device)
        left = torch.arange(length, dtype=torch.int64, device=self.device)
        for number, selection in enumerate(self.selections.get(row, ()), 1):
            if self._masks:
                passed += selection.keep[-length:]
            else:
                left = left[kept_indices(selection.keep[-left.shape[0] :], selection.count)[0]]
                passed.index_fill_(0, left, number)
        return passed

    def read_selections_passed(self) -> list[Tensor | None]:
        """`selections_passed` of the rows that were selected from, on the host, by one read; None for others."""
        rows = [row for row in range(len(self.lengths)) if self.selections.get(row)]
        if not rows:
            return [None] * len(self.lengths)
        read = torch.cat([self.selections_passed(row) for row in rows]).cpu()
        found = dict(zip(rows, read.split([self.lengths[row] for row in rows])))
        return [found.get(row) for row in range(len(self.lengths))]

    def _with_scoring_tokens(self, rows: Rows) -> Rows:
        if self.policy.scoring_tokens is not None or self.questions is None:
            rows.scoring_tokens = contract.scoring_tokens_of(self.policy, rows, self.config)
        else:
            self.questions.set_scoring_tokens(rows)
        return rows

    def _asking(self, questions: Questions) -> Tensor:
        """Of the selector's rows, tokens [R, M] bool that the next selection keeps whatever they score, each row's at
        the right end."""
        undecided, budgets, left = list(self.selector.rows), self.selector.budgets, self.selector.stages_left
        if budgets is None or left is None:
            asking = self._of_rows(questions.kept(self.rows), undecided)
        else:
            cut = None if self.rows.kept is None else self._chosen >= 0
            by_stage = self._asking_by_stage(questions, budgets, cut)
            rows = self.rows.numbers(undecided)
            asking = torch.stack(by_stage)[left.clamp(max=len(by_stage) - 1), rows]
        if self.rows.kept is None or not self._packs:
            return asking
        kept = self._of_rows(self._padded(self.rows.kept), undecided)[:, -self.rows.width :]
        return asking.gather(1, kept.to(torch.uint8).argsort(dim=-1, stable=True))

    def _asking_by_stage(
        self, questions: Questions, budgets: Sequence[Sequence[int]], cut: Tensor | None
    ) -> list[Tensor]:
        stages = range(len(budgets[0]))
        limits = [[min(of_row[stage], n) for of_row, n in zip(budgets, self.lengths)] for stage in stages]
        return [questions.kept(self.rows, limits[stage], stage < stages[-1], cut) for stage in stages]

    def _upload(self) -> None:
        """Lets everything be uploaded that layers need where tokens are masked out. A CUDA graph of them may hold no
        upload: it would copy again, whenever it is replayed, from where the numbers were."""
        for numbers in (self.lengths, self._firsts, list(self.selector.rows)):
            self.rows.numbers(numbers)
        if self.questions is None:
            return
        if self.selector.budgets is None or self.selector.stages_left is None:
            self.questions.kept(self.rows)
        else:
            self._asking_by_stage(self.questions, self.selector.budgets, self._chosen >= 0)
        if self._packs:
            self.questions.set_scoring_tokens(self.rows.masked(None), self.rows.lengths_on_device)

    @property
    def _firsts(self) -> list[int]:
        """Where each row's tokens begin in the padded batch."""
        return [self.tokens - length for length in self.lengths]

    def _decides(self, layer: int) -> bool:
        return bool(self.selector.rows) and self.selector.needs(layer)

    def _scoring(self) -> Scoring:
        assert self.config.kernel_size is not None and self.config.pooling is not None
        return Scoring(self.config.window, self.config.kernel_size, self.config.pooling, self.config.power)

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
        rows = self.rows.numbers(self.selector.rows)
        now = selects & (self._chosen[rows] < 0) if self.selector.once else selects
        kept = self.rows.kept
        if kept is None:
            kept = torch.ones(self.rows.total, dtype=torch.bool, device=self.device)
        padded = self._padded(kept)
        if self._packs:
            order = padded[rows].to(torch.uint8).argsort(dim=-1, stable=True)
            keep = torch.zeros_like(keep).scatter(1, order, keep) & padded[rows]
        padded = padded.index_copy(0, rows, torch.where(now[:, None], keep, padded[rows]))
        self._kept = padded.flatten()[self.rows.flat(self.tokens)]
        self._chosen = self._chosen.index_copy(0, rows, torch.where(now, layer, self._chosen[rows]))
        self._masked.append((layer, padded))
        self._masked_rows.append(torch.zeros_like(self._chosen, dtype=torch.bool).index_copy(0, rows, now))

    def _padded(self, marks: Tensor) -> Tensor:
        """Marks [T] bool in the padded batch [B, N], False at padding."""
        batch = len(self.lengths)
        padded = marks.new_zeros(batch * self.tokens)
        return padded.index_copy(0, self.rows.flat(self.tokens), marks).view(batch, self.tokens)

    def _over_limit(self, layer: int) -> bool:
        return any(count > most for count, most in zip(self.counts, self._limits(layer), strict=True))

    def _limits_on_device(self, layer: int, limits: Sequence[int]) -> Tensor:
        """These limits [B] int64. Those of all layers go there once, since they may differ by layer."""
        if self.policy.second_pass or self.device.type == "cpu":
            return self.rows.numbers(limits)
        if self._device_limits is None:
            most = [2**62 if one is None else one for of_layer in self.limits for one in of_layer]
            self._device_limits = on_device(most, self.device).view(self.num_layers, -1)
        return torch.minimum(self._device_limits[layer], self.rows.lengths_on_device)

    def _limits(self, layer: int) -> list[int]:
        """Cache entries up to which each row keeps all at this layer."""
        limits = []
        for row, (count, most) in enumerate(zip(self.counts, self.limits[layer], strict=True)):
            # What is read again after the selection is stored then.
            later = self.policy.second_pass and row in self.selector.rows
            limits.append(count if most is None or later else min(most, count))
        return limits
