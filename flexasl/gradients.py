"""What gives no gradients says so when they are asked for, and not before: a prompt may be read without `no_grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError


def refuse_gradients(states: Tensor, why: str) -> Tensor:
    """The same states, from which a backward pass raises `UnsupportedError` with this sentence."""
    anchor = torch.empty(0, dtype=states.dtype, device=states.device, requires_grad=True)
    # No input itself, of which the output would be a view that nobody may write into.
    made: Tensor = _Refusing.apply(anchor, (states.detach(),), why)
    return made


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, states: tuple[Tensor], why: str) -> Tensor:
        ctx.why = why
        return states[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(ctx.why)
