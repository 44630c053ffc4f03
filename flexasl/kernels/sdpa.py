"""`scaled_dot_product_attention` in its fastest form. Shapes: those of `flexasl.kernels`, R = H / G."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexasl.attention_spec import AttentionSpec
from flexasl.kernels.tiling import at_once, tiles
from flexasl.masks import Visibility

MASK = 2**27
"""Pairs of query and key whose mask is held at once."""
PROMPT = 256
"""Queries of a masked prompt that run at once, so that keys in their future are skipped."""


def attend(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None, sinks: None = None
) -> Tensor:
    """Attention without soft-cap and sinks."""
    scale, window = spec.factor(query.shape[-1]), spec.sliding_window
    queries, keys = query.shape[2], key.shape[2]
    if visible is None:
        return _dense(query, key, value, None, queries > 1, scale)
    most = at_once(queries, MASK, query.shape[0] * keys)
    prompt = queries == keys and (spec.needs_positions(keys) or queries > PROMPT)
    if torch.compiler.is_compiling() or (queries <= most and not prompt):
        return _dense(query, key, value, visible.dense(window), False, scale)
    out = [
        _dense(query[:, :, some], key[:, :, seen], value[:, :, seen], visible.tile(some, seen, window), False, scale)
        for some, seen in tiles(spec, queries, keys, min(most, PROMPT), visible.ahead)
    ]
    return torch.cat(out, 2)


def one_token(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """A single query a row, M = 1, which sees all keys, or those of a mask, bool [B, 1 or G, 1, N]."""
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    # A KV head's queries become rows of one attention: 7 times faster than enable_gqa in bfloat16 on CPU.
    rows = query.reshape(batch, groups, heads // groups, dim)
    if query.is_cuda and not torch.compiler.is_compiling():
        with _without_cudnn():
            out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    else:
        out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, 1, value.shape[-1])


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Keeps SDPA from cuDNN, which plans anew for each length: 45 ms a new token on an H100."""
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """mask is None or bool [B, 1 or G, M, N]; causal, without a mask and with M = N, lets each query see the keys up to
    its own."""
    if query.shape[2] == 1:
        return one_token(query, key, value, scale, mask)
    heads, repeats = query.shape[1], query.shape[1] // key.shape[1]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(repeats, 1)
    if mask is not None and query.is_cuda and repeats > 1:
        # With a mask and enable_gqa, CUDA has only the kernel that materialises all M x N weights.
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # Where a compiler knows lengths as symbols, these are symbols too, which SDPA does not take: `if` decides them.
    causal = True if causal else False  # noqa: SIM210
    grouped = True if key.shape[1] != heads else False  # noqa: SIM210
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
