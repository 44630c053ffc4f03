"""What a setting makes of one recorded prompt, by the rule itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from flexasl.config import ASLConfig
from flexasl.replaying import decided
from flexasl.report import RowReport
from flexasl.tools.calibration.recording import Prompt, Recording
from flexasl.tools.evaluation.costs import LayerCost, row_share


class Outcome(NamedTuple):
    """What a setting makes of one prompt."""

    layer: int | None
    """The layer of the last selection; None where every token is kept."""
    kept: bool
    """Whether the answer's tokens are in the selection."""
    cost: float
    """Operations of the prefill, as a share of the full one's."""
    layers: tuple[int, ...] = ()
    """Those of all selections."""


class Table:
    """One prompt under any setting of the rule, with the same window and scores."""

    def __init__(
        self, recording: Recording, costs: Sequence[LayerCost], ranking_layers: Sequence[int] | None = None
    ) -> None:
        """costs are those of all layers; ranking_layers are the layers whose ranks count, ascending (default: all)."""
        self.recording = recording
        self.ranking_layers = list(range(len(costs)) if ranking_layers is None else ranking_layers)
        self._costs = costs
        self._costs_known: dict[tuple[tuple[int, int], ...], float] = {}

    def outcome(self, rule: ASLConfig) -> Outcome:
        """What the rule, which is resolved, decides."""
        recording = self.recording
        told, _ = decided(recording.scores, rule, self.ranking_layers, recording.question)
        if told.selected is None:
            return Outcome(None, True, 1.0)
        positions, made = tuple(told.selected.tolist()), tuple(told.selections)
        if made not in self._costs_known:
            self._costs_known[made] = self._cost(made, positions, recording.scores.shape[1] + rule.window)
        layers = tuple(layer for layer, _ in made)
        return Outcome(told.selected_layer, holds_answers(recording.prompt, positions), self._costs_known[made], layers)

    def _cost(self, made: Sequence[tuple[int, int]], positions: tuple[int, ...], tokens: int) -> float:
        ends = [*made, (len(self._costs) - 1, 0)]
        counts = [tokens] * (made[0][0] + 1)
        for (layer, count), (following, _) in pairwise(ends):
            counts += [count] * (following - layer)
        row = RowReport(
            prompt_tokens=tokens,
            kept_tokens=len(positions),
            selected_layer=made[-1][0],
            reason="",
            kept_positions=positions,
            layer_tokens=tuple(counts),
        )
        return row_share(self._costs, row)


def holds_answers(prompt: Prompt, positions: Sequence[int]) -> bool:
    """Whether the positions hold, of each reference, nine tenths of the tokens of one statement at least."""
    kept = set(positions)

    def holds(statement: tuple[int, ...]) -> bool:
        return 10 * len(kept.intersection(statement)) >= 9 * len(statement)

    return all(any(holds(statement) for statement in answer) for answer in prompt.answers)
