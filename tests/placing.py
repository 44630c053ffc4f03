"""Where tests make their tensors and models: on the CPU, on a GPU, or on the one that is not there (`pretend_gpu`)."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pretend_gpu
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)
PRETENDED = "pretended"
DEVICE = os.environ.get("FLEXASL_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
"""A GPU where there is one; FLEXASL_TEST_DEVICE names another device, or `pretended`."""
MAKERS = {
    torch.arange,
    torch.as_tensor,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}


_places = [torch.device("cpu")]


@contextmanager
def on(device: str) -> Iterator[None]:
    """What is made inside, without a device that is named, is there."""
    place = pretend_gpu.AWAY if device == PRETENDED else torch.device(device)
    _places.append(place)
    try:
        with pretend_gpu.counted() if device == PRETENDED else nullcontext(), _MadeOn(place):
            yield
    finally:
        _places.pop()


def here() -> torch.device:
    """Where tensors are made now."""
    return _places[-1]


def shared(build: Callable[..., M]) -> Callable[..., M]:
    """Lets a function that builds a model build it once, on the CPU, and copy it once to every other device."""

    @functools.cache
    def built(to: torch.device, *args: Any, **kwargs: Any) -> M:
        if to.type == "cpu":
            with torch.device("cpu"):
                return build(*args, **kwargs)
        model = copy.deepcopy(built(torch.device("cpu"), *args, **kwargs))
        return pretend_gpu.move(model) if to == pretend_gpu.AWAY else model.to(to)

    @functools.wraps(build)
    def made(*args: Any, **kwargs: Any) -> M:
        return built(here(), *args, **kwargs)

    return made


class _MadeOn(TorchFunctionMode):
    """Like `torch.set_default_device`, but numbers that a generator of the CPU draws are drawn there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.from_numpy:
            return func(*args, **kwargs).to(self.device)
        if func in MAKERS and kwargs.get("device") is None:
            if kwargs.get("generator") is not None:
                return func(*args, **kwargs).to(self.device)
            kwargs["device"] = self.device
        return func(*args, **kwargs)
