"""Kernels of attention, all of which take (spec, query, key, value, visible, sinks), and which of them runs.

Shapes: B batch, H query heads, G KV heads, M queries, N keys, D and E head dims. query [B, H, M, D], key [B, G, N, D],
value [B, G, N, E] are of one float dtype, and the queries are the last M keys; visible says who sees whom, None that
causal order does; sinks [H] are logits of a key that is no token. → [B, H, M, E]. KV heads are never stored expanded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from torch import Tensor

from flexasl.attention_spec import AttentionSpec
from flexasl.errors import UnsupportedError
from flexasl.kernels import eager, flex, sdpa
from flexasl.kernels.alibi import with_alibi
from flexasl.kernels.gradients import attention_gradients
from flexasl.kernels.sdpa import one_token
from flexasl.kernels.varlen import can_varlen, varlen_attention
from flexasl.masks import FixedMask, Visibility

__all__ = [
    "attend",
    "attention_gradients",
    "can_varlen",
    "choose",
    "choose_for_rows",
    "fastest",
    "one_token",
    "varlen_attention",
]

Name = Literal["flex", "sdpa", "eager"]
BY_NAME: dict[str, Callable[..., Tensor]] = {"flex": flex.attend, "sdpa": sdpa.attend, "eager": eager.attend}


def attend(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the kernel that `choose` names."""
    spec, query, key = with_alibi(spec, query, key, visible)
    if spec.chunked:
        visible = visible or Visibility.last(query.shape[2], key.shape[2], query.device)
        assert spec.sliding_window is not None
        visible = visible.in_chunks(spec.sliding_window)
        spec = replace(spec, chunked=False)
    kernel = BY_NAME[choose(spec, query, key, visible, sinks)]
    queries, window = query.shape[2], spec.sliding_window
    if visible is None and queries == 1 and window is not None and window < key.shape[2]:
        key, value = key[:, :, -window:], value[:, :, -window:]
    keys = key.shape[2]
    if visible is None and (queries not in (1, keys) or spec.needs_positions(keys)):
        visible = Visibility.last(queries, keys, query.device)
    return kernel(spec, query, key, value, visible, sinks)


def choose(
    spec: AttentionSpec, query: Tensor, key: Tensor, visible: Visibility | None = None, sinks: Tensor | None = None
) -> Name:
    """The kernel that will run. `"auto"` goes by this table; `bench/attention.py` measures it, on CPU so far:

    CUDA is a GPU that torch compiles kernels for, with Triton; others are as CPU.

    ================================  ==================  =====
    what is asked for                 CPU                 CUDA
    ================================  ==================  =====
    no mask beyond causal, decode     sdpa                sdpa
    padding or gaps                   sdpa                flex
    a new token, rows unequal         sdpa                flex
    sliding window                    sdpa                flex
    soft-cap                          eager               flex
    sinks                             eager               flex
    ================================  ==================  =====
    """
    if sinks is not None and (spec.kernel == "sdpa" or (spec.kernel == "flex" and not query.is_cuda)):
        where = "" if spec.kernel == "sdpa" else f" on {query.device.type}"
        raise UnsupportedError(
            f"kernel={spec.kernel!r} has no sinks{where}; give kernel='auto' or 'eager', or sinks=None"
        )
    unequal = visible is not None and visible.key_valid is not None
    masked = visible is not None or spec.needs_positions(key.shape[2])
    chosen = fastest(spec, flex.is_fast(query), unequal if query.shape[2] == 1 else masked, sinks is not None)
    return "eager" if chosen == "flex" and isinstance(visible, FixedMask) else chosen


def fastest(spec: AttentionSpec, cuda: bool, masked: bool, sinks: bool = False) -> Name:
    """`choose` by its table alone; cuda: whether its last column counts; masked: whether several queries have a mask
    beyond causal order, or one query rows of unequal length."""
    if spec.kernel != "auto":
        return spec.kernel
    featured = sinks or not spec.is_plain
    if not cuda:
        return "eager" if featured else "sdpa"
    return "flex" if featured or masked else "sdpa"


def choose_for_rows(
    spec: AttentionSpec, cuda: bool, *, lengths: int, varlen: Callable[[], bool]
) -> Literal["batch", "varlen", "flex", "each"]:
    """How prompts of so many lengths, one after another in one sequence, go through attention:

    =====================================================  ======  ==================
    rows                                                   CPU     CUDA
    =====================================================  ======  ==================
    all of one length                                      batch   batch
    causal order and sliding window, where `varlen` can    each    varlen
    any other mask, soft-cap, sinks, float32               each    flex
    after cached entries                                   each    flex
    `kernel="sdpa"`, `"eager"`                             each    each
    =====================================================  ======  ==================

    batch: one call, of the kernel that `choose` names. varlen: one call of `varlen_attn`. flex: one of flex_attention,
    with a mask in which rows do not see each other; so does `kernel="flex"` everywhere. each: a call for each length.
    """
    if lengths == 1:
        return "batch"
    if varlen():
        return "varlen"
    return "flex" if spec.kernel == "flex" or (cuda and spec.kernel == "auto") else "each"
