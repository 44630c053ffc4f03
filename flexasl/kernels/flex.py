"""`flex_attention`, always compiled. Shapes: those of `flexasl.kernels`."""

from __future__ import annotations

import functools
import importlib.util
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexasl.attention_spec import AttentionSpec
from flexasl.errors import UnsupportedError
from flexasl.masks import BLOCK, Visibility

TRITON = importlib.util.find_spec("triton") is not None
"""Whether there is what torch compiles kernels of a GPU with."""


def attend(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None, sinks: Tensor | None
) -> Tensor:
    """Attention that computes no block of which nothing is seen. On CPU it compiles a graph for every length, and is
    there to compare with."""
    queries, keys = query.shape[2], key.shape[2]
    if visible is None:
        visible = Visibility.last(queries, keys, query.device)
    settings = spec.flex(visible, query.shape[1], query.shape[3])
    if query.is_cuda:
        require_triton(query.device)
        if queries > 1:
            # For fewer than 128 queries torch would take its decoding kernel, which has no tile for more than 128 rows
            # of queries times heads: NoValidChoicesError in torch 2.11 to 2.13.
            settings["kernel_options"] = {"BACKEND": "TRITON"}
        compiling = torch.compiler.is_compiling()
        run = flex_attention if compiling else _compiled(_kind(spec, query, key, value, visible, sinks), True)
    else:
        # torch 2.13 on CPU: graphs for any length often fail to build, and few keys give wrong results.
        if keys < BLOCK:
            raise UnsupportedError(
                f"kernel='flex' is wrong on {query.device.type} for fewer than {BLOCK} keys, here {keys}; "
                "give kernel='auto'"
            )
        run = _compiled((query.shape, key.shape, value.shape), False)
    if sinks is None:
        return run(query, key, value, **settings, enable_gqa=True)
    out, logsumexp = run(query, key, value, **settings, enable_gqa=True, return_lse=True)
    return (out * (logsumexp - sinks[:, None].to(logsumexp)).sigmoid()[..., None]).to(query.dtype)


def is_fast(states: Tensor) -> bool:
    """Whether it is compiled where these are, for any length."""
    # What a compiler is at work on runs where that compiles for.
    return states.is_cuda and (torch.compiler.is_compiling() or compiles_for(states.device))


@functools.lru_cache(maxsize=8)
def compiles_for(device: torch.device) -> bool:
    """Whether torch compiles kernels for this GPU: Triton is there, which knows NVIDIA's from Volta on."""
    return TRITON and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0))


def require_triton(device: torch.device) -> None:
    """Raises `UnsupportedError` where this GPU is none that torch compiles kernels for."""
    if not torch.compiler.is_compiling() and not compiles_for(device):
        raise UnsupportedError(
            f"kernel='flex' needs Triton on {device.type}, and a GPU that Triton knows; install it, or give "
            "kernel='auto'"
        )


def _kind(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, visible: Visibility, sinks: Tensor | None
) -> Hashable:
    """All that a graph for any lengths takes for granted."""
    counts = query.shape[0], query.shape[2], key.shape[2], visible.query_positions.shape[0]
    ones, one_block = [count == 1 for count in counts], [count <= BLOCK for count in counts[1:3]]
    features = [spec.is_plain, sinks is None, visible.key_positions.dim()]
    return query.dtype, query.shape[1], query.shape[3], key.shape[1], value.shape[3], *ones, *one_block, *features


@functools.lru_cache(maxsize=256)
def _compiled(kind: Hashable, dynamic: bool) -> Any:
    """`flex_attention` compiled for one kind of inputs: a code object each, because torch makes 8 graphs of one at
    most. fullgraph: past that a compile without it runs the uncompiled function without a message, which reads no block
    lists."""
    own = types.FunctionType(flex_attention.__code__.replace(), flex_attention.__globals__, "flex_attention")
    own.__kwdefaults__, own.__defaults__ = flex_attention.__kwdefaults__, flex_attention.__defaults__
    return torch.compile(own, fullgraph=True, dynamic=dynamic)
