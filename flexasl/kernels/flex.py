"""`flex_attention`, always compiled. Shapes: those of `flexasl.kernels`."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexasl.attention_spec import AttentionSpec
from flexasl.errors import UnsupportedError
from flexasl.masks import BLOCK, Visibility


def attend(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None, sinks: Tensor | None
) -> Tensor:
    """Attention that computes no block of which nothing is seen. On CPU it compiles a graph for every length, and is
    there to compare with."""
    keys = key.shape[2]
    if visible is None:
        visible = Visibility.last(query.shape[2], keys, query.device)
    settings = spec.flex(visible, query.shape[1], query.shape[3])
    if query.is_cuda:
        run = flex_attention if torch.compiler.is_compiling() else _compiled(None)
    else:
        # torch 2.13 on CPU: graphs for any length often fail to build, and few keys give wrong results.
        if keys < BLOCK:
            raise UnsupportedError(
                f"kernel='flex' is wrong on {query.device.type} for fewer than {BLOCK} keys, here {keys}; "
                "give kernel='auto'"
            )
        run = _compiled((query.shape, key.shape, value.shape))
    if sinks is None:
        return run(query, key, value, **settings, enable_gqa=True)
    out, logsumexp = run(query, key, value, **settings, enable_gqa=True, return_lse=True)
    return out * (logsumexp - sinks[:, None]).sigmoid()[..., None].to(out.dtype)


@functools.lru_cache(maxsize=64)
def _compiled(shapes: tuple[torch.Size, ...] | None) -> Any:
    """`flex_attention` compiled for any lengths, or for these shapes alone. fullgraph: past the recompile limit a
    compile without it runs the uncompiled function in silence, which reads no block lists."""
    own = types.FunctionType(flex_attention.__code__.replace(), flex_attention.__globals__, "flex_attention")
    own.__kwdefaults__, own.__defaults__ = flex_attention.__kwdefaults__, flex_attention.__defaults__
    return torch.compile(own, fullgraph=True, dynamic=shapes is None)
