"""What every setting makes of one recorded prompt, looked up: ranks, variances and selections are taken once for all.

Shapes: V layers whose ranks count (ranking_layers), O observed layers, P prefix tokens, N prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexasl.config import ASLConfig
from flexasl.ops import rank_variance, select_tokens, token_ranks
from flexasl.report import RowReport
from flexasl.selectors.adaptive import scores_to_select_on, variance_ratio
from flexasl.selectors.base import budget_of
from flexasl.tools.calibration.recording import Prompt, Recording
from flexasl.tools.evaluation.costs import LayerCost, row_share


class Outcome(NamedTuple):
    """What a setting makes of one prompt."""

    layer: int | None
    """The selection layer; None where every token is kept."""
    kept: bool
    """Whether the answer's tokens are in the selection."""
    cost: float
    """Operations of the prefill, as a share of the full one's."""


class Table:
    """One prompt under any setting of the rule, with the same budget, window and scores.

    `outcome` says what `LayerSelector` decides on the same scores; it is quick because settings share the variance by
    `observe_layers`, and the selection by `observe_layers` and `select_on`.
    """

    def __init__(
        self,
        recording: Recording,
        config: ASLConfig,
        costs: Sequence[LayerCost],
        ranking_layers: Sequence[int] | None = None,
    ) -> None:
        """costs are those of all layers; ranking_layers are the layers whose ranks count, ascending (default: all)."""
        self.prompt = recording.prompt
        self.ranking_layers = list(range(len(costs)) if ranking_layers is None else ranking_layers)
        self._costs = costs
        self._window = config.window
        self._tokens = recording.scores.shape[1] + config.window
        self._budget = max(0, budget_of(config, self._tokens) - config.window)
        self._scores = recording.scores[self.ranking_layers]
        self._ranks = token_ranks(self._scores)
        self._variances: dict[int, Tensor] = {}
        self._ratios: dict[tuple[int, int, str], list[float]] = {}
        self._selections: dict[tuple[int, str], list[Outcome]] = {}

    def outcome(self, rule: ASLConfig) -> Outcome:
        """What the rule, which is resolved, decides; as `LayerSelector` does."""
        assert rule.observe_layers and rule.min_layer is not None and rule.max_layer is not None
        place = self._place(rule, self.ranking_layers.index(rule.min_layer), self.ranking_layers.index(rule.max_layer))
        if place is None:
            return Outcome(None, True, 1.0)
        return self._selected(rule.observe_layers, rule.select_on or "last")[place]

    def fixed(self, layer: int) -> Outcome:
        """Selection at this layer, on its own scores."""
        return self._selected(1, "last")[self.ranking_layers.index(layer)]

    def _place(self, rule: ASLConfig, first: int, last: int) -> int | None:
        never = last if rule.if_never == "select" else None
        if first == last:
            return never
        assert rule.observe_layers and rule.tau
        ratios = self._ratio(rule.observe_layers, first, rule.variance_reference or "peak")[: last - first + 1]
        return next((first + place for place, ratio in enumerate(ratios) if ratio < rule.tau), never)

    def _ratio(self, observe: int, first: int, reference: str) -> list[float]:
        """The variance ratio at each place among the ranking_layers from the first on."""
        if observe not in self._variances:
            ranks = _windows(self._ranks, observe)
            budget = torch.full((ranks.shape[1],), self._budget, dtype=torch.int64, device=ranks.device)
            self._variances[observe] = rank_variance(ranks, budget)[0]
        if (observe, first, reference) not in self._ratios:
            variance = self._variances[observe][first - observe + 1 :]
            self._ratios[observe, first, reference] = variance_ratio(variance, reference).tolist()
        return self._ratios[observe, first, reference]

    def _selected(self, observe: int, select_on: str) -> list[Outcome]:
        """By place among the ranking_layers, selection there on the scores of so many layers."""
        observe = 1 if select_on == "last" else observe
        if (observe, select_on) not in self._selections:
            scores = scores_to_select_on(_windows(self._scores, observe).unbind(), select_on)
            ranks = token_ranks(scores) if observe > 1 else self._ranks
            budget = torch.full((len(ranks),), self._budget, dtype=torch.int64, device=ranks.device)
            keeps = select_tokens(ranks, budget, self._window)
            none = [Outcome(None, False, float("nan"))] * (observe - 1)
            found = [
                self._judge(layer, keep) for layer, keep in zip(self.ranking_layers[observe - 1 :], keeps, strict=True)
            ]
            self._selections[observe, select_on] = none + found
        return self._selections[observe, select_on]

    def _judge(self, layer: int, keep: Tensor) -> Outcome:
        positions = tuple(keep.nonzero()[:, 0].tolist())
        deeper = len(self._costs) - layer - 1
        told = RowReport(
            prompt_tokens=self._tokens,
            kept_tokens=len(positions),
            selected_layer=layer,
            reason="",
            kept_positions=positions,
            layer_tokens=(self._tokens,) * (layer + 1) + (len(positions),) * deeper,
        )
        return Outcome(layer, holds_answers(self.prompt, positions), row_share(self._costs, told))


def holds_answers(prompt: Prompt, positions: Sequence[int]) -> bool:
    """Whether the positions hold, of each reference, nine tenths of the tokens of one statement at least."""
    kept = set(positions)

    def holds(statement: tuple[int, ...]) -> bool:
        return 10 * len(kept.intersection(statement)) >= 9 * len(statement)

    return all(any(holds(statement) for statement in answer) for answer in prompt.answers)


def _windows(by_layer: Tensor, observe: int) -> Tensor:
    """[V, P] as [O, V - O + 1, P]: for each place that has so many, what it and those before it hold."""
    places = len(by_layer) - observe + 1
    return torch.stack([by_layer[first : first + places] for first in range(observe)])
