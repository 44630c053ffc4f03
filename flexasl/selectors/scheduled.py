"""Selection at layers that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flexasl.checks import integer, shown
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.numbers import on_device
from flexasl.ops import select_tokens, token_ranks
from flexasl.selectors.base import Prompts, Selection, Selector, within_budget


class ScheduledSelector(Selector):
    """Selects after the layers of a plan, each time the tokens that this layer scores best of those that are left."""

    def __init__(self, plan: Callable[[int], Mapping[int, int]], config: ASLConfig, prompts: Prompts) -> None:
        """plan(prompt_tokens): how many tokens are kept, window included, by layer. Raises `ConfigError` where it
        cannot work."""
        self.rows = list(prompts.rows)
        self._config, self._prompts = config, prompts
        self._plans = {row: _checked(plan(prompts.lengths[row]), config, prompts, row) for row in self.rows}
        self._left = list(prompts.lengths)
        self._scores = torch.empty(0, dtype=torch.float32, device="cpu")
        self._layers = sorted({layer for plan in self._plans.values() for layer in plan})
        self.first_layer = self._layers[0] if self._layers else None

    def needs(self, layer: int) -> bool:
        return layer in self._layers

    def observe(self, layer: int, scores: Tensor) -> None:
        self._scores = scores

    def select(self, layer: int) -> list[Selection]:
        made = []
        for scores, row in zip(self._scores, self.rows, strict=True):
            left, window = self._left[row], self._config.window
            count = self._plans[row].get(layer, left)
            if count >= left:
                continue
            ranks = token_ranks(scores[None, scores.shape[0] - left + window :])
            budget = on_device([count - window], scores.device)
            made.append(Selection(row, layer, select_tokens(ranks, budget, window)[0], count))
            self._left[row] = count
        return made

    def reason(self, row: int, selection: Selection | None) -> str:
        if row not in self._plans:
            return within_budget(self._config, self._prompts.lengths[row])
        return f"the policy drops tokens step by step, from layer {self._layers[0]} to layer {self._layers[-1]}"


def _checked(plan: Mapping[int, int], config: ASLConfig, prompts: Prompts, row: int) -> dict[int, int]:
    """The plan of a row."""
    if not isinstance(plan, Mapping):
        raise ConfigError(f"plan returned {shown(plan)}; return how many tokens are kept, by layer, as a dict")
    name = f"plan: tokens after layer {{}}, window={config.window} included"
    checked = {
        integer("plan: layer", layer, 0, prompts.num_layers - 1, error=ConfigError): integer(
            name.format(layer), count, config.window, error=ConfigError
        )
        for layer, count in plan.items()
    }
    ranking = prompts.ranking_layers
    for layer, count in checked.items():
        if ranking is not None and layer not in ranking and count < prompts.lengths[row]:
            raise ConfigError(
                f"plan drops tokens after layer {layer}, which does not attend to the whole prompt; layers that do are "
                f"{', '.join(map(str, ranking))}"
            )
    return checked
