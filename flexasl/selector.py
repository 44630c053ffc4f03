"""The decision across layers, row by row: token scores in, selected tokens out.

Shapes: B batch, R rows still undecided, O observed layers, P prefix slots, N prompt slots (P + window).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from flexasl.checks import instance, integer
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.masks import Visibility
from flexasl.ops import rank_variance, select_tokens, token_ranks


@dataclass(frozen=True)
class Selection:
    """The tokens of one row that go on to the layers after `layer`."""

    row: int
    layer: int
    keep: Tensor
    """[N] bool over the prompt's slots; padding is False, the window True."""
    count: int
    """How many stay."""

    @property
    def slots(self) -> Tensor:
        """[K] int64, ascending: what to gather, for a run in which the other tokens are dropped."""
        return self.keep.nonzero()[:, 0]

    def block_mask(self, sliding_window: int | None = None, heads: int = 1) -> BlockMask:
        """[1, 1, N, N] for `flex_attention`, for a run in which all tokens stay and the others are masked out. A token
        that does not stay sees itself only."""
        at = torch.arange(self.keep.shape[0], dtype=torch.int64, device=self.keep.device)[None]
        return Visibility(at, at, self.keep[None]).block_mask(sliding_window, heads)


@dataclass
class Trace:
    """What the rule saw in one row, layer by layer."""

    eval_layers: list[int] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    variance_ratio: list[float] = field(default_factory=list)
    union_size: list[int] = field(default_factory=list)

    def cut(self, layer: int) -> None:
        """Forgets what came after this layer."""
        count = sum(seen <= layer for seen in self.eval_layers)
        for values in (self.eval_layers, self.variance, self.variance_ratio, self.union_size):
            del values[count:]


class Settling(NamedTuple):
    """How much ranks still move, one entry per row."""

    variance: Tensor
    """[R] float64."""
    union: Tensor
    """[R] int64: tokens that the variance is taken over."""
    reference: Tensor
    """[R] float64: what the variance is compared with."""
    ratio: Tensor
    """[R] float64; 0 where the reference is."""


def settle(ranks: Tensor, budget: Tensor, reference: Tensor | None, peak: bool) -> Settling:
    """Compares the rank variance of ranks [O, R, P] under budget [R] with the reference [R]; with None this is the
    first variance, and with `peak` a higher one replaces it. Section 3.2 of arXiv 2601.07667."""
    variance, union = rank_variance(ranks, budget)
    if reference is None:
        reference = variance
    elif peak:
        reference = torch.maximum(reference, variance)
    ratio = torch.where(reference > 0, variance / reference, 0.0)
    return Settling(variance, union, reference, ratio)


FADE = 0.8
"""What a score counts one layer later, for `select_on="recent"`."""


def scores_to_select_on(scores: Sequence[Tensor], select_on: str) -> Tensor:
    """What tokens are selected on, of the same shape as the scores of each observed layer, the selection layer's last:
    see `ASLConfig.select_on`."""
    if select_on == "last":
        return scores[-1]
    best = scores[0]
    for later in scores[1:]:
        best = torch.maximum(best * FADE if select_on == "recent" else best, later)
    return best


