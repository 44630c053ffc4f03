"""Keywords on their way to attention, past layers that hand on those alone which they know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def carriers(layers: Sequence[nn.Module], caches: Sequence[str]) -> list[nn.Module]:
    """The modules in these layers that take a cache, by one of these names, and any keyword beside it."""
    found = []
    for layer in layers:
        for module in layer.modules():
            taken = inspect.signature(type(module).forward).parameters
            any_keyword = any(one.kind is one.VAR_KEYWORD for one in taken.values())
            if module is not layer and any_keyword and any(name in taken for name in caches):
                found.append(module)
    return found


def carry(modules: Sequence[nn.Module], name: str, value: Callable[[dict[str, Any]], Any]) -> list[RemovableHandle]:
    """Gives the modules a keyword of this name, made of their others, where they have none."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if name in kwargs else kwargs | {name: value(kwargs)}

    return [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
