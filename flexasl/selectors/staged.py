"""Selection in stages, each where the question has looked up what it asks for.

Shapes: R rows that are left, P prefix tokens, N prompt tokens (P + window), S stages, the final one included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.checks import instance
from flexasl.config import LOOSER, UNASKED_TOKENS, ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.numbers import on_device
from flexasl.ops import select_tokens, token_ranks
from flexasl.ops.scoring import pool_reach
from flexasl.selectors.base import Selection, Selector, Trace, batch_of, budget_of, combined, within_budget
from flexasl.stages import threshold

NEAR = 32
"""Tokens beside one that is kept in any case, beyond those that its score is pooled over, which are no far tokens."""


class _Stage(NamedTuple):
    """What holds for all rows at one stage."""

    tau: float
    first: int
    last: int

    def threshold(self, layer: int) -> float:
        return threshold(self.tau, self.first, layer)


class StagedSelector(Selector):
    """Selects from every row of a left-padded batch in stages, each at the first layer of its range where a far token
    has a score of at least `tau`, by the scores of all layers up to there.

    Where no token reaches `tau`, a stage selects at the end of its range, or with `if_never="keep"` not at all. The
    threshold falls by 15 percent with every layer of the range, a little slower than scores fade.

    A row makes one selection a layer at most. At `max_layer` it makes the final one, whatever stages are left. A stage
    that would drop nothing, or as much as the final one, is skipped. Tokens with a score of infinity are kept; they
    and their neighbours do not count as far tokens. The final selection of a row whose question is not known, which is
    ranked less well, is not made before `min_layer_unasked`; where that comes after `min_layer`, half of the row goes
    on before.
    """

    masks = True
    budgets: Sequence[Sequence[int]]

    def __init__(
        self,
        config: ASLConfig,
        lengths: Sequence[int],
        *,
        tokens: int | None = None,
        rows: Sequence[int] | None = None,
        ranking_layers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        asked: Sequence[bool] | None = None,
    ) -> None:
        """As `LayerSelector`. asked: of each row, whether it is known what it asks; None: of all."""
        if instance("config", config, ASLConfig, "an ASLConfig").rule != "lookup":
            raise ConfigError("settled_by='variance' is for LayerSelector; give settled_by='lookup'")
        refuse_open(config)
        self.config = config
        self.lengths, self.tokens, self.rows = batch_of(lengths, tokens, rows)
        self.stages = [_Stage(*_bounds(stage)) for stage in config.stages or ()] + [_Stage(*_bounds(config))]
        counting = range(self.stages[-1].last + 1) if ranking_layers is None else ranking_layers
        for stage in self.stages if ranking_layers is not None else ():
            for name, layer in (("min_layer", stage.first), ("max_layer", stage.last)):
                if layer not in counting:
                    raise ConfigError(
                        f"{name}={layer} does not attend to the whole prompt; give one of "
                        f"{', '.join(map(str, counting))}, "
                        "or settings resolved for these ranking_layers"
                    )
        assert config.min_layer_unasked is not None and config.min_layer is not None
        self.asked = [True] * len(self.lengths) if asked is None else list(asked)
        """Of each row, whether it is known what it asks."""
        self._unasked = [*self.stages[:-1], self.stages[-1]._replace(first=config.min_layer_unasked)]
        """The stages of a row of which it is not known what it asks."""
        self.once = len(self.stages) == 1
        opens = min(stage.first for stage in self.stages)
        since = config.score_from if config.select_on != "last" else opens
        assert since is not None
        self._needed = frozenset(layer for layer in counting if since <= layer <= self.stages[-1].last)
        self.budgets = [self._counts(row) for row in range(len(self.lengths))]
        """For every row of the batch, tokens that each stage keeps."""
        self._selects_anyway = config.if_never == "select"
        self._traces = {row: Trace() for row in self.rows}
        self._seen: list[tuple[int, list[int], Tensor]] = []
        self._scores: Tensor | None = None
        self._always: Tensor | None = None
        self._far: Tensor | None = None
        self._settled: Tensor | None = None
        self._stage: Tensor
        self._at = [self._next(row, 0) for row in self.rows]
        self.first_layer = opens if self.rows else None
        self._on(torch.device(device))

    def needs(self, layer: int) -> bool:
        return bool(self.rows) and layer in self._needed

    def observe(self, layer: int, scores: Tensor) -> None:
        """Takes scores [R, P] float32; they may come without their first positions where these are padding in every
        row. Nothing is moved to the host."""
        prefix = self.tokens - self.config.window
        scores = F.pad(scores, (prefix - scores.shape[1], 0))
        if self._valid is not None:
            scores = scores.masked_fill(~self._valid[:, :prefix], 0.0)
        self._always = scores == float("inf")
        self._far = self._far_tokens(self._always) if self._far is None else self._far
        scores = scores.masked_fill(self._always, 0.0).nan_to_num(nan=0.0)
        assert self.config.select_on is not None
        self._scores = combined(self._scores, scores, self.config.select_on)
        highest = self._scores.masked_fill(self._always | ~self._far, 0.0).amax(1)
        self._seen.append((layer, list(self.rows), highest))
        if not self._selects_anyway:
            self._pass_over(layer)
        self._settled = highest >= self._thresholds[layer][self._kinds, self._stage]

    def select(self, layer: int) -> list[Selection]:
        """The selections of rows that make one. Moves one bool a row to the host, or none where that is known."""
        if self._settled is None:
            return []
        ends = self._ends(layer)
        if ends:
            self._at = [len(self.stages) - 1] * len(self.rows)
            self._stage = torch.full_like(self._stage, len(self.stages) - 1)
        may = [layer >= self._of(row)[stage].first for row, stage in zip(self.rows, self._at)]
        must = [ends or (self._selects_anyway and layer >= self.stages[stage].last) for stage in self._at]
        unsure = any(can and not does for can, does in zip(may, must))
        settled = self.look(self._settled) if unsure else [0] * len(self.rows)
        fired = [does or (can and bool(own)) for can, does, own in zip(may, must, settled)]
        if not any(fired):
            return []
        keep, made = self._choose(), []
        for place, row in enumerate(self.rows):
            if fired[place]:
                stage = self._at[place]
                made.append(Selection(row, layer, keep[place], self.budgets[row][stage]))
                self._at[place] = self._next(row, stage + 1)
        self._advance(on_device(fired, keep.device, torch.bool), keep)
        self._leave()
        return made

    def mask(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if self._settled is None:
            return None
        over = self._stage == len(self.stages)
        if self._ends(layer):
            selects, self._stage = ~over, torch.where(over, self._stage, len(self.stages) - 1)
        else:
            late = layer >= self._lasts[self._stage]
            selects = (self._settled | late) if self._selects_anyway else self._settled
            selects = selects & (layer >= self._firsts[self._kinds, self._stage])
        keep = self._choose()
        self._advance(selects, keep)
        return selects, keep

    @property
    def stages_left(self) -> Tensor:
        return self._stage

    @property
    def traces(self) -> Mapping[int, Trace]:
        read = torch.cat([values for *_, values in self._seen]).tolist() if self._seen else []
        for layer, rows, _ in self._seen:
            own, read = read[: len(rows)], read[len(rows) :]
            for row, weight in zip(rows, own, strict=True):
                self._traces[row].eval_layers.append(layer)
                self._traces[row].lookup.append(weight)
        self._seen.clear()
        return self._traces

    def reason(self, row: int, selection: Selection | None) -> str:
        config, trace = self.config, self.traces.get(row)
        if trace is None:
            return within_budget(config, self.lengths[row])
        highest = max(trace.lookup, default=0.0)
        never = f"no far token scored enough (highest {highest:.2f}, tau={config.tau})"
        if selection is None:
            return f"{never}; if_never='keep' keeps every token"
        weight = dict(zip(trace.eval_layers, trace.lookup)).get(selection.layer, highest)
        final = selection.count == self.budgets[row][-1]
        loose = zip(self._of(row), self.budgets[row][:-1])
        fits = (stage for stage, count in loose if count == selection.count and selection.layer <= stage.last)
        stage = self._of(row)[-1] if final else next(fits)
        least = stage.threshold(selection.layer)
        if weight >= least:
            lowered = "" if selection.layer <= stage.first else f" (tau={stage.tau}, lowered with depth)"
            last = f"the last {config.window} tokens" if config.window > 1 else "the last token"
            who = "the question" if self.asked[row] else last
            return f"{who} found a far token: score {weight:.2f}, threshold {least:.2f}{lowered}"
        if not final:
            return f"{never}; if_never='keep' keeps the remaining tokens"
        if stage.first == stage.last:
            return f"the selection is set to layer {stage.last}"
        return f"{never} by max_layer={stage.last}; if_never='select' selects there"

    def _of(self, row: int) -> list[_Stage]:
        """The row's stages."""
        return self.stages if self.asked[row] else self._unasked

    def _counts(self, row: int) -> list[int]:
        """Tokens of a prompt that are kept by each stage, ascending stages."""
        length = self.lengths[row]
        counts, left, final = [], length, budget_of(self.config, length)
        waits = self._of(row)[-1].first > self.stages[-1].first
        for stage in self.config.stages or ():
            if isinstance(stage.tokens, int):
                wanted = max(stage.tokens, final)
            else:
                wanted = max(int(stage.tokens * length), int(LOOSER * final))
            wanted = max(wanted, int(UNASKED_TOKENS * length)) if waits else wanted
            left = min(left, wanted)
            counts.append(left)
        return [*counts, final]

    def _pass_over(self, layer: int) -> None:
        """Loose stages whose range ended before this layer are over, though nothing was selected."""
        for stage, one in enumerate(self.stages[:-1]):
            if one.last < layer:
                self._at = [self._later(row, stage) if at == stage else at for row, at in zip(self.rows, self._at)]
                self._stage = torch.where(self._stage == stage, self._laters[:, stage], self._stage)

    def _later(self, row: int, stage: int) -> int:
        """The stage that comes when this one is passed over: the next one, where that is looser than the final one."""
        last = len(self.stages) - 1
        return min(stage + 1, last) if self.budgets[row][min(stage + 1, last)] > self.budgets[row][-1] else last

    def _next(self, row: int, stage: int) -> int:
        """The stage that comes, from this one on, when those before it were made: the first that drops tokens and is
        looser than the final one, else that one; one more where that was made."""
        counts, last = self.budgets[row], len(self.stages) - 1
        left = counts[stage - 1] if stage else self.lengths[row]
        return next((one for one in range(stage, last) if counts[-1] < counts[one] < left), max(stage, last))

    def _on(self, device: torch.device) -> None:
        """What the rows are compared with, as tensors."""
        count, never = len(self.stages), 2**31
        starts = on_device([self.tokens - self.lengths[row] for row in self.rows], device)
        padded = any(self.lengths[row] < self.tokens for row in self.rows)
        at = torch.arange(self.tokens, dtype=torch.int64, device=device)
        self._valid = at >= starts[:, None] if padded else None
        """[R, N] bool, None for all: tokens that are left, at the right end."""
        kinds = self.stages, self._unasked
        firsts = [first for stages in kinds for first in (*(one.first for one in stages), never)]
        self._firsts = on_device(firsts, device).view(2, count + 1)
        """[2, S + 1], of rows of which it is known what they ask, and of others."""
        self._lasts = on_device([*(one.last for one in self.stages), never], device)
        self._kinds = on_device([int(not self.asked[row]) for row in self.rows], device)
        """[R] int64: 1 for a row of which it is not known what it asks."""

        def by_row(make: Callable[[int], list[int]]) -> Tensor:
            values = [value for row in self.rows for value in make(row)]
            return on_device(values, device).view(len(self.rows), count + 1)

        window = self.config.window
        self._prefixes = by_row(lambda row: [*(max(0, budget - window) for budget in self.budgets[row]), 0])
        self._nexts = by_row(lambda row: [*(self._next(row, stage + 1) for stage in range(count)), count])
        self._laters = by_row(lambda row: [*(self._later(row, stage) for stage in range(count)), count])
        self._stage = on_device(self._at, device)
        looks = sorted(self._needed)
        least = [
            value
            for layer in looks
            for stages in kinds
            for value in (*(one.threshold(layer) for one in stages), 2.0**31)
        ]
        table = on_device(least, device, torch.float32).view(len(looks), 2, count + 1)
        self._thresholds = dict(zip(looks, table))
        """By layer, those of each stage, and of none [2, S + 1]."""

    def _far_tokens(self, always: Tensor) -> Tensor:
        """Tokens [R, P] bool that are far from all that are kept in any case, from the window and from the start."""
        assert self.config.kernel_size is not None and self.config.pooling is not None
        on, back = pool_reach(self.config.kernel_size, self.config.pooling)
        tokens = always.shape[1]
        marked = always if self._valid is None else always | ~self._valid[:, :tokens]
        at = torch.arange(tokens, dtype=torch.int64, device=always.device)
        before = torch.where(marked, at, -1).cummax(1).values
        after = torch.where(marked, at, tokens).flip(1).cummin(1).values.flip(1)
        return (at - before > NEAR + on) & (after - at > NEAR + back)

    def _ends(self, layer: int) -> bool:
        """Whether all rows select at this layer for good."""
        return self._selects_anyway and layer == self.stages[-1].last

    def _choose(self) -> Tensor:
        """Tokens of each row in `rows` that would be kept if it selected now: [R, N] bool."""
        assert self._scores is not None and self._always is not None
        valid = None if self._valid is None else self._valid[:, : self._scores.shape[1]]
        ranks = token_ranks(self._scores.masked_fill(self._always, float("inf")), valid)
        budget = self._prefixes.gather(1, self._stage[:, None])[:, 0]
        return select_tokens(ranks, budget, self.config.window, self._valid)

    def _advance(self, selects: Tensor, keep: Tensor) -> None:
        """Rows that select move to their next stage, and what they keep moves to the right end, in its order."""
        assert self._scores is not None and self._far is not None
        valid = torch.ones_like(keep) if self._valid is None else self._valid
        left = torch.where(selects[:, None], keep, valid)
        order = left.to(torch.uint8).argsort(dim=-1, stable=True)
        places = order[:, : self._scores.shape[1]]
        self._valid = left.gather(1, order)
        self._scores = self._scores.gather(1, places)
        self._far = self._far.gather(1, places) & self._valid[:, : places.shape[1]]
        self._stage = torch.where(selects, self._nexts.gather(1, self._stage[:, None])[:, 0], self._stage)
        self._settled = self._always = None

    def _leave(self) -> None:
        """Rows that made their final selection leave `rows`."""
        going = [place for place, stage in enumerate(self._at) if stage < len(self.stages)]
        if len(going) == len(self.rows):
            return
        self.rows, self._at = [self.rows[place] for place in going], [self._at[place] for place in going]
        index = on_device(going, self._stage.device)
        assert self._scores is not None and self._far is not None and self._valid is not None
        self._scores, self._far, self._valid = self._scores[index], self._far[index], self._valid[index]
        self._kinds = self._kinds[index]
        self._prefixes, self._stage = self._prefixes[index], self._stage[index]
        self._nexts, self._laters = self._nexts[index], self._laters[index]


def waited(config: ASLConfig, layer: int, trace: Trace, asked: bool) -> bool:
    """Whether the last selection of a prompt, made at this layer by resolved settings, came with `max_layer` and no
    look-up. asked: whether it is known what the prompt asks."""
    first = config.min_layer if asked else config.min_layer_unasked
    assert config.tau is not None and first is not None
    weight = dict(zip(trace.eval_layers, trace.lookup))[layer]
    return layer == config.max_layer and weight < threshold(config.tau, first, layer)


def _bounds(stage: object) -> tuple[float, int, int]:
    """Of a stage, or of settings."""
    return tuple(getattr(stage, name) for name in ("tau", "min_layer", "max_layer"))
