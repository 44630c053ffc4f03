"""Selection at a fixed layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.base import Policy


class FixedLayer(Policy):
    """Selects tokens at one layer for every prompt, on that layer's scores (FastKV, arXiv 2502.01068).

    `layer` counts from 0; None is the middle of the stack, FastKV's choice for Llama 3.1 8B (layer 15 of 32).
    """

    name = "fixed_layer"

    def __init__(self, layer: int | None = None, *, depth: float = 0.5) -> None:
        """depth: where None is, as a share of the layers."""
        self.layer = layer
        self.depth = depth

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        voters = range(num_layers) if voters is None else voters
        middle = max(0, math.ceil(self.depth * num_layers) - 1)
        layer = min(voters, key=lambda one: abs(one - middle)) if self.layer is None else self.layer
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ConfigError(f"layer={layer!r} is not a layer of this model; give an int from 0 to {num_layers - 1}")
        if layer not in voters:
            raise ConfigError(
                f"layer={layer} has a sliding window, so it cannot rank the whole prompt; "
                f"give one of {', '.join(map(str, voters))}"
            )
        rule = config.pooled().replace(
            min_layer=layer, max_layer=layer, observe_layers=1, select_on="last", if_never="select"
        )
        return rule.resolve(num_layers, voters)
