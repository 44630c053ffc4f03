"""A patched model: hooks that hand each forward pass to a `Call`, and what they refuse."""

from __future__ import annotations

import functools
import inspect
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from flexasl.attention import FlexASLAttention
from flexasl.call import Call, LayerStep
from flexasl.compiling import compile_region, run_layer
from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.integrations.transformers.cache import adopt
from flexasl.integrations.transformers.checking import check_by_running
from flexasl.integrations.transformers.generation import guard_generation
from flexasl.integrations.transformers.models import NAME, find_stack
from flexasl.integrations.transformers.placement import sum_over_ranks
from flexasl.packing import Continued
from flexasl.policies import Policy
from flexasl.prefill import Prefill, left_padded_lengths
from flexasl.report import Report

CALL, OUTER = "flexasl_call", "flexasl_outer_call"
"""Keywords: what goes down to attention, the `Call` first and inside a layer its `LayerStep`; and there the `Call`."""
REFUSED = {
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "layers after the selection see fewer tokens than those before",
    "output_router_logits": "layers after the selection route fewer tokens than those before",
    "labels": "dropped tokens have no logits",
}
SLACK = 128
"""Cache entries that compiled decode makes room for at a time."""


class Patch:
    """A patched model: `report` on the last prompt, `remove` to undo. Also a context manager that removes itself."""

    def __init__(self, model: Any, config: ASLConfig, policy: Policy, *, kernel: Any, compile: bool) -> None:
        stack = find_stack(model, kernel, compile)
        self.policy = policy
        self.config = policy.resolve(config, len(stack.layers), stack.voters)
        """The settings that run on this model, with no default left open."""
        self.compiled = compile
        """Whether decoder layers run as compiled graphs."""
        self.slack = SLACK if compile else 0
        """Cache entries that room is made for at a time."""
        self.report: Report | None = None
        """What the last prefill decided and saved; None before the first."""
        self._model = model
        self._stack = stack
        self._reduce = sum_over_ranks(model)
        self._arguments = list(inspect.signature(type(stack.decoder).forward).parameters)[1:]
        check = None if stack.tested else check_by_running(model)
        self._attention_before = model.config._attn_implementation
        self._regions = [*stack.layers, model.get_output_embeddings()] if compile else []
        if compile:
            region = compile_region(run_layer)
            head = compile_region(run_layer)
            for module in self._regions:
                module.forward = functools.partial(_run, head if module is self._regions[-1] else region, module)
        model.set_attn_implementation(NAME)
        attributes = dict(vars(model))
        self._guarded = guard_generation(model)
        self._shadowed = {name: attributes[name] for name in self._guarded if name in attributes}
        model.flexasl_patch = self
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_refuse_arguments, with_kwargs=True),
            stack.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            stack.decoder.register_forward_hook(self._leave, with_kwargs=True),
        ]
        for index, layer in enumerate(stack.layers):
            before, after = functools.partial(self._enter_layer, index), functools.partial(self._leave_layer, index)
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after, with_kwargs=True))
        if check is not None:
            check(self)

    def remove(self) -> None:
        """Makes the model exactly what it was; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._regions:
            del module.forward
        self._model.set_attn_implementation(self._attention_before)
        for name in (*self._guarded, "flexasl_patch"):
            delattr(self._model, name)
        vars(self._model).update(self._shadowed)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"<flexasl.Patch {self.policy.name} on {type(self._model).__name__}, {state}>"

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
        kind = decoder.config._attn_implementation
        if kind != NAME:
            raise UnsupportedError(
                f"the attention implementation of the patched model was set to {kind!r}; "
                f"call model.set_attn_implementation({NAME!r}), or patch.remove() first"
            )
        if decoder.training:
            raise UnsupportedError("the patched model is in training mode; call model.eval() first")
        _refuse_arguments(decoder, (), kwargs)
        embeds = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if embeds is None else embeds
        batch, count = tokens.shape[:2]
        cache = self._cache(decoder, kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        kwargs[CALL] = self._call(cache, past, batch, count, tokens.device, kwargs)
        return (), kwargs

    def _leave(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call: Call = kwargs[CALL]
        call.close()
        report = None
        if call.prefill is not None:
            report = self.report = call.report(self.policy)
        cache = kwargs.get("past_key_values")
        if cache is not None and call.caches is not None:
            ids, count = kwargs.get("input_ids"), call.columns.shape[1]
            cache.record(self._model, ids, kwargs.get("attention_mask"), count, report)

    def _enter_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call: Call = kwargs[CALL]
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        kwargs = dict(zip(self._stack.layer_arguments, args[1:], strict=False)) | kwargs
        if isinstance(call.rerun, SecondPass):
            call.rerun.inputs.append((hidden if index == 0 else None, dict(kwargs)))
        if index == 0:
            hidden = call.start(hidden)
        step = kwargs[CALL] = call.enter(index, self._stack.attention[index])
        kwargs[self._stack.cache_argument] = None if call.caches is None else step
        kwargs[OUTER] = call
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            kwargs["position_embeddings"] = tuple(call.table(table) for table in rotary)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = call.table(kwargs["position_ids"])
        return (hidden,), kwargs

    def _leave_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call: Call = kwargs[OUTER]
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = call.leave(index, kwargs[CALL], hidden)
        if index == len(self._stack.layers) - 1:
            hidden = call.finish(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _cache(self, decoder: Any, kwargs: dict[str, Any]) -> Any:
        """The call's cache with layers of ours, made or adopted where it is new; None where there is to be none."""
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None:
            if not (decoder.config.use_cache if use_cache is None else use_cache):
                return None
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        adopt(cache, len(self._stack.layers), self.slack)
        return cache

    def _call(
        self,
        cache: Any,
        past: int,
        batch: int,
        count: int,
        device: torch.device,
        kwargs: dict[str, Any],
    ) -> Call:
        valid = _validity(kwargs.get("attention_mask"), batch, past + count, device)
        columns = torch.arange(past, past + count, device=device).expand(batch, -1)
        caches = None if cache is None else cache.layers
        slides = any(attention.sliding_window is not None for attention in self._stack.attention)
        if past > 0 and slides and valid is not None and not bool(valid[:, past:].all()):
            raise UnsupportedError(
                "attention_mask pads a later turn of a model with sliding windows, which count positions; "
                "give turns of equal length, or one row at a time"
            )
        if past > 0 and (count == 1 or self.config.later_turns == "keep"):
            return Call(caches, None, columns, valid, compiled=self.compiled)
        if valid is None and _is_packed(kwargs.get("position_ids")):
            raise UnsupportedError("position_ids restart within a row; give packed prompts as rows of a padded batch")
        prefill = Prefill(
            self.policy,
            self.config,
            len(self._stack.layers),
            [count] * batch if valid is None else left_padded_lengths(valid[:, past:]),
            tokens=count,
            device=device,
            voters=self._stack.voters,
            reduce=self._reduce,
        )
        again = SecondPass(self._stack.layers) if self.policy.second_pass else None
        return Call(caches, prefill, columns, valid if past > 0 else None, compiled=self.compiled, rerun=again)


