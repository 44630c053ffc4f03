"""The tokens of prompts that ask: their queries rank the other tokens, and they are kept.

Shapes: B rows, T tokens of all rows at the current layer, M tokens of the longest row, W scoring tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flexasl.checks import ascending
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.numbers import on_device
from flexasl.rows import Rows

SHARE = 0.5
"""The part of a budget that the question and what stands behind it take for sure; beyond it they must score."""
MOST_QUERIES = 512
"""Tokens of a question whose queries rank, at most: the last ones. Their logits are held for one KV head at a time."""
CONTROLS = 32
"""Tokens right before those that rank, which these are compared with under `contrast`."""
FIRST = 4
"""First tokens of a prompt, which nearly every head attends to, and which are kept under `contrast`, as it scores them
low."""


class Asked:
    """The question of one prompt. Positions count from the row's first real token.

    A token sees only what stands before it. So the tokens of a question rank unless the other tokens behind them are
    more than the budget, or than a third of the prompt: those are a text, which they have not seen. Where none ranks,
    the window does.
    """

    def __init__(
        self, question: Sequence[int], tokens: int, budget: int, window: int, past: int = 0, contrast: bool = False
    ) -> None:
        """question is ascending; tokens are the prompt's, which past ones stand before; budget is what is kept of it,
        window included."""
        others = [tokens - len(question) - (at - place) for place, at in enumerate(question)]
        most = min(budget, (past + tokens) // 3)
        self.ranking = [at for at, behind in zip(question, others) if behind <= most][-MOST_QUERIES:]
        """Whose queries rank; none where a text stands behind the question."""
        tail = range(tokens - 1, question[-1], -1) if others[-1] <= most else ()
        first = self.ranking[0] if contrast and self.ranking else 0
        self.controls = list(range(max(0, first - CONTROLS), first))
        """Tokens that the ranking ones are compared with."""
        firsts = range(FIRST if first and not past else 0)
        order = dict.fromkeys((*reversed(question), *firsts, *tail))
        self._order = [at for at in order if at < tokens - window]
        self._tokens, self._window, self._budget = tokens, window, budget
        self._gone: dict[int, Tensor] = {}

    def kept(self, limit: int, controls: bool = False) -> list[int]:
        """Positions before the window that are kept whatever they score, of a budget of so many, window included: those
        of the question, the first ones, then those behind the question, the last ones first; with controls, for
        another selection, these as well."""
        most = min(int(limit * SHARE), limit - self._window)
        order = [*self._order, *(at for at in reversed(self.controls) if at not in self._order)]
        return (order if controls else self._order)[: max(0, most)]

    def left(self, tokens: int) -> tuple[list[int], list[int]]:
        """Of the controls and of `ranking`, those that are sure to be there when so many tokens are left."""
        if tokens == self._tokens:
            return self.controls, self.ranking
        sure = {*self.kept(self._budget, True), *range(self._tokens - self._window, self._tokens)}
        ranking = [at for at in self.ranking if at in sure]
        again = tokens > self._budget and ranking
        return [at for at in self.controls if at in sure] if again else [], ranking

    def silent(self, tokens: Tensor) -> Tensor:
        """Which of the controls and of `ranking`, [W] bool, are not in `left` of so many tokens, [] int64."""

        def gone(left: int) -> Tensor:
            if left not in self._gone:
                sure, places = set().union(*self.left(left)), [*self.controls, *self.ranking]
                self._gone[left] = on_device([at not in sure for at in places], tokens.device, torch.bool)
            return self._gone[left]

        again = torch.where(tokens > self._budget, gone(self._budget + 1), gone(self._budget))
        return again & (tokens < self._tokens)


class Questions:
    """The questions of a batch of prompts, some of which have one."""

    def __init__(
        self, questions: Sequence[Tensor | None], lengths: Sequence[int], tokens: int, config: ASLConfig, past: int = 0
    ) -> None:
        """questions: of each row, positions [W] int64 in the padded batch of so many tokens, ascending; None or none
        where it has no question. past: positions that were read before. Raises FlexASLError for positions that the row
        does not have."""
        if len(questions) != len(lengths):
            raise FlexASLError(f"question has {len(questions)} rows where the batch has {len(lengths)}; give as many")
        self._lengths = list(lengths)
        self._budgets = [config.token_budget(length) for length in lengths]
        self._firsts = [tokens - length for length in lengths]
        self.given = list(questions)
        self.rows: list[Asked | None] = []
        for row, (question, length) in enumerate(zip(questions, lengths)):
            first = self._firsts[row]
            given = () if question is None else question
            positions = [at - first for at in ascending(f"question of row {row}: position", given, first, tokens - 1)]
            sizes = length, self._budgets[row], config.window, past, bool(config.contrast)
            self.rows.append(Asked(positions, *sizes) if positions else None)
        self._masks: tuple[Rows | None, dict[tuple[int, ...], Tensor]] = None, {}

    def set_scoring_tokens(self, rows: Rows, left: Tensor | None = None) -> None:
        """Says whose queries rank the tokens that rows have left: where a row has a question, its tokens', after those
        that they are compared with; else the window's. left [B] int64: how many it has where the others are masked
        out."""
        places: list[Tensor | None] = []
        controls = []
        for row, asked in enumerate(self.rows):
            first, ranking = ([], []) if asked is None else asked.left(rows.lengths[row])
            places.append(self._places(rows, row, [*first, *ranking]) if ranking else None)
            controls.append(len(first) if ranking else 0)
        rows.scoring_tokens, rows.controls = places, controls
        if left is not None:
            rows.silent = [None if one is None else one.silent(left[row]) for row, one in enumerate(self.rows)]

    def kept(
        self, rows: Rows, limits: Sequence[int] | None = None, controls: bool = False, cut: Tensor | None = None
    ) -> Tensor:
        """Which of the tokens that are left are kept whatever they score, of so many in each row (None: of what goes
        on); with controls, as another selection comes: [B, M] bool, each row at the right end. cut [B] bool: rows of
        which tokens are masked out."""
        if cut is not None and limits is not None:
            whole, less = (self.kept(rows, some, controls) for some in (limits, list(map(min, limits, self._budgets))))
            return torch.where(cut[:, None], less, whole)
        limits = list(map(min, self._budgets, self._lengths)) if limits is None else limits
        known, made = self._masks
        if known is not rows:
            known, made = self._masks = rows, {}
        wanted = (*limits, controls)
        if wanted not in made:
            mask = torch.zeros(len(rows.lengths), rows.width, dtype=torch.bool, device=rows.positions.device)
            for row, (asked, limit) in enumerate(zip(self.rows, limits)):
                if rows.lengths[row] < self._lengths[row]:  # what was kept before
                    limit = min(limit, self._budgets[row])
                positions = [] if asked is None else sorted(asked.kept(limit, controls))
                if positions:
                    places = self._places(rows, row, positions) + (rows.width - rows.lengths[row])
                    mask[row].index_fill_(0, places, True)
            made[wanted] = mask
        return made[wanted]

    def _places(self, rows: Rows, row: int, positions: Sequence[int]) -> Tensor:
        """The places [W] int64 of positions among the tokens that the row has left."""
        wanted = rows.numbers(positions)
        if rows.lengths[row] == self._lengths[row]:
            return wanted
        left = rows.positions[rows.of(row)].contiguous()
        return torch.searchsorted(left, wanted + self._firsts[row]).clamp(max=rows.lengths[row] - 1)


def spans(positions: Sequence[int]) -> str:
    """Positions in words: `tokens 1,990 to 2,011`, or several such."""
    ends = [place for place in range(1, len(positions)) if positions[place] > positions[place - 1] + 1]
    parts = [positions[start:stop] for start, stop in pairwise([0, *ends, len(positions)])]
    words = [f"{part[0]:,} to {part[-1]:,}" if len(part) > 1 else f"{part[0]:,}" for part in parts]
    return f"token{'s' if len(positions) > 1 else ''} {' and '.join(words)}"
