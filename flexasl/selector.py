"""The decision across layers, row by row: token scores in, selected tokens out.

Shapes: B batch, R rows still undecided, O observed layers, P prefix slots, N prompt slots (P + window).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.config import ASLConfig
from flexasl.ops import rank_variance, select_tokens, token_ranks


@dataclass(frozen=True)
class Selection:
    """The tokens of one row that go on to the layers after `layer`."""

    row: int
    layer: int
    keep: Tensor
    """[N] bool over the prompt's slots; padding is False, the window True."""
    settled: bool
    """True where the ranks had settled, False where `max_layer` ended the wait."""


@dataclass
class Trace:
    """What the rule saw in one row, layer by layer."""

    eval_layers: list[int] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    variance_ratio: list[float] = field(default_factory=list)
    union_size: list[int] = field(default_factory=list)


class LayerSelector:
    """Finds, for every row of a left-padded batch, the layer at which its token ranking has settled (arXiv 2601.07667).

    Give it the token scores of the layers for which `needs` is true, in order; `observe` answers with the selections of
    the rows that have settled there. Rows decide independently, and a decided row leaves `rows`. Only the ranks (and,
    for `select_on="max"`, the scores) of the last `observe_layers` layers are held.
    """

    def __init__(
        self,
        config: ASLConfig,
        lengths: Sequence[int],
        *,
        tokens: int | None = None,
        rows: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """config is resolved; lengths are the real tokens of every row, at the right end of `tokens` slots (default:
        the longest row); rows are those to decide (default: all)."""
        self.config = config
        self.lengths = list(lengths)
        self.tokens = max(self.lengths) if tokens is None else tokens
        self.rows = list(range(len(self.lengths))) if rows is None else list(rows)
        self.traces = {row: Trace() for row in self.rows}
        self._prefix = self.tokens - config.window
        assert config.observe_layers and config.tau and config.min_layer is not None and config.max_layer is not None
        self._first, self._last, self._tau = config.min_layer, config.max_layer, config.tau
        self._compares = self._last > self._first
        held = config.observe_layers if self._compares or config.select_on == "max" else 1
        self._ranks: deque[Tensor] = deque(maxlen=held if self._compares else 1)
        self._scores: deque[Tensor] = deque(maxlen=held if config.select_on == "max" else 1)
        self._opens = self._first - held + 1
        self._valid, self._budget = self._rows_tensors(torch.device(device))
        self._reference = torch.zeros(len(self.rows), dtype=torch.float64, device=device)

    def needs(self, layer: int) -> bool:
        """Whether a decision that is still open rests on this layer's scores."""
        if not self.rows or layer > self._last or layer < self._opens:
            return False
        return not (self.config.if_never == "keep" and not self._compares)

    def observe(self, layer: int, scores: Tensor) -> list[Selection]:
        """Takes the scores [R, P] float32 of the rows in `rows`, and returns the selections made at this layer.

        Scores may come without their first columns where these are padding in every row.
        """
        scores = F.pad(scores, (self._prefix - scores.shape[1], 0))
        self._ranks.append(token_ranks(scores, self._valid_prefix))
        self._scores.append(scores)
        if layer < self._first:
            return []
        fired = [False] * len(self.rows)
        if self._compares:
            fired = self._settled(layer)
        settled = list(fired)
        if layer == self._last and self.config.if_never == "select":
            fired = [True] * len(fired)
        if not any(fired):
            return []
        keep = self._keep()
        made = [
            Selection(row, layer, keep[place], settled[place]) for place, row in enumerate(self.rows) if fired[place]
        ]
        self._drop(fired)
        return made

    def _settled(self, layer: int) -> list[bool]:
        variance, union = rank_variance(torch.stack(tuple(self._ranks)), self._budget)
        if layer == self._first:
            self._reference = variance
        elif self.config.variance_reference == "peak":
            self._reference = torch.maximum(self._reference, variance)
        ratio = torch.where(self._reference > 0, variance / self._reference, 0.0)
        seen = torch.stack([variance, union.double(), ratio]).tolist()
        for row, *values in zip(self.rows, *seen, strict=True):
            trace = self.traces[row]
            trace.eval_layers.append(layer)
            trace.variance.append(values[0])
            trace.union_size.append(int(values[1]))
            trace.variance_ratio.append(values[2])
        return [value < self._tau for value in seen[2]]

    def _keep(self) -> Tensor:
        if self.config.select_on == "max":
            ranks = token_ranks(torch.stack(tuple(self._scores)).amax(0), self._valid_prefix)
        else:
            ranks = self._ranks[-1]
        return select_tokens(ranks, self._budget, self.config.window, self._valid)

    def _drop(self, fired: list[bool]) -> None:
        left = [place for place, done in enumerate(fired) if not done]
        self.rows = [self.rows[place] for place in left]
        if not left:
            self._ranks.clear()
            self._scores.clear()
            return
        index = torch.tensor(left, device=self._budget.device)
        for held in (self._ranks, self._scores):
            for _ in range(len(held)):
                held.append(held.popleft()[index])
        self._budget, self._reference = self._budget[index], self._reference[index]
        self._valid = None if self._valid is None else self._valid[index]

    @property
    def _valid_prefix(self) -> Tensor | None:
        return None if self._valid is None else self._valid[:, : self._prefix]

    def _rows_tensors(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Validity [R, N] of the rows' slots, None where there is no padding, and how many prefix tokens each keeps."""
        lengths = [self.lengths[row] for row in self.rows]
        window = self.config.window
        budget = [max(0, min(self.config.token_budget(n), n) - window) for n in lengths]
        starts = torch.tensor([self.tokens - n for n in lengths], device=device)
        padded = any(n < self.tokens for n in lengths)
        valid = torch.arange(self.tokens, device=device) >= starts[:, None] if padded else None
        return valid, torch.tensor(budget, device=device)
