"""Selection by the last token at a fixed layer, then a second prefill."""

from __future__ import annotations

from collections.abc import Sequence

from flexasl.config import ASLConfig
from flexasl.policies.asl_two_pass import one_selection
from flexasl.policies.base import Policy
from flexasl.policies.fixed_layer import FixedLayer


class GemFilter(Policy):
    """The last token's attention at one layer selects the prompt's tokens, which are then read again from the first
    layer on, alone (GemFilter, arXiv 2409.17422).

    `layer` counts from 0; None is layer 13 of 32, the paper's for Llama 3.1 8B, at this depth. As there, scores are
    average-pooled over five tokens; `window` and `kernel_size` of the settings do not count. Unlike there, tokens keep
    their positions in the prompt, so that what is generated continues it.
    """

    name = "gemfilter"
    second_pass = True

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        config = one_selection(self.name, config).replace(window=1, kernel_size=5, pooling="avgpool")
        return FixedLayer(self.layer, depth=14 / 32).resolve(config, num_layers, voters)
