"""What stands in the place of attention and of masks in layers that ask transformers' interfaces for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from flexasl.errors import UnsupportedError
from flexasl.integrations.transformers.models import NAME
from flexasl.layer_step import LayerStep

PASS = "flexasl_pass"
"""The keyword that goes down to attention: the `ForwardPass` first, and inside a layer its `LayerStep`."""


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, M, D], key and value [B, G, N, D] → [B, M, H, D]."""
    step: LayerStep | None = kwargs.get(PASS)
    if step is None:
        raise UnsupportedError(
            f"{type(module).__name__} was called outside the patched model; call the model, or patch.remove() first"
        )
    mine = step.module
    if mine is None:
        raise UnsupportedError(f"{type(module).__name__} attends in a layer that was found to have no attention")
    window = sliding_window if not mine.spec.chunked else mine.sliding_window  # of a chunk nothing is said here
    if (mine.scale, mine.sliding_window, mine.softcap) != (scaling, window, softcap):
        raise UnsupportedError(
            f"{type(module).__name__} asks for scaling={scaling}, sliding_window={sliding_window}, softcap={softcap}, "
            f"where its attributes promise {mine.scale}, {mine.sliding_window}, {mine.softcap}; it cannot be patched"
        )
    out = step.attend(query, key, value, s_aux, indices)
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: every layer's mask is made from its own tokens, in `ForwardPass`."""
    return (
        torch.empty(0, dtype=torch.bool, device="cpu") if getattr(config, "model_type", None) == "mpt" else None
    )  # whose decoder makes it bool


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, no_mask)
