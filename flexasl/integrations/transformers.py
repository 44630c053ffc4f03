"""Patches transformers' causal decoders through their own extension points: attention and mask functions, hooks on the
decoder and its layers, and cache layers."""

from __future__ import annotations

import functools
import inspect
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.call import Call, LayerStep
from flexasl.compiling import compile_region, run_layer
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.policies import Policy
from flexasl.prefill import Prefill, left_padded_lengths
from flexasl.report import Report

NAME = "flexasl"
CALL, OUTER = "flexasl_call", "flexasl_outer_call"
"""Keywords: what goes down to attention, the `Call` first and inside a layer its `LayerStep`; and there the `Call`."""
ARCHITECTURES = ("granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
REFUSED = {
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "layers after the selection see fewer tokens than those before",
    "labels": "dropped tokens have no logits",
}
SLACK = 128
"""Cache entries that compiled decode makes room for at a time."""


class Patch:
    """A patched model: `report` on the last prompt, `remove` to undo. Also a context manager that removes itself."""

    def __init__(self, model: Any, config: ASLConfig, policy: Policy, *, kernel: Any, compile: bool) -> None:
        decoder = _check_model(model, kernel, compile)
        layers = list(decoder.layers)[: decoder.config.num_hidden_layers]
        self.policy = policy
        self.config = policy.resolve(config, len(layers))
        """The settings that run on this model, with no default left open."""
        self.compiled = compile
        """Whether decoder layers run as compiled graphs."""
        self.report: Report | None = None
        """What the last prefill decided and saved; None before the first."""
        self._model = model
        self._attention = [_attention(layer, index, decoder.config, kernel) for index, layer in enumerate(layers)]
        self._argument_names = list(inspect.signature(decoder.forward).parameters)
        self._attention_before = model.config._attn_implementation
        self._regions = [*layers, model.get_output_embeddings()] if compile else []
        if compile:
            region = compile_region(run_layer)
            head = compile_region(run_layer)
            for module in self._regions:
                module.forward = functools.partial(_run, head if module is self._regions[-1] else region, module)
        model.set_attn_implementation(NAME)
        self._model._supported_generation_modes = list(GENERATION_MODES)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_refuse_arguments, with_kwargs=True),
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave, with_kwargs=True),
        ]
        for index, layer in enumerate(layers):
            before = functools.partial(_enter_layer, index, self._attention[index])
            after = functools.partial(_leave_layer, index, index == len(layers) - 1)
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after, with_kwargs=True))

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
        del self._model._supported_generation_modes

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
        kwargs = dict(zip(self._argument_names, args, strict=False)) | kwargs
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

    def _leave(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call: Call = kwargs[CALL]
        call.close()
        if call.prefill is not None:
            self.report = call.report(self.policy)
        return output

    def _cache(self, decoder: Any, kwargs: dict[str, Any]) -> Any:
        """The call's cache with layers of ours, made or adopted where it is new; None where there is to be none."""
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None:
            if not (decoder.config.use_cache if use_cache is None else use_cache):
                return None
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        if type(cache) is not DynamicCache or cache.offloading:
            raise UnsupportedError(
                f"past_key_values is {'an offloaded' if getattr(cache, 'offloading', False) else 'a'} "
                f"{type(cache).__name__}; a patched model takes a DynamicCache, or none to make its own"
            )
        if cache.layers and all(isinstance(layer, PrunedCacheLayer) for layer in cache.layers):
            return cache
        if cache.get_seq_length() > 0:
            raise UnsupportedError(
                f"past_key_values holds {cache.get_seq_length()} tokens that were read by an unpatched model; "
                "give a cache that this model returned while patched, or none"
            )
        slack = SLACK if self.compiled else 0
        cache.layers = [PrunedCacheLayer(slack) for _ in self._attention]
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
        if past > 0:
            return Call(caches, None, columns, valid, compiled=self.compiled)
        if valid is None and _is_packed(kwargs.get("position_ids")):
            raise UnsupportedError("position_ids restart within a row; give packed prompts as rows of a padded batch")
        lengths = [count] * batch if valid is None else left_padded_lengths(valid)
        prefill = Prefill(self.policy, self.config, len(self._attention), lengths, tokens=count, device=device)
        return Call(caches, prefill, columns, None, compiled=self.compiled)


class PrunedCacheLayer(LayerCache, CacheLayerMixin):  # type: ignore[override]
    """A layer of a `DynamicCache` whose length is its own; `get_seq_length` counts the tokens read, kept or not."""

    is_sliding = False
    is_croppable = True

    def __init__(self, slack: int = 0) -> None:
        LayerCache.__init__(self, slack)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage is made as entries come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # A patched layer is given its `LayerStep` in place of the cache.
        raise FlexASLError(
            "past_key_values was made by a patched model and is used by an unpatched one; "
            "patch the model again, or start with a new cache"
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = 0 if self.keys is None else self.keys.shape[2]
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise FlexASLError(
                f"tokens_to_remove={tokens_to_remove} is positive; give minus the number of tokens to drop"
            )
        super().crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.select_rows(rows.repeat_interleave(repeats))


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
    mine = step.attention
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


def _enter_layer(
    index: int, attention: FlexASLAttention, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call: Call = kwargs[CALL]
    if index == 0:
        args = (call.start(args[0]), *args[1:])
    step = kwargs[CALL] = call.enter(index, attention)
    kwargs["past_key_values"] = None if call.caches is None else step
    kwargs[OUTER] = call
    rotary = kwargs.get("position_embeddings")
    if rotary is not None:
        kwargs["position_embeddings"] = tuple(call.table(table) for table in rotary)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = call.table(kwargs["position_ids"])
    return args, kwargs


def _leave_layer(
    index: int, last: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    call: Call = kwargs[OUTER]
    hidden = call.leave(index, kwargs[CALL], output)
    return call.finish(hidden) if last else hidden


def _run(region: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's forward as the compiled region; the call itself stays outside, as it differs from pass to pass."""
    kwargs.pop(OUTER, None)
    return region(module, args, kwargs)


def _attention(layer: Any, index: int, config: Any, kernel: Any) -> FlexASLAttention:
    """The attention that a decoder layer asks for, by its attributes; `attention_forward` checks that it does."""
    module = layer.self_attn
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return FlexASLAttention(
        scale=module.scaling,
        sliding_window=window if slides else None,
        softcap=getattr(module, "attn_logit_softcapping", None),
        kernel=kernel,
    )


def _check_model(model: PreTrainedModel, kernel: str, compile: bool) -> Any:
    """The decoder of a model that can be patched; raises `UnsupportedError` for any other."""
    kind = type(model).__name__
    if model.config._attn_implementation == NAME:
        raise UnsupportedError(f"{kind} is patched already; call remove() on its patch first")
    if model.config.model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"model type {model.config.model_type!r} ({kind}) is not supported; "
            f"the supported ones are {', '.join(ARCHITECTURES)}"
        )
    if not model.can_generate():
        raise UnsupportedError(f"{kind} cannot generate; give the model with its language-model head (...ForCausalLM)")
    if model.training:
        raise UnsupportedError(f"{kind} is in training mode; call model.eval() first")
    if kernel == "flex" and model.device.type == "cpu":
        raise UnsupportedError("kernel='flex' would compile a graph for every new token on cpu; give kernel='auto'")
    decoder = model.get_decoder()
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError(
            f"{kind} is compiled already (its compile() was called); patch it with compile=True instead"
        )
    if compile and any("forward" in vars(module) for module in (*decoder.layers, model.get_output_embeddings())):
        raise UnsupportedError(
            f"compile=True cannot take {kind}, because another library has replaced the forward of its layers; "
            "give compile=False"
        )
    return decoder


def _refuse_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name, why in REFUSED.items():
        given = kwargs.get(name)
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
