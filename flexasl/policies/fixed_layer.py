"""Selection at a fixed layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flexasl.checks import real
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.base import RULE, Policy


def own_layer(name: str, kind: str) -> Mapping[str, str]:
    """Refusals of a policy that selects at one layer, which is its own setting."""
    why = f"would have no effect under policy {name!r}, which selects at its own layer: give {kind}(layer=...)"
    return dict.fromkeys(("tau", "min_layer", "max_layer", "observe_layers"), f"{why}, or '{name}:layer=...'")


class FixedLayer(Policy):
    """Selects tokens at one layer for every prompt, on that layer's scores (FastKV, arXiv 2502.01068).

    `layer` counts from 0; None is the middle of the stack, FastKV's choice for Llama 3.1 8B (layer 15 of 32).
    """

    name = "fixed_layer"
    takes = Policy.takes - RULE
    fixes: ClassVar[Mapping[str, Any]] = {"observe_layers": 1, "select_on": "last", "if_never": "select"}
    refusals: ClassVar[Mapping[str, str]] = own_layer(name, "FixedLayer")

    def __init__(self, layer: int | None = None, *, depth: float = 0.5) -> None:
        """depth: where None is, as a share of the layers."""
        # Whether it is a layer is for the model to say.
        self.layer = None if layer is None else real("layer", layer, "an int from 0 on, or None", error=ConfigError)
        self.depth = real("depth", depth, "a share of the layers, in [0, 1]", error=ConfigError)
        if not 0 <= self.depth <= 1:
            raise ConfigError(f"depth={depth} is out of range; give a share of the layers, in [0, 1]")

    def rule(self, config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> ASLConfig:
        ranking_layers = range(num_layers) if ranking_layers is None else ranking_layers
        middle = max(0, math.ceil(self.depth * num_layers) - 1)
        layer = min(ranking_layers, key=lambda one: abs(one - middle)) if self.layer is None else self.layer
        if isinstance(layer, float) or not 0 <= layer < num_layers:
            raise ConfigError(f"layer={layer!r} is not a layer of this model; give an int from 0 to {num_layers - 1}")
        if layer not in ranking_layers:
            raise ConfigError(
                f"layer={layer} does not attend to the whole prompt, so it cannot rank it; "
                f"give one of {', '.join(map(str, ranking_layers))}"
            )
        return config.scored().replace(min_layer=layer, max_layer=layer).resolve(num_layers, ranking_layers)
