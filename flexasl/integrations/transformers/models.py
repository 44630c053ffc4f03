"""Which models can be patched, and where in them decoder layers and their attention are."""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexasl.attention import FlexASLAttention
from flexasl.errors import UnsupportedError
from flexasl.integrations.inputs import refuse_state
from flexasl.integrations.transformers.adapters import refuse_adapters
from flexasl.integrations.transformers.media import BOTH_WAYS, why_no_media
from flexasl.integrations.transformers.own_config import OwnConfig
from flexasl.integrations.transformers.placement import input_device, refuse_placement

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
HYBRID = "some of its layers keep a state instead of keys and values"
PICKS = "its attention chooses keys by a rule of its own"
SHARED = "its last layers use the keys and values of earlier ones"
REFUSED = {
    "bamba": HYBRID,
    "bailing_hybrid": HYBRID,
    "bloom": "its attention adds ALiBi, a bias by distance",
    "deepseek_v32": PICKS,
    "deepseek_v4": PICKS,
    "doge": PICKS,
    "falcon_h1": HYBRID,
    "falcon_mamba": HYBRID,
    "gemma3": BOTH_WAYS,
    "gemma3n": SHARED,
    "gemma3n_text": SHARED,
    "gemma4": SHARED,
    "gemma4_text": SHARED,
    "glm_moe_dsa": PICKS,
    "granitemoehybrid": HYBRID,
    "jamba": HYBRID,
    "kimi_linear": HYBRID,
    "lfm2": HYBRID,
    "lfm2_moe": HYBRID,
    "llama4_text": "some of its layers attend in chunks",
    "llama4": "some of its layers attend in chunks",
    "mamba": HYBRID,
    "mamba2": HYBRID,
    "minimax": HYBRID,
    "mpt": "its attention adds ALiBi, a bias by distance",
    "nemotron_h": HYBRID,
    "olmo_hybrid": HYBRID,
    "paligemma": BOTH_WAYS,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": HYBRID,
    "rwkv": HYBRID,
    "zamba": HYBRID,
    "zamba2": HYBRID,
}
CACHES = ("past_key_values", "cache", "layer_past", "past_key_value")
"""What the argument that is the cache is called: the first two by models, since 5.24 the second; all by layers."""
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Stack:
    """A model's decoder layers, and what a patch needs to know of them."""

    decoder: Any
    layers: list[Any]
    attention: list[FlexASLAttention]
    layer_arguments: list[str]
    """Names of what a layer's forward takes after the hidden states, in order."""
    cache_argument: str
    """The one of them that is the cache."""
    tested: bool
    """Whether the tests cover this kind of model under this version of transformers."""
    no_media: str | None
    """Why a model that reads more than text cannot be given more; None where it can, or reads text alone."""

    @property
    def ranking_layers(self) -> list[int]:
        """Layers whose ranking counts: those that see the whole prompt, or all where none does."""
        seeing = [index for index, attention in enumerate(self.attention) if attention.sliding_window is None]
        return seeing or list(range(len(self.layers)))


def find_stack(model: PreTrainedModel, kernel: Any, compile: bool) -> Stack:
    """Where the model's layers are; raises `UnsupportedError` for one that cannot be patched."""
    kind = type(model).__name__
    _refuse_by_name(model)
    refuse_adapters(model)
    refuse_placement(model, compile)
    decoder = model.get_decoder()
    if getattr(getattr(decoder, "config", None), "_attn_implementation", None) == NAME:
        raise UnsupportedError(f"{kind} is patched already; call model.flexasl_patch.remove() first")
    if not model.can_generate():
        raise UnsupportedError(f"{kind} cannot generate; give the model with its language-model head (...ForCausalLM)")
    refuse_state(model, kernel, input_device(model), "patch it with compile=True instead")
    layers = decoder_layers(model)
    if not layers or not model._can_set_attn_implementation():
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
    tested = model.config is config and config.model_type in SUPPORTED and _is_tested(transformers.__version__)
    asked = [_promised(layer, index, config) for index, layer in enumerate(layers)] if tested else _recorded(model)
    if len(asked) != len(layers):
        raise UnsupportedError(
            f"model type {config.model_type!r} ({kind}) is not among the tested ones, and its {len(layers)} layers ask "
            f"for attention {len(asked)} times where keywords are to reach it; it cannot be patched"
        )
    attention = [FlexASLAttention(**settings, kernel=kernel) for settings in asked]
    no_media = None if model.config is config else why_no_media(model.config.model_type)
    return Stack(decoder, layers, attention, names, cache, tested, no_media)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a model, as many as its decoder's config says; none where they are no list of modules."""
    decoder = model.get_decoder()
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
    if getattr(config, "alibi", False):
        raise UnsupportedError(
            f"model type {config.model_type!r} cannot be patched: its attention adds ALiBi, a bias by distance"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedError(f"model type {config.model_type!r} cannot be patched: {SHARED}")
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


def _recorded(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The attention that each layer asks for, in order, found out by one run on two tokens, in which it gives zeros."""
    asked: list[dict[str, Any]] = []
    # Lists among the arguments would be copied on the way by accelerate's hooks; functions are not.
    try:
        with torch.no_grad(), OwnConfig(model.get_decoder(), RECORDING):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=input_device(model)), flexasl_asked=asked.append)
    except Exception as error:
        raise UnsupportedError(
            f"model type {model.config.model_type!r} ({type(model).__name__}) is not among those tested, and a trial "
            f"run failed: {error}"
        ) from error
    return asked


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **asked: Any) -> tuple[Tensor, None]:
    """transformers' attention interface, giving zeros [B, M, H, D]."""
    note = asked.get("flexasl_asked")
    if note is not None:
        names = {"scale": "scaling", "sliding_window": "sliding_window", "softcap": "softcap"}
        note({ours: asked.get(theirs) for ours, theirs in names.items()})
    batch, heads, count, _ = query.shape
    return value.new_zeros(batch, count, heads, value.shape[-1]), None


AttentionInterface.register(RECORDING, _record)
AttentionMaskInterface.register(RECORDING, lambda *args, **kwargs: None)


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
