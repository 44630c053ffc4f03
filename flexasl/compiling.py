"""Decoder layers as compiled regions: whole graphs, for any length, with the pruning between them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from flexasl.gradients import refuse_gradients

NO_GRADIENTS = "compile=True gives no gradients; patch the model with compile=False"
Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def compile_region(function: Callable[..., Any], backend: Backend | None = None) -> Callable[..., Any]:
    """`function`, whose first argument is a module, as one graph for all lengths and for all modules alike.

    Raises where it cannot be one graph, or where it is compiled too often: it never runs uncompiled in silence. It
    gives no gradients: a backward pass through what it returns raises `UnsupportedError`.
    """
    # A code object of its own, because compilers count recompiles, and stop at 8, by code object.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=backend or inductor)

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = torch.is_grad_enabled() and any(map(_needs_gradients, (*args, *module.parameters())))
        with torch.no_grad():
            # Inputs with gradients and without, and views of other tensors, would make graphs of their own.
            made = compiled(module, tuple(map(_detached, args)), kwargs)
        if not wanted:
            return made
        return tuple(map(_refusing, made)) if isinstance(made, tuple) else _refusing(made)

    return run


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


def _needs_gradients(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _refusing(value: Any) -> Any:
    return refuse_gradients(value, NO_GRADIENTS) if isinstance(value, torch.Tensor) else value


def _example(argument: Any) -> torch.Tensor | None:
    value = argument.meta.get("example_value") if isinstance(argument, Node) else None
    return value if isinstance(value, torch.Tensor) else None
