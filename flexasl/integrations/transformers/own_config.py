"""Configurations of a patched decoder's own, so that its attention is nobody else's."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class OwnConfig:
    """While it is there, the decoder and the modules in it hold a copy of their configuration, which names another
    attention implementation; the configuration itself, which other models may share, stays as it is."""

    def __init__(self, decoder: nn.Module, implementation: str) -> None:
        self._decoder = decoder
        self._places = _places(decoder.modules())
        self._pairs: list[tuple[Any, Any]] = []
        """Of configurations and their copies; most decoders have one."""
        for _, _, config in self._places:
            if not any(config is shared for shared, _ in self._pairs):
                own = copy.deepcopy(config)
                own._attn_implementation = implementation
                self._pairs.append((config, own))
        _exchange(self._places, self._pairs)

    def put_back(self) -> None:
        """Gives the configuration back to all that hold the copy, those that have left or joined meanwhile too."""
        held = {id(module): module for module, _, _ in self._places} | {id(m): m for m in self._decoder.modules()}
        _exchange(_places(held.values()), [(own, shared) for shared, own in self._pairs])

    def __enter__(self) -> OwnConfig:
        return self

    def __exit__(self, *error: object) -> None:
        self.put_back()


def _places(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Which modules hold configurations, by what name."""
    return [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]


def _exchange(places: list[tuple[nn.Module, str, Any]], pairs: list[tuple[Any, Any]]) -> None:
    """Puts the second of a pair in the place of its first."""
    for module, name, held in places:
        for old, new in pairs:
            if held is old:
                setattr(module, name, new)


def of_layer(config: Any, layer: int) -> Any:
    """A decoder layer's configuration, where a model's has one for each, as Gemma 4's has; else the model's."""
    own = getattr(config, "per_layer_config", None)
    return own[layer] if own else config
