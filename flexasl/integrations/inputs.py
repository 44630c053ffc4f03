"""What all frameworks' patches look at in a model and in its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError


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
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError(f"{kind} is compiled already (its compile() was called); {instead}")


def padding(mask: Any, batch: int, tokens: int, device: torch.device, name: str) -> Tensor | None:
    """A mask [batch, tokens], 0 at padding, as bool; None where there is no padding. name is the argument's."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (batch, tokens):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"{name} is {given}; a patched model takes [batch, tokens so far], here {[batch, tokens]}"
        )
    valid = mask.to(device=device, dtype=torch.bool)
    return None if bool(valid.all()) else valid


def restart(positions: Tensor | None) -> bool:
    """Whether positions [..., M] begin again within a row, as where several documents are packed into one."""
    return positions is not None and bool((positions.diff(dim=-1) != 1).any())
