"""Decoder layers as compiled regions: whole graphs, for any length, with the pruning between them."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as shapes
from torch.nn import functional as F

Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def compile_region(function: Callable[..., Any], backend: Backend | None = None) -> Callable[..., Any]:
    """`function`, whose first argument is a module, as one graph for all lengths and for all modules alike.

    Raises where it cannot be one graph, or where it is compiled too often: it never runs uncompiled in silence. What it
    returns has no gradients.
    """
    # A code object of its own, because compilers count recompiles, and stop at 8, by code object.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=backend or inductor)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), shapes.patch(use_duck_shape=False):
            return compiled(*args, **kwargs)

    return run


def bare(states: Tensor) -> Tensor:
    """The tensor by itself, at the start of its storage: a compiler takes views of others, and offsets, for other kinds
    of input."""
    return states.data if states.storage_offset() == 0 else states.clone()


def kind_of(module: nn.Module) -> Hashable:
    """What a compiled graph takes for granted of a module: classes, settings and the make of weights. Numbers are left
    out, as a layer's index is one."""
    plain = (bool, str, float, type(None))
    return tuple(
        (
            name,
            type(part),
            tuple((key, value) for key, value in sorted(vars(part).items()) if isinstance(value, plain)),
            tuple(
                (key, type(weight), weight.shape, weight.dtype, weight.requires_grad)
                for key, weight in part.named_parameters(recurse=False)
            ),
        )
        for name, part in module.named_modules()
    )


def run_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's own forward, past any hooks."""
    return type(layer).forward(layer, *args, **kwargs)


def inductor(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, with products of one row by a weight as fused reductions on CPU.

    Decode at batch 1 is bound by reading weights: libraries' products read them at 13 GB/s (float32) on the machine of
    docs/benchmarks/decode.md, a reduction at 23 GB/s.
    """
    from torch._inductor.compile_fx import compile_fx

    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.linear and _is_one_row(node):
            node.target = _row_times_weight
    graph.recompile()
    compiled: Any = compile_fx(graph, inputs)
    return compiled


def _row_times_weight(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., 1, C] by [E, C] → [..., 1, E], summed in float32 at least."""
    wide = torch.promote_types(row.dtype, torch.float32)
    out = (row.to(wide) * weight.to(wide)).sum(-1)
    out = out.view(*row.shape[:-1], -1)
    return (out if bias is None else out + bias).to(row.dtype)


def _is_one_row(node: Node) -> bool:
    states, weight = (_example(argument) for argument in node.args[:2])
    if states is None or weight is None or states.device.type != "cpu" or states.dtype != weight.dtype:
        return False
    plain = all(type(value).__name__ in ("FakeTensor", "Parameter", "Tensor") for value in (states, weight))
    return plain and states.is_floating_point() and all(size == 1 for size in states.shape[:-1])


def _example(argument: Any) -> torch.Tensor | None:
    value = argument.meta.get("example_value") if isinstance(argument, Node) else None
    return value if isinstance(value, torch.Tensor) else None
