"""Selection by the last token at a fixed layer, then a second prefill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flexasl.policies.asl_two_pass import NO_TOP_P, once_a_prompt
from flexasl.policies.base import CACHE
from flexasl.policies.fixed_layer import FixedLayer, own_layer


class GemFilter(FixedLayer):
    """The last token's attention at one layer selects the prompt's tokens, which are then read again from the first
    layer on, alone (GemFilter, arXiv 2409.17422).

    `layer` counts from 0; None is layer 13 of 32, the paper's for Llama 3.1 8B, at this depth. As there, scores are
    the last token's, average-pooled over five tokens. Unlike there, tokens keep their positions in the prompt, so that
    what is generated continues it.
    """

    name = "gemfilter"
    second_pass = True
    takes = CACHE - {"kv_top_p"} | {"select_tokens"}
    fixes: ClassVar[Mapping[str, Any]] = {**FixedLayer.fixes, "window": 1, "kernel_size": 5, "pooling": "avgpool"}
    refusals: ClassVar[Mapping[str, str]] = {
        **own_layer(name, "GemFilter"),
        **once_a_prompt(name),
        "kv_top_p": NO_TOP_P,
    }

    def __init__(self, layer: int | None = None) -> None:
        super().__init__(layer, depth=14 / 32)
