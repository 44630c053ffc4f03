"""A GPU that is not there: its tensors hold numbers of the CPU, and every wait of the host for it is noted.

A tensor on the device `AWAY` is one that code of a GPU cannot look into: it is neither on the CPU nor, to the library,
anywhere else than on CUDA. What crosses between host and device is written down as it would be on CUDA: numbers that
the host reads, shapes that depend on numbers, and tensors that are uploaded. Ops of the library run as they do where
they have no kernel of their own. `torch.cuda` itself is not there: what asks for it by name is not covered.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from flexasl import ops
from flexasl.kernels import flex

AWAY = torch.device("meta")
"""What the device calls itself; torch without CUDA makes no tensors that say `cuda`."""

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
"""What gives a number to the host, or a shape that depends on numbers."""
OPS = {f"flexasl::{name}": getattr(ops, name) for name in ops.__all__ if hasattr(getattr(ops, name), "_init_fn")}


class Away(torch.Tensor):
    """A tensor on the device."""

    held: Tensor
    is_cuda = True  # type: ignore[assignment]
    is_meta = False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"away({self.held!r})"

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        where = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **where, dtype=held.dtype, device=AWAY)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class Wait(NamedTuple):
    """One time at which the host and the device wait for each other."""

    kind: str
    """read or upload"""
    what: str
    layer: int | None
    """The decoder layer that ran, its pruning included; None before the first and after the last."""
    place: str
    """file:line, of the library or else of the code that it was called by"""


class Waits(list[Wait]):
    """All of them, in order."""

    def count(self, kind: str) -> int:  # type: ignore[override]
        return sum(one.kind == kind for one in self)

    def by_layer(self, kind: str) -> Counter[int | None]:
        return Counter(one.layer for one in self if one.kind == kind)

    def told(self) -> str:
        return "\n".join(f"layer {one.layer}: {one.kind} by {one.what} at {one.place}" for one in self)


@contextmanager
def counted(triton: bool = True) -> Iterator[Waits]:
    """What waits inside. triton: whether torch can compile kernels for the device."""
    found, compiled, compiles_for = Waits(), flex._compiled, flex.compiles_for
    flex._compiled = lambda kind, dynamic: _flex  # type: ignore[assignment]
    flex.compiles_for = lambda device: triton  # type: ignore[assignment]
    try:
        with _Ops(found), _Calls(found):
            yield found
    finally:
        flex._compiled, flex.compiles_for = compiled, compiles_for


def away(states: Tensor) -> Tensor:
    """The same numbers on the device."""
    with _disable_current_modes():
        made: Tensor = Away(states.detach().clone())
    return made


def here(states: Tensor) -> Tensor:
    """The same numbers on the host, without a wait that counts."""
    return states.held if isinstance(states, Away) else states


def move(model: nn.Module) -> nn.Module:
    """Puts a model's weights and buffers on the device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(away(weight), requires_grad=False)
        for name, states in module._buffers.items():
            if states is not None:
                module._buffers[name] = away(states)
    return model


