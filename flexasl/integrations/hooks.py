"""Hooks of others on decoder layers and inside of them, and which passes show them what the unpatched model would.

A batch of prompts runs packed, `[1, tokens of all rows, C]`, and loses tokens on the way; hooks count rows and
positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from flexasl.errors import UnsupportedError
from flexasl.prefill import Prefill

KNOWN = ("accelerate", "flexasl", "peft", "torch", "torchao", "torchtitan", "torchtune", "transformers")
"""Packages whose hooks read neither rows nor positions: they move, gather, cast or make weights, or count calls."""
FORWARD = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
GLOBAL = ("_global_forward_pre_hooks", "_global_forward_hooks")
GLOBAL_BACKWARD = ("_global_backward_pre_hooks", "_global_backward_hooks")


class ForeignHooks:
    """Others' hooks on some layers of a model, now or later; `mode` is `patch`'s argument foreign_hooks."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], mode: str) -> None:
        self._model = model
        self._layers = layers
        self._packed = mode == "packed"
        self._known_until = -1

    def check_prompt(self, prefill: Prefill, compiled: bool) -> bool:
        """Whether layers are to give their outputs in the prompts' own shape, because hooks see them. Raises
        `UnsupportedError` where a hook would see something else."""
        if compiled:
            self._refuse_inside_graphs()
        last = prefill.first_drop
        if self._packed or (last is None and prefill.lengths == [prefill.tokens]):
            return False
        shown = False
        for index, module, hook in self._find():
            if module is not self._layers[index]:
                enough = "one prompt without padding" if last is None else "one prompt within the budget"
                why = "inside decoder layers prompts run packed, as [1, tokens that are left of all rows, width]"
                self._refuse(module, hook, why, f"hook whole layers, give {enough}")
            if last is not None and index > last:
                if last < 0:
                    self._refuse(
                        module, hook, "layers read again the tokens that are kept", "give a prompt within the budget"
                    )
                masks = "give propagate='mask', which drops none, " if prefill.selector.masks else ""
                why = f"layers after layer {last} may see fewer tokens than the prompt has"
                self._refuse(module, hook, why, masks + "give a prompt within the budget")
            shown = True
        return shown

    def check_decode(self, compiled: bool) -> None:
        """Raises `UnsupportedError` where new tokens would not be shown to a hook: all others see what an unpatched
        model gives them."""
        if compiled and RemovableHandle.next_id != self._known_until:
            self._refuse_inside_graphs()

    def _refuse_inside_graphs(self) -> None:
        known_until = RemovableHandle.next_id
        for index, module, hook in self._find():
            if module is not self._layers[index]:
                raise UnsupportedError(
                    f"{self._name(module, hook)}, and compile=True runs layers as graphs, in which hooks do not run; "
                    "give compile=False, hook whole layers, or remove the hook"
                )
        self._known_until = known_until

    def _refuse(self, module: nn.Module, hook: Callable[..., Any], why: str, instead: str) -> NoReturn:
        raise UnsupportedError(
            f"{self._name(module, hook)}, and {why}; {instead}, remove the hook, or patch with foreign_hooks='packed'"
        )

    def _find(self) -> Iterator[tuple[int, nn.Module, Any]]:
        """Layer, module and hook of each module of the layers that has a hook of others."""
        backward = torch.is_grad_enabled()
        everywhere = _foreign(vars(torch_module), GLOBAL + GLOBAL_BACKWARD if backward else GLOBAL)
        names = FORWARD + BACKWARD if backward else FORWARD
        for index, layer in enumerate(self._layers):
            left = [layer]
            while left:
                module = left.pop()
                left += [part for part in module._modules.values() if part is not None]
                hook = _foreign(vars(module), names)
                if hook is None and module is not layer:
                    hook = everywhere
                if hook is not None:
                    yield index, module, hook

    def _name(self, module: nn.Module, hook: Callable[..., Any]) -> str:
        name = next(name for name, part in self._model.named_modules() if part is module)
        return f"{name} has a hook of others ({_describe(hook)})"


def _foreign(holder: dict[str, Any], names: Sequence[str]) -> Callable[..., Any] | None:
    """The first hook that is not of a package in `KNOWN`."""
    for name in names:
        for hook in holder[name].values():
            if (_function(hook)[0] or "").partition(".")[0] not in KNOWN:
                made: Callable[..., Any] = hook
                return made
    return None


def _function(hook: Any) -> tuple[str | None, str]:
    """Module and name of what a hook calls."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    name = getattr(hook, "__qualname__", None) or type(hook).__qualname__
    return getattr(hook, "__module__", None), name


def _describe(hook: Any) -> str:
    module, name = _function(hook)
    return f"{module}.{name}" if module else name
