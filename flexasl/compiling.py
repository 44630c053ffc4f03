"""Decoder layers as compiled regions: whole graphs, for any length, with the pruning between them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as shapes
from torch.nn import functional as F

from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.gradients import refuse_gradients
from flexasl.kernels import flex

NO_GRADIENTS = "compile=True gives no gradients; patch the model with compile=False"
Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def compile_region(function: Callable[..., Any], backend: Backend | None = None) -> Callable[..., Any]:
    """`function`, whose first argument is a module, as one graph for all lengths and for all modules alike.

    Raises `FlexASLError` where it cannot be one graph, or is compiled too often: nothing runs uncompiled instead.
    It gives no gradients: a backward pass through what it returns raises `UnsupportedError`.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    # A code object of its own, because compilers count recompiles, and stop at 8, by code object.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=backend or inductor)

    first = True

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal first
        wanted = torch.is_grad_enabled() and any(map(_needs_gradients, (*args, *module.parameters())))
        # Sizes that happen to be equal in the first inputs are not to be equal in all. The patch costs time.
        unequal: Any = shapes.patch(use_duck_shape=False) if first else contextlib.nullcontext()  # type: ignore[attr-defined]
        kind = type(module).__name__
        try:
            with torch.no_grad(), unequal:
                # Inputs with gradients and without, and views of other tensors, would make graphs of their own.
                made = compiled(module, tuple(bare(arg) if isinstance(arg, Tensor) else arg for arg in args), kwargs)
        except FailOnRecompileLimitHit as error:
            raise FlexASLError(
                f"compile=True has made {config.recompile_limit} graphs of {kind}, as many as "
                "torch._dynamo.config.recompile_limit allows, and these inputs need another; raise the limit, or patch "
                "with compile=False"
            ) from error
        except TorchDynamoException as error:
            why = str(error).strip().splitlines()[0]
            raise UnsupportedError(
                f"compile=True cannot make {kind} one graph: {why}; patch with compile=False"
            ) from error
        first = False
        if not wanted:
            return made
        return tuple(map(_refusing, made)) if isinstance(made, tuple) else _refusing(made)

    return run


def require_compiler(device: torch.device) -> None:
    """Raises `UnsupportedError` where graphs for this device need a C++ compiler, or Triton, and there is none."""
    if device.type == "cuda" and not flex.compiles_for(device):
        raise UnsupportedError(
            f"compile=True needs Triton on {device.type}, and a GPU that Triton knows; install it, or give "
            "compile=False"
        )
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise UnsupportedError(
            f"compile=True needs a C++ compiler on {device.type}, and there is none that works: {error}; install one, "
            "such as g++, or give compile=False"
        ) from error


def bare(states: Tensor) -> Tensor:
    """The tensor by itself, at the start of its storage: a compiler takes views of others, and offsets, for other kinds
    of input."""
    return states.data if states.storage_offset() == 0 else states.clone(memory_format=torch.contiguous_format)


def kind_of(module: nn.Module) -> Hashable:
    """What a graph takes for granted of a module: the classes, settings and make of weights of all its parts, but no
    whole numbers, as a layer's index is one."""
    kinds = []
    for name, part in module.named_modules():
        settings = [(key, value) for key, value in vars(part).items() if isinstance(value, bool | str | float | None)]
        weights = [
            (key, type(weight), weight.shape, weight.dtype, weight.requires_grad)
            for key, weight in part.named_parameters(recurse=False)
        ]
        kinds.append((name, type(part), tuple(sorted(settings)), tuple(weights)))
    return tuple(kinds)


def run_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's own forward, past any hooks."""
    return type(layer).forward(layer, *args, **kwargs)


def inductor(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, with products of one row by a weight as fused reductions on CPU.

    Decode at batch 1 is bound by reading weights: libraries' products read them at 13 GB/s (float32) on the machine of
    docs/benchmarks/decode.md, a reduction at 23 GB/s.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(with_fused_rows(graph), inputs)
    return compiled


def with_fused_rows(graph: GraphModule) -> GraphModule:
    """The graph with its products of one row by a weight as reductions."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.linear and _is_one_row(node):
            node.target = _row_times_weight
    graph.recompile()
    return graph


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


def _refusing(value: Any) -> Any:
    return refuse_gradients(value, NO_GRADIENTS) if isinstance(value, torch.Tensor) else value


def _example(argument: Any) -> torch.Tensor | None:
    value = argument.meta.get("example_value") if isinstance(argument, Node) else None
    return value if isinstance(value, torch.Tensor) else None
