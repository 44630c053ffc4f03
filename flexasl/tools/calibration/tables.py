"""What a setting makes of one recorded prompt, by the rule itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from flexasl.config import ASLConfig
from flexasl.replaying import decided
from flexasl.report import RowReport
from flexasl.selectors.staged import waited
from flexasl.tools.calibration.recording import Prompt, Recording
from flexasl.tools.evaluation.costs import LayerCost, row_share


class Outcome(NamedTuple):
    """What a setting makes of one prompt."""

    layer: int | None
    """The layer of the last selection; None where every token is kept."""
    held: bool
    """Whether the answer's tokens are in the selection."""
    cost: float
    """Operations of the prefill, as a share of the full one's."""
    layers: tuple[int, ...] = ()
    """Those of all selections."""
    waited: bool = False
    """Whether `max_layer` decided, because nothing was looked up before."""


class Table:
    """One prompt under any setting of the rule, with the same window and scores."""

    def __init__(
        self, recording: Recording, costs: Sequence[LayerCost], ranking_layers: Sequence[int] | None = None
    ) -> None:
        """costs are those of all layers; ranking_layers are the layers whose ranks count, ascending (default: all)."""
        self.recording = recording
        self.ranking_layers = list(range(len(costs)) if ranking_layers is None else ranking_layers)
        self._costs = costs
        self._slides = any(cost.window is not None for cost in costs)
        self._known_costs: dict[Any, float] = {}
        self._settled: dict[ASLConfig, Outcome] = {}
        """By rule without its `max_layer`, what a look-up decided: the same for every `max_layer` from there on."""

    def outcome(self, rule: ASLConfig) -> Outcome:
        """What the rule, which is resolved, decides."""
        without_end = rule.replace(max_layer=None)
        known = self._settled.get(without_end)
        if (
            known is not None
            and known.layer is not None
            and rule.max_layer is not None
            and known.layer <= rule.max_layer
        ):
            return known
        outcome, final = self._replayed(rule)
        if final and not outcome.waited:
            self._settled[without_end] = outcome
        return outcome

    def _replayed(self, rule: ASLConfig) -> tuple[Outcome, bool]:
        """What the rule decides, and whether the final selection was made."""
        recording = self.recording
        told, selector = decided(recording.scores, rule, self.ranking_layers, recording.question)
        if told.selected is None or told.selected_layer is None:
            return Outcome(None, True, 1.0), False
        positions, layers = told.selected.tolist(), tuple(layer for layer, _ in told.selections)
        late = waited(rule, told.selected_layer, selector.traces[0], selector.asked[0])
        cost = self._cost(told.selections, positions, rule.window)
        held = holds_answers(recording.prompt, positions)
        return Outcome(told.selected_layer, held, cost, layers, late), not selector.rows

    def _cost(self, made: Sequence[tuple[int, int]], positions: Sequence[int], window: int) -> float:
        """Of selections (layer, tokens that are kept), the last of which leaves these positions. Where no layer slides,
        the positions do not matter."""
        key = (*made, *(positions if self._slides else ()))
        if key not in self._known_costs:
            tokens = self.recording.scores.shape[1] + window
            counts = [tokens] * (made[0][0] + 1)
            for (layer, count), (following, _) in pairwise([*made, (len(self._costs) - 1, 0)]):
                counts += [count] * (following - layer)
            row = RowReport(
                prompt_tokens=tokens,
                kept_tokens=len(positions),
                selected_layer=made[-1][0],
                reason="",
                kept_positions=tuple(positions),
                layer_tokens=tuple(counts),
            )
            self._known_costs[key] = row_share(self._costs, row)
        return self._known_costs[key]


def holds_answers(prompt: Prompt, positions: Sequence[int]) -> bool:
    """Whether the positions hold, of each reference, nine tenths of the tokens of one statement at least."""
    kept = set(positions)

    def holds(statement: tuple[int, ...]) -> bool:
        return 10 * len(kept.intersection(statement)) >= 9 * len(statement)

    return all(any(holds(statement) for statement in answer) for answer in prompt.answers)
