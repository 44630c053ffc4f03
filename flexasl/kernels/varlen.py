"""Rows of different lengths in one call of torch's variable-length attention, on CUDA.

Shapes: B rows, T tokens of all rows together, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from flexasl.attention_spec import AttentionSpec

varlen_attn: Any = None
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn


def can_varlen(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether `varlen_attention` computes this, as far as its tensors [1, H or G, T, D] tell: it does so on NVIDIA's
    GPUs from Ampere on, in half precision, and without gradients; and what the installed torch has no argument for it
    does not."""
    dim, dtypes = query.shape[3], (torch.float16, torch.bfloat16)
    if spec.kernel != "auto" or not spec.is_plain or spec.chunked or sinks is not None:
        return False
    if query.dtype not in dtypes or dim > 256 or dim % 8 != 0 or value.shape[3] != dim:
        return False
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        return False
    return _knows(spec, query, key) and _has_flash(query.device)


def varlen_attention(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int
) -> Tensor:
    """Causal attention of each row to itself, tokens at consecutive positions: query [1, H, T, D], key and value
    [1, G, T, D], cu_seqlens [B + 1] int32 → [1, H, T, D]."""
    window = spec.sliding_window
    settings: dict[str, Any] = {
        "window_size": (-1 if window is None else window - 1, 0),
        "is_causal": True,
        "scale": spec.factor(query.shape[3]),
        "enable_gqa": key.shape[1] != query.shape[1],
    }
    arguments = _arguments()
    settings = {name: given for name, given in settings.items() if name in arguments}
    rows = (states[0].transpose(0, 1) for states in (query, key, value))
    out: Tensor = varlen_attn(*rows, cu_seqlens, cu_seqlens, max_length, max_length, **settings)
    return out.transpose(0, 1)[None]


def _knows(spec: AttentionSpec, query: Tensor, key: Tensor) -> bool:
    """Whether the installed function has an argument for all that is asked for."""
    asked = {"window_size"} if spec.sliding_window is not None else set()
    if key.shape[1] != query.shape[1] and not _takes_groups(query.device):
        asked.add("enable_gqa")
    if spec.factor(query.shape[3]) != query.shape[3] ** -0.5:
        asked.add("scale")
    arguments = _arguments()
    return asked <= arguments and bool(arguments & {"window_size", "is_causal"})


@functools.lru_cache(maxsize=8)
def _takes_groups(device: torch.device) -> bool:
    """Whether the installed function takes fewer KV heads than heads without an argument that says so, as in torch
    2.11: tried once on each device."""
    if varlen_attn is None or "enable_gqa" in _arguments() or not _has_flash(device):
        return False
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(8, heads, 16, dtype=torch.float16, device=device, generator=generator) for heads in (4, 2, 2)
    )
    ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
    try:
        grouped = varlen_attn(query, key, value, ends, ends, 8, 8)
        whole = varlen_attn(query, *(part.repeat_interleave(2, 1) for part in (key, value)), ends, ends, 8, 8)
    except RuntimeError:
        return False
    return torch.allclose(grouped, whole, rtol=0, atol=0.01)


def _arguments() -> set[str]:
    return set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)


def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
