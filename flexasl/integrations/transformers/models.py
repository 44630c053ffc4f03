"""Which models can be patched, and where in them decoder layers and their attention are."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from flexasl.attention import FlexASLAttention
from flexasl.errors import UnsupportedError
from flexasl.integrations.inputs import refuse_state
from flexasl.integrations.transformers.adapters import refuse_adapters
from flexasl.integrations.transformers.carrying import carriers, carry
from flexasl.integrations.transformers.media import why_no_media
from flexasl.integrations.transformers.own_attention import OwnAttention, own_attention
from flexasl.integrations.transformers.own_config import OwnConfig
from flexasl.integrations.transformers.placement import input_device, refuse_placement
from flexasl.integrations.transformers.states import DummyLayer, states_in

try:
    from transformers.cache_utils import DynamicIndexedLayer
except ImportError:  # transformers before 5.19 or so, which knows no attention to keys that are chosen by others

    class DynamicIndexedLayer(DynamicLayer):  # type: ignore[no-redef]
        """A layer with keys by which others are chosen."""


NAME, RECORDING = "flexasl", "flexasl_recording"
"""Of attention implementations: the one of a patched model, and one that only notes what it is asked for."""
TESTED = ("5.17", "5.24")
"""Oldest and newest transformers that the tests have passed with."""
SUPPORTED = (
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""Model types in the tests, by name; others are tried by structure."""
OWN_STATES = "it keeps states outside of transformers' cache"
NO_KEYS = "none of its layers has keys and values, by which tokens are ranked"
ROUNDED = "its ALiBi is made of positions in bfloat16, of which several tokens share one, and is no bias by distance"
BIASED = "each query makes a bias by distance of its own for every key, which no kernel here can add to logits"
PICKS = "its attention chooses keys by a rule of its own"
REFUSED = {
    "deepseek_v4": "far tokens have no keys of their own, but one entry for 4 or 128 neighbours, so that no layer "
    "ranks single tokens, and those that are left would be other neighbours",
    "doge": "its attention chooses keys by a mask that it makes itself",
    "falcon_mamba": NO_KEYS,
    "inkling2_text": BIASED,
    "inkling_text": BIASED,
    "longcat_flash": "each of its layers attends twice, with two caches, and a patch takes layers that attend once",
    "mamba": NO_KEYS,
    "mamba2": NO_KEYS,
    "minimax": OWN_STATES,
    "qwen4_exp_text": "its indexer chooses blocks of neighbouring tokens, and kept tokens make other blocks",
    "recurrent_gemma": OWN_STATES,
    "rwkv": OWN_STATES,
    "zaya": "its layers pass states of their router on for each token, beside the hidden states that a patch takes",
}
CACHES = ("past_key_values", "cache", "layer_past", "past_key_value")
"""What the argument that is the cache is called: the first two by models, since 5.24 the second; all by layers."""
KEPT = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
"""What cache layers with keys and values alone are."""
CHUNKS = "chunked_attention"
LAYER_TYPES = {
    CHUNKS,
    "indexed_attention",
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "mamba",
    "conv",
    "hybrid",
    "hybrid_sliding",
    "moe",
    "mlp",
}


