"""What patches of all frameworks refuse of a model and of its arguments, and what they read there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError
from flexasl.kernels import flex


def refuse_state(model: Any, kernel: str, device: torch.device, instead: str = "patch it before") -> None:
    """Raises `UnsupportedError` where a model of any framework cannot be patched as it is now; instead is what to do
    with one that is compiled."""
    kind = type(model).__name__
    if hasattr(model, "flexasl_patch"):
        raise UnsupportedError(f"{kind} is patched already; call model.flexasl_patch.remove() first")
    if model.training:
        raise UnsupportedError(f"{kind} is in training mode; call model.eval() first")
    if kernel == "flex" and device.type == "cpu":
        raise UnsupportedError("kernel='flex' would compile a graph for every new token on cpu; give kernel='auto'")
    if kernel == "flex" and device.type == "cuda":
        flex.require_triton(device)
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError(f"{kind} is compiled already (its compile() was called); {instead}")


def padding(mask: Any, batch: int, tokens: int, device: torch.device, name: str) -> Tensor | None:
    """A mask [batch, tokens], 0 at padding, as bool; None where there is no padding. name is the argument's."""
    return padding_of_turn(mask, batch, 0, tokens, device, name)[0]


def padding_of_turn(
    mask: Any, batch: int, past: int, tokens: int, device: torch.device, name: str
) -> tuple[Tensor | None, bool]:
    """The same of a turn after so many tokens, and whether the turn itself has padding; by one read of the device."""
    if mask is None:
        return None, False
    if not isinstance(mask, Tensor) or mask.shape != (batch, tokens):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"{name} is {given}; a patched model takes [batch, tokens so far], here {[batch, tokens]}"
        )
    valid = mask.to(device=device, dtype=torch.bool)
    whole, unpadded = torch.stack([valid.all(), valid[:, past:].all()]).tolist()
    return None if whole else valid, not unpadded


def restart(positions: Tensor | None) -> bool:
    """Whether positions [..., M] begin again within a row, as where several documents are packed into one."""
    return positions is not None and bool((positions.diff(dim=-1) != 1).any())


def refuse_training(layer: Any) -> None:
    """Raises `UnsupportedError` where a patched model, one of whose layers this is, is in training mode now."""
    if layer.training:
        raise UnsupportedError("the patched model is in training mode; call model.eval() first")
