"""What gives no gradients says so when they are asked for, and not before: a prompt may be read without `no_grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError


def refuse_gradients(states: Tensor, why: str) -> Tensor:
    """The same states, from which a backward pass raises `UnsupportedError` with this sentence."""
    anchor = torch.empty(0, dtype=states.dtype, device=states.device, requires_grad=True)
    made: Tensor = _Refusing.apply(states.detach(), anchor, why)
    return made


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, anchor: Tensor, why: str) -> Tensor:
        ctx.why = why
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(ctx.why)