class LayerSelector:
    """Finds, for every row of a left-padded batch, the layer at which its token ranking has settled (arXiv 2601.07667).

    Give it the token scores of the layers for which `needs` is true, in order: `observe` says which rows have settled
    there, and `select` takes them out of `rows`. Rows decide independently. Only the ranks (and, unless
    `select_on="last"`, the scores) of the last `observe_layers` layers are held.
    """

    def __init__(
        self,
        config: ASLConfig,
        lengths: Sequence[int],
        *,
        tokens: int | None = None,
        rows: Sequence[int] | None = None,
        voters: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """config is resolved; lengths are the real tokens of every row, at the right end of `tokens` slots (default:
        the longest row); rows are those to decide (default: all); voters are the layers whose ranks count, ascending
        (default: all up to `max_layer`)."""
        self.config = _checked(config, voters)
        self.lengths = [integer("lengths", length, 0) for length in lengths]
        most = max(self.lengths, default=0)
        self.tokens = most if tokens is None else integer("tokens", tokens, most)
        self.rows = list(range(len(self.lengths))) if rows is None else list(rows)
        self._traces = {row: Trace() for row in self.rows}
        self._seen: list[tuple[int, list[int], Tensor]] = []
        self._prefix = self.tokens - config.window
        assert config.observe_layers and config.tau and config.min_layer is not None and config.max_layer is not None
        self._first, self._last, self._tau = config.min_layer, config.max_layer, config.tau
        voters = range(self._last + 1) if voters is None else voters
        self._peak = config.variance_reference == "peak"
        self._compares = self._last > self._first
        looks_back = config.select_on != "last"
        held = config.observe_layers if self._compares or looks_back else 1
        # Lists that are cut by hand: torch.compile (2.13) forgets the `maxlen` of a deque.
        self._ranks: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._held = (held if self._compares else 1, held if looks_back else 1)
        opens = voters.index(self._first) - held + 1
        self._needed = frozenset(voters[max(0, opens) : voters.index(self._last) + 1])
        self._valid, self._budget = self._rows_tensors(torch.device(device))
        self._reference = torch.zeros(len(self.rows), dtype=torch.float64, device=device)

    def needs(self, layer: int) -> bool:
        """Whether a decision that is still open rests on this layer's scores."""
        if not self.rows or layer not in self._needed:
            return False
        return not (self.config.if_never == "keep" and not self._compares)

    def observe(self, layer: int, scores: Tensor) -> Tensor | None:
        """Takes the scores [R, P] float32 of the rows in `rows`; returns which of them have settled [R] bool, or None
        where it is too early to tell. Nothing is moved to the host.

        Scores may come without their first columns where these are padding in every row.
        """
        scores = F.pad(scores, (self._prefix - scores.shape[1], 0))
        most_ranks, most_scores = self._held
        self._ranks = [*self._ranks, token_ranks(scores, self._valid_prefix)][-most_ranks:]
        self._scores = [*self._scores, scores][-most_scores:]
        if layer < self._first:
            return None
        settled = torch.zeros_like(self._budget, dtype=torch.bool)
        if self._compares:
            ranks = torch.stack(self._ranks)
            seen = settle(ranks, self._budget, None if layer == self._first else self._reference, self._peak)
            self._reference = seen.reference
            self._seen.append((layer, list(self.rows), torch.stack([seen.variance, seen.union.double(), seen.ratio])))
            settled = seen.ratio < self._tau
        return settled | self.must_select(layer)

    @property
    def earliest(self) -> int | None:
        """The first layer at which a row may select; None where none will."""
        return self._first if self.rows and self.needs(self._first) else None

    def must_select(self, layer: int) -> bool:
        """Whether the wait ends at this layer, settled or not."""
        return layer == self._last and self.config.if_never == "select"

    def choose(self) -> Tensor:
        """Tokens of each row in `rows` that would stay if it selected now: [R, N] bool."""
        ranks = self._ranks[-1]
        if len(self._scores) > 1:
            ranks = token_ranks(scores_to_select_on(self._scores, self.config.select_on), self._valid_prefix)
        return select_tokens(ranks, self._budget, self.config.window, self._valid)

    def select(self, layer: int, settled: Tensor | None) -> list[Selection]:
        """The selections of the rows that `observe` found settled, which leave `rows`. Moves one bool a row to the
        host, or none where the wait ends."""
        if settled is None:
            return []
        fired = [True] * len(self.rows) if self.must_select(layer) else settled.tolist()
        if not any(fired):
            return []
        keep = self.choose()
        made = [
            Selection(row, layer, keep[place], budget_of(self.config, self.lengths[row]))
            for place, row in enumerate(self.rows)
            if fired[place]
        ]
        self._drop(fired)
        return made

    @property
    def traces(self) -> dict[int, Trace]:
        """What the rule has seen, for each row that it was to decide."""
        for layer, rows, values in self._seen:
            for row, variance, union, ratio in zip(rows, *values.tolist(), strict=True):
                trace = self._traces[row]
                trace.eval_layers.append(layer)
                trace.variance.append(variance)
                trace.union_size.append(int(union))
                trace.variance_ratio.append(ratio)
        self._seen.clear()
        return self._traces

    def _drop(self, fired: list[bool]) -> None:
        left = [place for place, done in enumerate(fired) if not done]
        self.rows = [self.rows[place] for place in left]
        index = torch.tensor(left, dtype=torch.int64, device=self._budget.device)
        self._ranks = [ranks[index] for ranks in self._ranks] if left else []
        self._scores = [scores[index] for scores in self._scores] if left else []
        self._budget, self._reference = self._budget[index], self._reference[index]
        self._valid = None if self._valid is None else self._valid[index]

    @property
    def _valid_prefix(self) -> Tensor | None:
        return None if self._valid is None else self._valid[:, : self._prefix]

    def _rows_tensors(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Validity [R, N] of the rows' slots, None where there is no padding, and how many prefix tokens each keeps."""
        lengths = [self.lengths[row] for row in self.rows]
        window = self.config.window
        budget = [max(0, budget_of(self.config, n) - window) for n in lengths]
        starts = torch.tensor([self.tokens - n for n in lengths], dtype=torch.int64, device=device)
        padded = any(n < self.tokens for n in lengths)
        valid = torch.arange(self.tokens, dtype=torch.int64, device=device) >= starts[:, None] if padded else None
        return valid, torch.tensor(budget, dtype=torch.int64, device=device)


def _checked(config: ASLConfig, voters: Sequence[int] | None) -> ASLConfig:
    """The settings, which must be resolved, and for layers that vote."""
    instance("config", config, ASLConfig, "an ASLConfig")
    refuse_open(config)
    for name in ("min_layer", "max_layer"):
        layer = getattr(config, name)
        if voters is not None and layer not in voters:
            raise ConfigError(
                f"{name}={layer} does not see the whole prompt; give one of {', '.join(map(str, voters))}, "
                "or settings resolved for these voters"
            )
    return config


class StepSelector:
    """Drops tokens of every row at several layers, each time those that this layer ranks last.

    Like `LayerSelector`, but it decides at layers known beforehand, on the tokens that are left: give `select` their
    columns.
    """

    def __init__(self, steps: dict[int, dict[int, int]], tokens: int, window: int) -> None:
        """steps: by row and layer, how many tokens go on, window included; tokens: N."""
        self.rows = list(steps)
        self.traces: dict[int, Trace] = {row: Trace() for row in self.rows}
        self._steps = steps
        self._tokens = tokens
        self._window = window
        self._scores: Tensor | None = None

    def needs(self, layer: int) -> bool:
        """Whether a row drops tokens at this layer."""
        return any(layer in steps for steps in self._steps.values())

    @property
    def earliest(self) -> int | None:
        """The first layer at which a row drops tokens; None where none will."""
        return min((layer for steps in self._steps.values() for layer in steps), default=None)

    def observe(self, layer: int, scores: Tensor) -> None:
        """Takes the scores [R, P] float32 of the rows in `rows`, each row's at the right end."""
        self._scores = scores

    def select(self, layer: int, columns: list[Tensor]) -> list[Selection]:
        """The selections of all rows that have more tokens, at these columns [M] each, than go on from this layer."""
        assert self._scores is not None
        made = []
        for scores, row, at in zip(self._scores, self.rows, columns, strict=True):
            count = self._steps[row].get(layer, len(at))
            if count >= len(at):
                continue
            prefix = len(at) - self._window
            ranks = token_ranks(scores[None, scores.shape[0] - prefix :])
            budget = torch.tensor([count - self._window], dtype=torch.int64, device=at.device)
            keep = at.new_zeros(self._tokens, dtype=torch.bool)
            keep[at] = select_tokens(ranks, budget, self._window)[0]
            made.append(Selection(row, layer, keep, count))
        self._scores = None
        return made


def budget_of(config: ASLConfig, prompt_tokens: int) -> int:
    """Tokens that go on from a prompt that is selected from."""
    return min(config.token_budget(prompt_tokens), prompt_tokens)
