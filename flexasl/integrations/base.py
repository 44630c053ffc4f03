"""What the patches of all frameworks share: a forward pass as a `Call`, from layer to layer, and how it is undone.

Shapes: B batch, M new tokens, C width of hidden states, T tokens of all prompts at the current layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.call import Call
from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.policies import Policy
from flexasl.prefill import Prefill, left_padded_lengths
from flexasl.report import Report

SLACK = 128
"""Cache entries that decode makes room for at a time, where it writes them in place."""


class BasePatch:
    """A patched model: `report` on the last prompt, `remove` to undo. Also a context manager that removes itself.

    An adapter's `_enter` makes the call of a pass with `begin` and hands it down to the layers by keyword, whose
    `_enter_layer` finds it there and calls `enter_layer`.
    """

    CALL: str
    """The keyword by which layers take the call."""
    MASK: str
    """The argument that says where padding is."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        attention: Sequence[FlexASLAttention],
        config: ASLConfig,
        policy: Policy,
        *,
        voters: Sequence[int] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """voters and reduce: as for `Prefill`."""
        self.policy = policy
        self.config = policy.resolve(config, len(layers), voters)
        """The settings that run on this model, with no default left open."""
        self.report: Report | None = None
        """What the last prefill decided and saved; None before the first."""
        self.compiled = False
        """Whether decoder layers run as compiled graphs."""
        self._model = model
        self._layers = list(layers)
        self._attention = list(attention)
        self._voters = voters
        self._reduce = reduce
        self._handles: list[RemovableHandle] = []

    def hook(self, decoder: nn.Module) -> None:
        """Puts the hooks on decoder and layers, which makes the patch active."""
        self._model.flexasl_patch = self
        self._handles.append(decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._leave, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            before, after = functools.partial(self._enter_layer, index), functools.partial(self._leave_layer, index)
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after, with_kwargs=True))

    def remove(self) -> None:
        """Makes the model exactly what it was; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.restore()
        del self._model.flexasl_patch

    def restore(self) -> None:
        """Undoes what the adapter has changed besides its hooks."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"<flexasl.Patch {self.policy.name} on {type(self._model).__name__}, {state}>"

    def begin(
        self, caches: Sequence[LayerCache] | None, valid: Tensor | None, batch: int, count: int, device: torch.device
    ) -> Call:
        """The pass over `count` new tokens in each row, after those that the caches hold. valid [B, columns so far]
        bool is False at padding, None where there is none."""
        past = caches[0].seen if caches else 0
        columns = torch.arange(past, past + count, device=device).expand(batch, -1)
        if past > 0 and (count == 1 or self.config.later_turns == "keep"):
            return Call(caches, None, columns, valid, compiled=self.compiled)
        prefill = Prefill(
            self.policy,
            self.config,
            len(self._layers),
            [count] * batch if valid is None else left_padded_lengths(valid[:, past:], self.MASK),
            tokens=count,
            device=device,
            voters=self._voters,
            reduce=self._reduce,
        )
        again = SecondPass(self._layers, self.CALL) if self.policy.second_pass else None
        return Call(caches, prefill, columns, valid if past > 0 else None, compiled=self.compiled, rerun=again)

    def enter_layer(self, index: int, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer's input [B, M, C] as it runs on it; kwargs are its other arguments."""
        if isinstance(call.rerun, SecondPass):
            call.rerun.inputs.append((hidden if index == 0 else None, dict(kwargs)))
        if index == 0:
            hidden = call.start(hidden)
        call.step = call.enter(index, self._attention[index])
        return hidden

    def leave_layer(self, index: int, call: Call, hidden: Tensor) -> Tensor:
        """The layer's output as the next layer takes it; the last one's [B, M, C]."""
        assert call.step is not None
        hidden = call.leave(index, call.step, hidden)
        return call.finish(hidden) if index == len(self._layers) - 1 else hidden

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _leave(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call: Call = kwargs[self.CALL]
        call.close()
        if call.prefill is not None:
            self.report = call.report(self.policy)

    def _enter_layer(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _leave_layer(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.leave_layer(index, kwargs[self.CALL], output)


class SecondPass:
    """Runs layers again on what they were given in the first pass, under another call, which they take by the keyword
    `name`."""

    def __init__(self, layers: Sequence[Any], name: str) -> None:
        self.layers = layers
        self.name = name
        self.inputs: list[tuple[Tensor | None, dict[str, Any]]] = []
        """Of each layer so far: hidden states, of the first one only, and keywords."""

    def __call__(self, call: Call, last: int) -> Tensor:
        hidden: Any = self.inputs[0][0]
        for layer, (_, kwargs) in zip(self.layers[: last + 1], self.inputs):
            output = layer(hidden, **(kwargs | {self.name: call}))
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


def refuse_state(model: Any, kernel: str, device: torch.device) -> None:
    """Raises `UnsupportedError` where a model of any framework cannot be patched as it is now."""
    kind = type(model).__name__
    if hasattr(model, "flexasl_patch"):
        raise UnsupportedError(f"{kind} is patched already; call model.flexasl_patch.remove() first")
    if model.training:
        raise UnsupportedError(f"{kind} is in training mode; call model.eval() first")
    if kernel == "flex" and device.type == "cpu":
        raise UnsupportedError("kernel='flex' would compile a graph for every new token on cpu; give kernel='auto'")
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError(f"{kind} is compiled already (its compile() was called); patch it before")


def padding_or_none(valid: Tensor) -> Tensor | None:
    """None where nothing is padding."""
    return None if bool(valid.all()) else valid
