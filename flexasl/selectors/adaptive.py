"""Adaptive layer selection: each row selects once, where its ranking has settled.

Shapes: R undecided rows, O observed layers, S evaluated layers, P prefix tokens, N prompt tokens (P + window).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.checks import instance, renames
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.numbers import on_device
from flexasl.ops import rank_variance, select_tokens, token_ranks
from flexasl.selectors.base import Selection, Selector, Trace, batch_of, budget_of, combined, within_budget


def variance_ratio(variance: Tensor, variance_reference: str) -> Tensor:
    """Rank variance [S, ...] of successive layers, over its first value (`"initial"`) or over the highest one so far
    (`"peak"`): [S, ...]; 0 where that is 0. Section 3.2 of arXiv 2601.07667."""
    reference = variance.cummax(0).values if variance_reference == "peak" else variance[:1]
    return torch.where(reference > 0, variance / reference, 0.0)


def scores_to_select_on(scores: Sequence[Tensor], select_on: str) -> Tensor:
    """What tokens are selected on, of the same shape as the scores of each observed layer, the selection layer's last:
    see `ASLConfig.select_on`."""
    if select_on == "last":
        return scores[-1]
    best = scores[0]
    for later in scores[1:]:
        best = combined(best, later, select_on)
    return best


class LayerSelector(Selector):
    """Selects once in every row of a left-padded batch, at the layer at which its token ranking has settled (arXiv
    2601.07667).

    Give it the token scores of the layers for which `needs` is true, in order. Rows decide independently, and leave
    `rows` when they have selected. It holds only the ranks (and, unless `select_on="last"`, the scores) of the last
    `observe_layers` layers.
    """

    once = True
    masks = True

    @renames(voters="ranking_layers")
    def __init__(
        self,
        config: ASLConfig,
        lengths: Sequence[int],
        *,
        tokens: int | None = None,
        rows: Sequence[int] | None = None,
        ranking_layers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """config is resolved; lengths are the real tokens of every row, at the right end of `tokens` places (default:
        the longest row); rows are those to decide (default: all); ranking_layers are those whose ranks count, ascending
        (default: all up to `max_layer`)."""
        self.config = _checked(config, ranking_layers)
        self.lengths, self.tokens, self.rows = batch_of(lengths, tokens, rows)
        self._traces = {row: Trace() for row in self.rows}
        self._seen: list[tuple[int, list[int], Tensor]] = []
        self._prefix = self.tokens - config.window
        assert config.observe_layers and config.tau and config.min_layer is not None and config.max_layer is not None
        self._first, self._last, self._tau = config.min_layer, config.max_layer, config.tau
        self._compares = self._last > self._first
        looks_back = config.select_on != "last"
        held = config.observe_layers if self._compares or looks_back else 1
        # Lists that are cut by hand: torch.compile (2.13) forgets the `maxlen` of a deque.
        self._ranks: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._variances: list[Tensor] = []
        self._held = (held if self._compares else 1, held if looks_back else 1)
        counting = range(self._last + 1) if ranking_layers is None else ranking_layers
        opens = counting.index(self._first) - held + 1
        self._needed = frozenset(counting[max(0, opens) : counting.index(self._last) + 1])
        self._valid, self._budget = self._rows_tensors(torch.device(device))
        self._settled: Tensor | None = None
        self.first_layer = self._first if self.rows and self.needs(self._first) else None

    def needs(self, layer: int) -> bool:
        if not self.rows or layer not in self._needed:
            return False
        return not (self.config.if_never == "keep" and not self._compares)

    def observe(self, layer: int, scores: Tensor) -> None:
        """Takes scores [R, P] float32; they may come without their first positions where these are padding in every
        row. Nothing is moved to the host."""
        scores = F.pad(scores, (self._prefix - scores.shape[1], 0))
        most_ranks, most_scores = self._held
        self._ranks = [*self._ranks, token_ranks(scores, self._valid_prefix)][-most_ranks:]
        self._scores = [*self._scores, scores][-most_scores:]
        if layer < self._first:
            return
        self._settled = torch.zeros_like(self._budget, dtype=torch.bool)
        if self._compares:
            variance, union = rank_variance(torch.stack(self._ranks), self._budget)
            self._variances.append(variance)
            ratio = variance_ratio(torch.stack(self._variances), self.config.variance_reference or "peak")[-1]
            self._seen.append((layer, list(self.rows), torch.stack([variance, union.double(), ratio])))
            self._settled = ratio < self._tau

    def select(self, layer: int) -> list[Selection]:
        """The selections of the rows whose ranking has settled, which leave `rows`. Moves one bool a row to the host,
        or none where the wait ends."""
        if self._settled is None:
            return []
        settled = [1] * len(self.rows) if self._must_select(layer) else self.look(self._settled)
        fired = list(map(bool, settled))
        if not any(fired):
            return []
        keep = self._choose()
        made = [
            Selection(row, layer, keep[place], budget_of(self.config, self.lengths[row]))
            for place, row in enumerate(self.rows)
            if fired[place]
        ]
        self._drop(fired)
        return made

    def mask(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if self._settled is None:
            return None
        return self._settled | self._must_select(layer), self._choose()

    @property
    def traces(self) -> Mapping[int, Trace]:
        read = torch.cat([values for _, _, values in self._seen], 1).T.tolist() if self._seen else []
        for layer, rows, _ in self._seen:
            own, read = read[: len(rows)], read[len(rows) :]
            for row, (variance, union, ratio) in zip(rows, own, strict=True):
                trace = self._traces[row]
                trace.eval_layers.append(layer)
                trace.variance.append(variance)
                trace.union_size.append(int(union))
                trace.variance_ratio.append(ratio)
        self._seen.clear()
        return self._traces

    def reason(self, row: int, selection: Selection | None) -> str:
        config, trace = self.config, self.traces.get(row)
        if trace is None:
            return within_budget(config, self.lengths[row])
        if not self._compares:
            return f"the policy selects at layer {config.max_layer}"
        if selection is not None and trace.variance_ratio[-1] < self._tau:
            return f"the variance ratio fell to {trace.variance_ratio[-1]:.3f}, below tau={config.tau}"
        lowest = min(trace.variance_ratio, default=float("nan"))
        waited = f"the variance ratio never fell below tau={config.tau} (lowest {lowest:.3f})"
        if selection is None:
            return f"{waited}; if_never='keep' keeps every token"
        return f"{waited} by max_layer={config.max_layer}; if_never='select' selects there"

    def _must_select(self, layer: int) -> bool:
        """Whether the wait ends at this layer, settled or not."""
        return layer == self._last and self.config.if_never == "select"

    def _choose(self) -> Tensor:
        """Tokens of each row in `rows` that would be kept if it selected now: [R, N] bool."""
        ranks = self._ranks[-1]
        if len(self._scores) > 1:
            scores = scores_to_select_on(self._scores, self.config.select_on or "recent")
            ranks = token_ranks(scores, self._valid_prefix)
        return select_tokens(ranks, self._budget, self.config.window, self._valid)

    def _drop(self, fired: list[bool]) -> None:
        left = [place for place, done in enumerate(fired) if not done]
        self.rows = [self.rows[place] for place in left]
        index = on_device(left, self._budget.device)
        self._ranks, self._scores, self._variances = (
            [states[index] for states in held] if left else [] for held in (self._ranks, self._scores, self._variances)
        )
        self._budget, self._settled = self._budget[index], None
        self._valid = None if self._valid is None else self._valid[index]

    @property
    def _valid_prefix(self) -> Tensor | None:
        return None if self._valid is None else self._valid[:, : self._prefix]

    def _rows_tensors(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Validity [R, N] of the rows' places, None where there is no padding, and how many prefix tokens each
        keeps."""
        lengths = [self.lengths[row] for row in self.rows]
        window = self.config.window
        budget = [max(0, budget_of(self.config, n) - window) for n in lengths]
        starts = on_device([self.tokens - n for n in lengths], device)
        padded = any(n < self.tokens for n in lengths)
        valid = torch.arange(self.tokens, dtype=torch.int64, device=device) >= starts[:, None] if padded else None
        return valid, on_device(budget, device)


def _checked(config: ASLConfig, ranking_layers: Sequence[int] | None) -> ASLConfig:
    """The settings, which must be resolved, and for these layers."""
    if instance("config", config, ASLConfig, "an ASLConfig").rule == "lookup":
        raise ConfigError("settled_by='lookup' is for StagedSelector, in a prefill; give settled_by='variance'")
    refuse_open(config)
    for name in ("min_layer", "max_layer"):
        layer = getattr(config, name)
        if ranking_layers is not None and layer not in ranking_layers:
            raise ConfigError(
                f"{name}={layer} does not attend to the whole prompt; give one of "
                f"{', '.join(map(str, ranking_layers))}, "
                "or settings resolved for these ranking_layers"
            )
    return config
