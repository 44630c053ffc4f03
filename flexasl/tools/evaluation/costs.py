"""What a prefill costs by count: floating-point operations as a share of the full prefill's."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexasl.report import Report, RowReport


@dataclass(frozen=True)
class LayerCost:
    """Operations of one decoder layer."""

    per_token: int
    """Of its linear maps: two per weight."""
    per_pair: int
    """Of attention, for each query and key that it sees: scores and values, two per head and dimension each."""
    window: int | None
    """Keys that a query sees at most, itself included; None: all before it."""

    def of(self, positions: Sequence[int]) -> int:
        """Operations over the tokens at these prompt positions, ascending."""
        tokens = len(positions)
        if self.window is None:
            pairs = tokens * (tokens + 1) // 2
        else:
            pairs = sum(
                place + 1 - bisect.bisect_left(positions, at - self.window + 1) for place, at in enumerate(positions)
            )
        return self.per_token * tokens + self.per_pair * pairs


def layer_costs(model: Any) -> list[LayerCost]:
    """The cost of each decoder layer of a transformers model. Of a mixture of experts, those that a token meets."""
    from flexasl.integrations.transformers.models import decoder_layers
    from flexasl.integrations.transformers.own_config import of_layer

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    costs = []
    for index, layer in enumerate(decoder_layers(model)):
        own = of_layer(config, index)
        heads = own.num_attention_heads
        head_dim = getattr(own, "head_dim", None) or config.hidden_size // heads
        key_dim, value_dim = (getattr(own, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim"))
        weights = 0
        for weight in layer.parameters():
            if weight.dim() == 2:
                weights += weight.numel()
            elif weight.dim() == 3:  # one matrix for each expert
                weights += experts * weight[0].numel()
        costs.append(LayerCost(2 * weights, 2 * heads * (key_dim + value_dim), _window(config, index)))
    return costs


def prefill_share(layers: Sequence[LayerCost], report: Report, row: int = 0) -> float:
    """Operations of a reported prefill, as a share of the full one's.

    Every layer runs on the tokens that the report says, some a second time on those kept. Embedding, norms and the
    scoring of tokens are left out; measured seconds hold them.
    """
    return row_share(layers, report.rows[row])


def row_share(layers: Sequence[LayerCost], told: RowReport) -> float:
    """As `prefill_share`, of one row: its `prompt_tokens`, `kept_positions`, `layer_tokens` and `reread_layers`."""
    known: dict[tuple[LayerCost, int], int] = {}  # most layers cost the same

    def cost(layer: LayerCost, count: int) -> int:
        if count == told.prompt_tokens:
            return _full(layer, count)
        if (layer, count) not in known:
            known[layer, count] = layer.of(_positions(told, count))
        return known[layer, count]

    spent = 0
    for index, layer in enumerate(layers):
        spent += cost(layer, told.layer_tokens[index])
        if index < told.reread_layers:
            spent += cost(layer, told.kept_tokens)
    return spent / sum(_full(layer, told.prompt_tokens) for layer in layers)


@functools.lru_cache(maxsize=1024)
def _full(layer: LayerCost, tokens: int) -> int:
    return layer.of(range(tokens))


def _positions(told: RowReport, count: int) -> Sequence[int]:
    """Where the tokens were that a layer ran on; of an intermediate step only their number is known, which are taken
    as spread evenly."""
    if count == told.kept_tokens:
        return told.kept_positions
    return [place * told.prompt_tokens // count for place in range(count)]


def _window(config: Any, layer: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = types[layer] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    return window if slides else None
