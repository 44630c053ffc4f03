"""Tokens dropped step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from flexasl.checks import integer
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.asl_two_pass import once_a_prompt
from flexasl.policies.base import CACHE, SCORES, Policy

if TYPE_CHECKING:
    from flexasl.selectors import Selector
    from flexasl.selectors.base import Prompts


class PyramidInfer(Policy):
    """After every layer from `first` on, the tokens that the last ones attend to least are dropped, along a cosine from
    all of them down to `select_tokens` after layer `last` (after PyramidInfer, arXiv 2405.12532).

    Layers count from 0; None is the second layer, and the last but one. The paper sets each model's shares by hand,
    falling with depth; the cosine stands for those. A layer's cache holds the tokens that it ran on.
    """

    name = "pyramid_infer"
    takes = CACHE | SCORES | {"select_tokens"}
    fixes: ClassVar[Mapping[str, Any]] = {"observe_layers": 1, "select_on": "last", "if_never": "select"}
    refusals: ClassVar[Mapping[str, str]] = {
        **once_a_prompt(name),
        **dict.fromkeys(
            ("min_layer", "max_layer"),
            f"would have no effect under policy {name!r}, which has layers of its own: give PyramidInfer(first=..., "
            f"last=...), or '{name}:first=...,last=...'",
        ),
    }

    def __init__(self, first: int | None = None, last: int | None = None) -> None:
        self.first = None if first is None else integer("first", first, 0, error=ConfigError)
        self.last = None if last is None else integer("last", last, 0, error=ConfigError)

    def rule(self, config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> ASLConfig:
        first, last = self._ends(num_layers)
        if not 0 <= first <= last < num_layers:
            raise ConfigError(f"first={first} and last={last} are not layers in order; give 0 to {num_layers - 1}")
        if ranking_layers is not None and len(ranking_layers) < num_layers:
            raise ConfigError(
                f"policy {self.name!r} ranks tokens at every layer, but only layers "
                f"{', '.join(map(str, ranking_layers))} attend to the whole prompt; give another policy"
            )
        return config.scored().replace(min_layer=first, max_layer=last).resolve(num_layers)

    def selector(self, config: ASLConfig, prompts: Prompts) -> Selector:
        from flexasl.selectors import ScheduledSelector

        first, last = self._ends(prompts.num_layers)

        def plan(prompt_tokens: int) -> dict[int, int]:
            least, going = config.token_budget(prompt_tokens), {}
            for layer in range(first, last + 1):
                done = (layer - first + 1) / (last - first + 1)
                share = (1 + math.cos(math.pi * done)) / 2
                going[layer] = least + round((prompt_tokens - least) * share)
            return going

        return ScheduledSelector(plan, config, prompts)

    def _ends(self, num_layers: int) -> tuple[int, int]:
        first = min(1, num_layers - 1) if self.first is None else self.first
        return first, max(first, num_layers - 2) if self.last is None else self.last