def _flex(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
    """`flex_attention` by its mask and score functions, which a compiler would make one kernel of."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    places = [torch.arange(count, device=query.device) for count in (batch, heads, queries, keys)]
    b, h, q, k = (at.view([-1 if dim == own else 1 for dim in range(4)]) for own, at in enumerate(places))
    key, value = (states.repeat_interleave(heads // key.shape[1], 1) for states in (key, value))
    logits = query @ key.transpose(-1, -2) * settings["scale"]
    if settings["score_mod"] is not None:
        logits = settings["score_mod"](logits, b, h, q, k)
    logits = logits.masked_fill(~settings["block_mask"].mask_mod(b, h, q, k), float("-inf"))
    out = logits.softmax(-1) @ value
    return (out, logits.logsumexp(-1)) if settings.get("return_lse") else out


class _Ops(TorchDispatchMode):
    def __init__(self, found: Waits) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = OPS.get(func._schema.name)
        if own is not None and _on_device(args, kwargs or {}):
            with self:  # what it is made of counts too
                return own._init_fn(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}, self.found)


class _Calls(TorchFunctionMode):
    """What never reaches the dispatcher."""

    def __init__(self, found: Waits) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Away):
            note(self.found, "read", "tolist")
            return args[0].held.tolist()
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            to = kwargs.get("device", args[0].device if func is torch.Tensor.new_tensor else "cpu")
            values = args[-1]
            if to is not None and torch.device(to) == AWAY and not isinstance(values, Away):
                note(self.found, "upload", func.__name__)
                if func is torch.Tensor.new_tensor:
                    kwargs = {"dtype": args[0].dtype} | kwargs
                with _disable_current_modes():
                    return Away(torch.tensor(values, **kwargs | {"device": "cpu"}))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Away):
            args = (args[0], self._index(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _index(self, index: Any) -> Any:
        """An index whose lists and tensors of the host have been uploaded."""
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        if isinstance(index, list) or (type(index) is torch.Tensor and index.dim() > 0):
            note(self.found, "upload", "index")
            with _disable_current_modes():
                return Away(torch.as_tensor(index) if len(index) else torch.empty(0, dtype=torch.int64))
        return index


def note(found: Waits | None, kind: str, what: str) -> None:
    """Writes down a wait of the code that runs."""
    if found is None:
        return
    frame, place, layer = sys._getframe(1), "", None
    while frame is not None:
        name = frame.f_code.co_filename
        if "/flexasl/" in name and not place:
            place = f"{name.rpartition('/flexasl/')[2]}:{frame.f_lineno}"
        if frame.f_code.co_name == "_run_layer" and "index" in frame.f_locals and layer is None:
            layer = frame.f_locals["index"]
        frame = frame.f_back  # type: ignore[assignment]
    found.append(Wait(kind, what, layer, place or "elsewhere"))


def _on_device(args: Any, kwargs: Any) -> bool:
    return any(isinstance(one, Away) for one in tree_leaves((args, kwargs)))


def _run(func: Any, args: Any, kwargs: Any, found: Waits | None) -> Any:
    """The op on what its tensors hold; a result is where its tensors are, or where it says."""
    given, to = tree_leaves((args, kwargs)), kwargs.get("device")
    from_device = any(isinstance(one, Away) for one in given)
    to_device = to is not None and torch.device(to) == AWAY
    hosts = [one for one in given if type(one) is not Away and isinstance(one, Tensor) and one.dim() > 0]
    name = func._schema.name.removeprefix("aten::")
    if from_device and (func in READS or _has_mask(func, args) or (to is not None and not to_device)):
        note(found, "read", name)
    if name == "repeat_interleave" and kwargs.get("output_size") is None and from_device:
        note(found, "read", name)
    if hosts and (to_device or (from_device and name in ("copy_", "index", "index_put_", "_index_put_impl_"))):
        note(found, "upload", name)
    elif hosts and from_device:
        raise RuntimeError(f"{name} has tensors on the host and on the device")
    if to_device:
        kwargs = kwargs | {"device": "cpu"}
    plain_args, plain = tree_map_only(Away, lambda states: states.held, (args, kwargs))
    if name == "histc":  # which a CPU has for floats alone
        plain_args = (plain_args[0].float(), *plain_args[1:])
    made = func(*plain_args, **plain)
    if to_device or (from_device and to is None):
        known = {id(one.held): one for one in given if isinstance(one, Away)}
        return tree_map_only(Tensor, lambda states: known[id(states)] if id(states) in known else Away(states), made)
    return made


def _has_mask(func: Any, args: Any) -> bool:
    """Whether an index is bool, so that the host must know how many are True."""
    if func._schema.name not in ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"):
        return False
    masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
    if not masks or func._schema.name == "aten::index":
        return bool(masks)
    return not (args[2].numel() == 1 and len(args[1]) == 1)  # torch fills where the value is one number