@dataclass(frozen=True)
class Stack:
    """A model's decoder layers, and what a patch needs to know of them."""

    decoder: Any
    layers: list[Any]
    attention: list[FlexASLAttention | None]
    """None for a layer that has none."""
    states: list[int | None]
    """How many kinds of states a layer keeps in place of keys and values, or beside them; None where it keeps none."""
    lenders: dict[int, int]
    """Of layers that use the keys and values of earlier ones, which those are."""
    layer_arguments: list[str]
    """Names of what a layer's forward takes after the hidden states, in order."""
    cache_argument: str
    """The one of them that is the cache."""
    tested: bool
    """Whether the tests cover this kind of model under this version of transformers."""
    no_media: str | None
    """Why a model that reads more than text cannot be given more; None where it can, or reads text alone."""
    own_attention: OwnAttention | None = None
    """What stands in the place of attention that does not go through transformers' interface."""
    indexed: Sequence[bool] = ()
    """Whether a layer attends to keys that it chooses by keys of another kind, or that an earlier layer chose."""
    carriers: Sequence[nn.Module] = ()
    """Modules that must be given keywords which their layers do not hand on."""

    @property
    def stateful(self) -> bool:
        """Whether some layers keep states."""
        return any(number is not None for number in self.states)

    @property
    def reusing(self) -> list[int]:
        """Layers that attend to keys which an earlier layer chose."""
        config = self.decoder.config
        kinds = getattr(config, "indexer_types", None) or []
        return [layer for layer, kind in enumerate(kinds[: len(self.layers)]) if kind == "shared"]

    @property
    def ranking_layers(self) -> list[int]:
        """Layers whose ranking counts: those that attend to the whole prompt, or all with attention where none does;
        before the first one whose keys and values others use, so that all of them run on the same tokens."""
        first = min(self.lenders.values(), default=len(self.layers))
        attending = {
            index: own
            for index, own in enumerate(self.attention[:first])
            if own is not None and index + 1 not in self.reusing
        }
        seeing = [index for index, attention in attending.items() if attention.sliding_window is None]
        return seeing or list(attending)


def find_stack(model: PreTrainedModel, kernel: Any, compile: bool) -> Stack:
    """Where the model's layers are; raises `UnsupportedError` for one that cannot be patched."""
    kind = type(model).__name__
    _refuse_by_name(model)
    refuse_adapters(model)
    refuse_placement(model, compile)
    decoder = decoder_of(model)
    if getattr(getattr(decoder, "config", None), "_attn_implementation", None) == NAME:
        raise UnsupportedError(f"{kind} is patched already; call model.flexasl_patch.remove() first")
    if not model.can_generate():
        raise UnsupportedError(f"{kind} cannot generate; give the model with its language-model head (...ForCausalLM)")
    refuse_state(model, kernel, input_device(model), "patch it with compile=True instead")
    layers = decoder_layers(model)
    own = own_attention(getattr(decoder, "config", None))
    if not layers or (own is None and not model._can_set_attn_implementation()):
        raise UnsupportedError(
            f"model type {model.config.model_type!r} ({kind}) is not built as a list of decoder layers over "
            f"transformers' attention interface; tested models are {', '.join(SUPPORTED)}"
        )
    if compile and any("forward" in vars(module) for module in (*layers, model.get_output_embeddings())):
        raise UnsupportedError(
            f"compile=True cannot take {kind}, because another library has replaced the forward of its layers; "
            "give compile=False"
        )
    config = decoder.config
    names = list(inspect.signature(type(layers[0]).forward).parameters)[2:]
    cache = next((name for name in CACHES if name in names), None)
    if cache is None:
        raise UnsupportedError(f"layers of {kind} take no cache by a name that is known; it cannot be patched")
    lenders = _lenders(config, len(layers))
    kinds, states, indexed = _remembered(config, len(layers), lenders)
    chunked = CHUNKS in (getattr(config, "layer_types", None) or ())
    if compile and (lenders or chunked or any(indexed) or any(number is not None for number in states)):
        what = "use the keys and values of others" if lenders else "keep states that are read row by row"
        what = "choose which keys they attend to, row by row" if any(indexed) else what
        what = "attend in chunks, counted from each row's first token" if chunked else what
        raise UnsupportedError(f"compile=True cannot take {kind}, whose layers {what}; give compile=False")
    if compile and own is not None:
        raise UnsupportedError(f"compile=True cannot take {kind}, which has its own attention; give compile=False")
    tested = model.config is config and config.model_type in SUPPORTED and _is_tested(transformers.__version__)
    asked: list[dict[str, Any] | None]
    carrying: list[nn.Module] = []
    if own is not None:
        asked = [own.asks(getattr(layer, own.name)) for layer in layers]
    elif tested:
        asked = [_promised(layer, index, config) for index, layer in enumerate(layers)]
    else:
        recorded = _recorded(model, layers)
        if not any(recorded):
            carrying = carriers(layers, CACHES)
            recorded = _recorded(model, layers, carrying)
        if [len(own) for own in recorded] != list(map(int, kinds)):
            raise UnsupportedError(
                f"model type {config.model_type!r} ({kind}) is not among the tested ones, and its {len(layers)} layers "
                f"ask for attention {sum(map(len, recorded))} times where keywords are to reach it, in place of "
                f"{sum(kinds)}; it cannot be patched"
            )
        asked = [own[0] if own else None for own in recorded]
    if chunked:
        chunk = {"sliding_window": config.attention_chunk_size, "chunked": True}
        asked = [own if own is None or kind != CHUNKS else own | chunk for own, kind in zip(asked, config.layer_types)]
    made = [None if settings is None else FlexASLAttention(**settings, kernel=kernel) for settings in asked]
    if all(attention is None for attention in made):
        raise UnsupportedError(f"model type {config.model_type!r} cannot be patched: {NO_KEYS}")
    no_media = None if model.config is config else why_no_media(model.config.model_type)
    stack = Stack(decoder, layers, made, states, lenders, names, cache, tested, no_media, own, indexed, carrying)
    if not stack.ranking_layers:
        raise UnsupportedError(
            f"model type {config.model_type!r} cannot be patched: no layer attends before layer "
            f"{min(lenders.values())}, the first whose keys and values others use"
        )
    return stack


