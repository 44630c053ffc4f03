"""A patched model: hooks that hand each forward pass to a `Call`, and what they refuse."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from flexasl.attention import FlexASLAttention
from flexasl.call import Call, LayerStep
from flexasl.compiling import compile_region, run_layer
from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.integrations.base import SLACK, BasePatch, padding, restart
from flexasl.integrations.transformers.cache import adopt
from flexasl.integrations.transformers.checking import check_by_running
from flexasl.integrations.transformers.fingerprint import calibrated_for
from flexasl.integrations.transformers.generation import guard_generation
from flexasl.integrations.transformers.likelihoods import refuse_likelihoods
from flexasl.integrations.transformers.models import CACHES, NAME, find_stack
from flexasl.integrations.transformers.placement import sum_over_ranks
from flexasl.packing import Continued
from flexasl.policies import Policy
from flexasl.presets import ModelKind

CALL, OUTER = "flexasl_call", "flexasl_outer_call"
"""Keywords: what goes down to attention, the `Call` first and inside a layer its `LayerStep`; and there the `Call`."""
REFUSED = {
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "layers after the selection see fewer tokens than those before",
    "output_router_logits": "layers after the selection route fewer tokens than those before",
    "labels": "dropped tokens have no logits",
}


class Patch(BasePatch):
    """A patched transformers model."""

    CALL = CALL
    MASK = "attention_mask"
    TABLES = ("position_embeddings", "position_ids")

    def __init__(self, model: Any, config: ASLConfig, policy: Policy, *, kernel: Any, compile: bool) -> None:
        stack = find_stack(model, kernel, compile)
        reduce = sum_over_ranks(model)
        text = model.config.get_text_config(decoder=True)
        kind = ModelKind(text.model_type, len(stack.layers), text.hidden_size)
        if config.calibrated_for is not None:
            config.calibrated_for.refuse_other(calibrated_for(model))
        settings: dict[str, Any] = {"voters": stack.voters, "reduce": reduce, "kind": kind}
        super().__init__(model, stack.layers, stack.attention, config, policy, **settings)
        self.ARGUMENTS = stack.layer_arguments
        self.compiled = compile
        self.slack = SLACK if compile else 0
        """Cache entries that room is made for at a time."""
        self._stack = stack
        self._arguments = list(inspect.signature(type(stack.decoder).forward).parameters)[1:]
        self._cache_name = next((name for name in CACHES[:2] if name in self._arguments), CACHES[0])
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
        self._handles.append(model.register_forward_pre_hook(_refuse_arguments, with_kwargs=True))
        self.hook(stack.decoder)
        if check is not None:
            check(self)

    def restore(self) -> None:
        for module in self._regions:
            del module.forward
        self._model.set_attn_implementation(self._attention_before)
        for name in self._guarded:
            delattr(self._model, name)
        vars(self._model).update(self._shadowed)

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
        kind = decoder.config._attn_implementation
        if kind != NAME:
            raise UnsupportedError(
                f"the attention implementation of the patched model was set to {kind!r}; "
                f"call model.set_attn_implementation({NAME!r}), or patch.remove() first"
            )
        self.refuse_training()
        _refuse_arguments(decoder, (), kwargs)
        embeds = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if embeds is None else embeds
        batch, count = tokens.shape[:2]
        cache = self._cache(decoder, kwargs)
        caches = None if cache is None else cache.layers
        past = self.past(caches, batch)
        if past == 0:
            refuse_likelihoods(self.policy, self.config, count)
        valid = padding(kwargs.get(self.MASK), batch, past + count, tokens.device, self.MASK)
        self._refuse_turn(valid, past, count, kwargs.get("position_ids"))
        kwargs[CALL] = self.begin(caches, valid, batch, count, tokens.device)
        return (), kwargs

    def _leave(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call: Call = kwargs[CALL]
        report = self.end(call)
        cache = kwargs.get(self._cache_name)
        if cache is not None and call.caches is not None:
            ids, count = kwargs.get("input_ids"), call.columns.shape[1]
            cache.record(self._model, ids, kwargs.get("attention_mask"), count, report)

    def _enter_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        args, kwargs = super()._enter_layer(index, layer, (hidden, *args[1:]), kwargs)
        call: Call = kwargs[CALL]
        held = None if call.caches is None else call.step
        return args, kwargs | {OUTER: call, CALL: call.step, self._stack.cache_argument: held}

    def _step(self, kwargs: dict[str, Any]) -> LayerStep:
        step: LayerStep = kwargs[CALL]
        return step

    def _leave_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        return super()._leave_layer(index, layer, args, {CALL: kwargs[OUTER]}, output)

    def _cache(self, decoder: Any, kwargs: dict[str, Any]) -> Any:
        """The call's cache with layers of ours, made or adopted where it is new; None where there is to be none."""
        given = [kwargs.pop(name) for name in CACHES[:2] if name in kwargs]
        cache = kwargs[self._cache_name] = next((one for one in given if one is not None), None)
        use_cache = kwargs.get("use_cache")
        if cache is None:
            if not (decoder.config.use_cache if use_cache is None else use_cache):
                return None
            cache = kwargs[self._cache_name] = DynamicCache(config=decoder.config)
        adopt(cache, len(self._stack.layers), self.slack)
        return cache

    def _refuse_turn(self, valid: Tensor | None, past: int, count: int, position_ids: Tensor | None) -> None:
        slides = any(attention.sliding_window is not None for attention in self.attention)
        if past > 0 and slides and valid is not None and not bool(valid[:, past:].all()):
            raise UnsupportedError(
                "attention_mask pads a later turn of a model with sliding windows, which count positions; "
                "give turns of equal length, or one row at a time"
            )
        if self.is_prompt(past, count) and valid is None and restart(position_ids):
            raise UnsupportedError("position_ids restart within a row; give packed prompts as rows of a padded batch")


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
