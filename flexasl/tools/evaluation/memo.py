"""Outputs of modules, remembered over the prefills of one prompt, which run the same layers on the same tokens until
they prune.

Shapes: T tokens of the prompt, C width of states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexasl.masks import Visibility


class _Known(NamedTuple):
    """A call that was computed."""

    given: tuple[Any, ...]
    output: Any
    versions: list[int]
    """Of the tensors given and put out, as they were then."""


class Memo:
    """Answers a module's call on a whole prompt with the last output, where all that goes in is the same to the bit.

    Only calls whose first argument is a tensor [..., T, C] and whose other arguments are tensors or plain values are
    looked at; inside such a call no other is. Each module's last output stays in memory, with what it was given, until
    the memo goes. Tensors that something has written into since are not used.
    """

    def __init__(self, tokens: int) -> None:
        """tokens: those of the prompt, T."""
        self.hits = 0
        """Calls that were answered from memory."""
        self._tokens = tokens
        self._known: dict[Any, _Known] = {}
        self._computing = False

    @contextmanager
    def over(self, modules: Mapping[Any, nn.Module]) -> Iterator[None]:
        """The modules answer from memory inside the `with` block. Keys name them over several blocks, in which the
        module of a key may be another object that computes the same."""
        before = [(module, vars(module).get("forward")) for module in modules.values()]
        try:
            for key, module in modules.items():
                module.forward = functools.partial(self._run, key, module.forward)
            yield
        finally:
            for module, forward in before:
                if forward is not None:
                    module.forward = forward
                elif "forward" in vars(module):
                    del module.forward

    def _run(self, key: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = None if self._computing else _flat((*args, *kwargs, *kwargs.values()))
        if not given or not isinstance(given[0], Tensor) or given[0].dim() < 2 or given[0].shape[-2] != self._tokens:
            return forward(*args, **kwargs)
        known = self._known.get(key)
        if known is not None and _versions(known.given, known.output) == known.versions and _same(known.given, given):
            self.hits += 1
            return known.output
        self._computing = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._computing = False
        if _flat((output,)) is not None:
            self._known[key] = _Known(given, output, _versions(given, output))
        return output


def costly_modules(layers: Iterator[nn.Module] | Any) -> dict[tuple[int, str], nn.Module]:
    """All modules inside decoder layers that have matrices, by layer and name."""
    return {
        (index, name): module
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if name and any(weight.dim() > 1 for weight in module.parameters())
    }


def _flat(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Tensors and plain values, with those inside tuples and masks laid out; None where there is anything else."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Visibility):
            found += [value.query_positions, value.last_seen, value.key_positions, value.key_valid]
        elif isinstance(value, tuple):
            inner = _flat(value)
            if inner is None:
                return None
            found += [len(value), *inner]
        elif value is None or isinstance(value, (Tensor, bool, int, float, str)):
            found.append(value)
        else:
            return None
    return tuple(found)


def _versions(given: tuple[Any, ...], output: Any) -> list[int]:
    return [value._version for value in (*given, *(_flat((output,)) or ())) if isinstance(value, Tensor)]


def _same(known: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    return len(known) == len(given) and all(map(_equal, known, given))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return one is other or (alike and torch.equal(one, other))
    return type(one) is type(other) and one == other