def _remembered(config: Any, count: int, lenders: dict[int, int]) -> tuple[list[bool], list[int | None], list[bool]]:
    """Of each layer, whether it attends to keys and values, how many kinds of states it keeps, and whether it chooses
    keys by others, by the cache that is made for it, or for the layer whose keys and values it uses."""
    made = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(count)]
    layers = [made[lenders.get(layer, layer)] for layer in range(count)]
    for index, layer in enumerate(layers):
        if not isinstance(layer, (LinearAttentionCacheLayerMixin, DummyLayer)) and type(layer) not in KEPT:
            raise UnsupportedError(
                f"model type {config.model_type!r} cannot be patched: layer {index} keeps a {type(layer).__name__}, "
                f"and {PICKS if isinstance(layer, DynamicLayer) else 'it is not known how to prune that'}"
            )
    indexed = [isinstance(layer, DynamicIndexedLayer) for layer in layers]
    return [isinstance(layer, CacheLayerMixin) for layer in layers], [states_in(layer) for layer in layers], indexed


def _lenders(config: Any, count: int) -> dict[int, int]:
    """Of layers that use the keys and values of earlier ones, which those are: the last of the same type with its
    own."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    first = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {layer: max(at for at in range(first) if kinds[at] == kinds[layer]) for layer in range(first, count)}


def decoder_of(model: Any) -> Any:
    """The text decoder of a model: what transformers calls so, or, where that is a head or has a head of its own, the
    model around or inside it."""
    decoder = model.get_decoder()
    others = getattr(decoder, "model", None), model.base_model
    found = (one for one in others if isinstance(one, PreTrainedModel) and layers_of(one, None))
    return decoder if layers_of(decoder, None) else next(found, decoder)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a model, as many as its decoder's config says; none where they are no list of modules."""
    decoder = decoder_of(model)
    return layers_of(decoder, getattr(getattr(decoder, "config", None), "num_hidden_layers", None))


def layers_of(decoder: Any, count: int | None) -> list[Any]:
    """A decoder's first so many layers; none where they are no list of modules."""
    layers = next((getattr(decoder, name) for name in ("layers", "h", "blocks") if hasattr(decoder, name)), None)
    return list(layers)[:count] if isinstance(layers, nn.ModuleList) else []