class SecondPass:
    """Runs layers again on what they were given in the first pass, under another call."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.inputs: list[tuple[Tensor | None, dict[str, Any]]] = []
        """Of each layer so far: hidden states, of the first one only, and keywords."""

    def __call__(self, call: Call, last: int) -> Tensor:
        hidden: Any = self.inputs[0][0]
        for layer, (_, kwargs) in zip(self.layers[: last + 1], self.inputs):
            output = layer(hidden, **(kwargs | {CALL: call}))
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, M, D], key and value [B, G, N, D] → [B, M, H, D]."""
    step: LayerStep | None = kwargs.get(CALL)
    if step is None:
        raise UnsupportedError(
            f"{type(module).__name__} was called outside the patched model; call the model, or patch.remove() first"
        )
    mine: FlexASLAttention = step.attention
    if (mine.scale, mine.sliding_window, mine.softcap) != (scaling, sliding_window, softcap):
        raise UnsupportedError(
            f"{type(module).__name__} asks for scaling={scaling}, sliding_window={sliding_window}, softcap={softcap}, "
            f"where its attributes promise {mine.scale}, {mine.sliding_window}, {mine.softcap}; it cannot be patched"
        )
    out = step.attend(query, key, value, s_aux)
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask interface: every layer's mask is made from its own tokens, in `Call`."""


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, no_mask)


def _run(region: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's forward as the compiled region, but for later turns that are pruned, which are rare and run
    uncompiled; the call itself stays outside, as it differs from pass to pass."""
    kwargs.pop(OUTER, None)
    step = kwargs.get(CALL)
    later_turn = isinstance(step, LayerStep) and isinstance(step.packed, Continued)
    return run_layer(module, args, kwargs) if later_turn else region(module, args, kwargs)


def _refuse_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name, why in REFUSED.items():
        given = kwargs.get(name)
        if given is None and name != "labels":
            given = getattr(module.config, name, None)
        if given is not None and given is not False:
            raise UnsupportedError(f"{name} is not available on a patched model: {why}; call patch.remove() first")


def _validity(mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor | None:
    """The call's padding as [B, columns] bool, or None where there is none."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (batch, columns):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attention_mask is {given}; a patched model takes [batch, tokens so far], here {[batch, columns]}"
        )
    valid = mask.to(device=device, dtype=torch.bool)
    return None if bool(valid.all()) else valid


def _is_packed(position_ids: Tensor | None) -> bool:
    return position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())
