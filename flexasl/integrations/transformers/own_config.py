"""A configuration of a patched decoder's own, so that its attention is nobody else's."""

from __future__ import annotations

import copy
from typing import Any


class OwnConfig:
    """While it is there, the decoder and the modules in it hold a copy of their configuration, which names another
    attention implementation; the configuration itself, which other models may share, stays as it is."""

    def __init__(self, decoder: Any, implementation: str) -> None:
        self.shared = decoder.config
        self._decoder = decoder
        self._own = copy.deepcopy(decoder.config)
        self._own._attn_implementation = implementation
        self._holders = _exchange(decoder.modules(), self.shared, self._own)

    def put_back(self) -> None:
        """Gives the configuration back to all that hold the copy, those that have left or joined meanwhile too."""
        _exchange({*self._holders, *self._decoder.modules()}, self._own, self.shared)

    def __enter__(self) -> OwnConfig:
        return self

    def __exit__(self, *error: object) -> None:
        self.put_back()


def _exchange(modules: Any, old: Any, new: Any) -> list[Any]:
    """Puts new in the place of old; returns the modules that had it."""
    holders = [(module, [name for name, value in vars(module).items() if value is old]) for module in modules]
    for module, names in holders:
        for name in names:
            setattr(module, name, new)
    return [module for module, names in holders if names]