def _refuse_by_name(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    for name in (model.config.model_type, config.model_type):
        if name in REFUSED:
            raise UnsupportedError(f"model type {name!r} cannot be patched: {REFUSED[name]}")
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"model type {config.model_type!r} cannot be patched: it is an encoder-decoder")
    if config.model_type == "falcon" and config.alibi:
        raise UnsupportedError(f"model type {config.model_type!r} cannot be patched: {ROUNDED}")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if others:
        raise UnsupportedError(
            f"model type {config.model_type!r} cannot be patched: it has layers of type {others[0]!r}; "
            f"only {' and '.join(sorted(LAYER_TYPES))} work"
        )


def _promised(layer: Any, index: int, config: Any) -> dict[str, Any]:
    """The attention that a layer of a tested model asks for, by its attributes; its first call checks that it does."""
    module = next(getattr(layer, name) for name in ("self_attn", "attn", "attention") if hasattr(layer, name))
    if not hasattr(module, "scaling"):  # PEFT's adaption prompts wrap it
        module = module.model
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        kinds = getattr(config, "layer_types", None)
        slides = kinds[index] == "sliding_attention" if kinds else True
        window = getattr(config, "sliding_window", None) if slides else None
    softcap = getattr(module, "attn_logit_softcapping", None)
    return {"scale": float(module.scaling), "sliding_window": window, "softcap": softcap}


def _recorded(
    model: PreTrainedModel, layers: list[Any], carrying: Sequence[nn.Module] = ()
) -> list[list[dict[str, Any]]]:
    """What each layer asks of attention, found out by one run on two tokens, in which that gives zeros. carrying:
    modules that keywords do not reach by themselves."""
    made: list[list[dict[str, Any]]] = [[] for _ in layers]
    running = [0]

    def begins(index: int, *args: Any) -> None:
        running[0] = index

    def asked(settings: dict[str, Any]) -> None:
        made[running[0]].append(settings)

    handles = [layer.register_forward_pre_hook(functools.partial(begins, index)) for index, layer in enumerate(layers)]
    handles += carry(carrying, "flexasl_asked", lambda kwargs: asked)
    # Lists among the arguments would be copied on the way by accelerate's hooks; functions are not.
    try:
        with torch.no_grad(), OwnConfig(decoder_of(model), RECORDING):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=input_device(model)), flexasl_asked=asked)
    except Exception as error:
        raise UnsupportedError(
            f"model type {model.config.model_type!r} ({type(model).__name__}) is not among those tested, and a trial "
            f"run failed: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return made


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **asked: Any) -> tuple[Tensor, None]:
    """transformers' attention interface, giving zeros [B, M, H, D]."""
    note = asked.get("flexasl_asked")
    if note is not None:
        names = {"scale": "scaling", "sliding_window": "sliding_window", "softcap": "softcap"}
        note({ours: asked.get(theirs) for ours, theirs in names.items()})
    batch, heads, count, _ = query.shape
    return value.new_zeros(batch, count, heads, value.shape[-1]), None


AttentionInterface.register(RECORDING, _record)


def _record_mask(*args: Any, config: Any = None, **sizes: Any) -> Tensor | None:
    """transformers' mask interface: layers that choose keys look at masks, others at none."""
    if "indexed_attention" not in (getattr(config, "layer_types", None) or ()):
        return None
    return torch.ones(1, 1, sizes["q_length"], sizes["kv_length"], dtype=torch.bool, device=sizes.get("device"))


AttentionMaskInterface.register(RECORDING, _record_mask)


@functools.cache
def _is_tested(version: str) -> bool:
    """Whether the tests cover this transformers; warns, once a process, where it is newer."""
    if tuple(map(int, version.split(".")[:2])) <= tuple(map(int, TESTED[1].split("."))):
        return True
    warnings.warn(
        f"transformers {version} is newer than {TESTED[1]}, the last that flexasl was tested with; "
        "every model is checked by a short self-test when it is patched",
        stacklevel=6,
    )
    return False
