"""Models whose attention does not go through transformers' attention interface: what stands in its place while they are
patched.

Shapes: B batch, M tokens, C width of hidden states, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexasl.errors import UnsupportedError
from flexasl.layer_step import LayerStep

CACHES = ("layer_past", "past_key_values")
"""What these modules call the cache, in whose place they are given a layer's step."""


class OwnAttention(NamedTuple):
    """A kind of attention modules."""

    name: str
    """Of the module in a decoder layer."""
    attends: Callable[..., Any]
    """In the place of the module's forward: (module, hidden [B, M, C], step, its other arguments)."""
    asks: Callable[[Any], dict[str, Any]]
    """What a module wants of attention."""

    def forwards(self, layers: list[Any]) -> list[tuple[Any, Callable[..., Any]]]:
        """The attention modules of decoder layers, and what stands in the place of the forward of each. Raises
        `UnsupportedError` where another library has replaced one."""
        modules = [getattr(layer, self.name) for layer in layers]
        for module in modules:
            if "forward" in vars(module):
                raise UnsupportedError(
                    f"another library has replaced the forward of {type(module).__name__}, which flexasl replaces too; "
                    "undo that before patching"
                )
        return [(module, functools.partial(_forward, self.attends, module)) for module in modules]


def own_attention(config: Any) -> OwnAttention | None:
    """Of a decoder's configuration; None where its attention goes through the interface, or is not known."""
    return OWN.get(getattr(config, "model_type", ""))


def _forward(attends: Callable[..., Any], module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    step = next((kwargs[name] for name in CACHES if isinstance(kwargs.get(name), LayerStep)), None)
    if step is None:
        raise UnsupportedError(
            f"{type(module).__name__} was called outside the patched model; call the model, or patch.remove() first"
        )
    made = attends(module, hidden_states, step, *args, **kwargs)
    return made if isinstance(made, tuple) else (made, None)


def _its(module: Any, name: str) -> Any:
    """What the Python module of a module's class has by this name."""
    return getattr(sys.modules[type(module).__module__], name)


def _merged(mixed: Tensor) -> Tensor:
    """[B, H, M, D] as [B, M, H D]."""
    return mixed.transpose(1, 2).flatten(2)


def _bloom(module: Any, hidden: Tensor, step: LayerStep, residual: Tensor, **kwargs: Any) -> Tensor:
    mixed = step.attention(*module._reshape(module.query_key_value(hidden)))
    out: Tensor = module.dense(_merged(mixed)) + residual
    return out


def _bloom_asks(module: Any) -> dict[str, Any]:
    heads = module.num_heads
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 / whole * (at + 1)) for at in range(whole)]
    slopes += [2.0 ** (-4 / whole * (at + 1)) for at in range(0, 2 * (heads - whole), 2)]
    return {"scale": module.inv_norm_factor, "alibi": tuple(slopes)}


def _mpt(module: Any, hidden: Tensor, step: LayerStep, **kwargs: Any) -> Tensor:
    states = module.Wqkv(hidden)
    if module.clip_qkv:
        states = states.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = (part.unflatten(2, (module.n_heads, -1)).transpose(1, 2) for part in states.chunk(3, 2))
    out: Tensor = module.out_proj(_merged(step.attention(*heads)))
    return out


def _mpt_asks(module: Any) -> dict[str, Any]:
    slopes = -_its(module, "build_mpt_alibi_tensor")(module.n_heads, 2)[:, 0, 0]  # of the key before the last
    return {"scale": module.softmax_scale, "alibi": tuple(slopes.tolist())}


def _falcon(
    module: Any,
    hidden: Tensor,
    step: LayerStep,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    groups = module.num_kv_heads
    fused = module.query_key_value(hidden)
    if module.new_decoder_architecture or not module.multi_query:  # each KV head behind its query heads
        states = fused.unflatten(2, (groups, module.num_heads // groups + 2, module.head_dim))
    else:
        states = fused.unflatten(2, (1, module.num_heads + 2, module.head_dim))
    query, key, value = states[..., :-2, :].flatten(2, 3), states[..., -2, :], states[..., -1, :]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    query, key = _its(module, "apply_rotary_pos_emb")(query, key, *position_embeddings)
    out: Tensor = module.dense(_merged(step.attention(query, key, value)))
    return out


def _diffllama(
    module: Any,
    hidden: Tensor,
    step: LayerStep,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    """Two maps of weights, of the first and of the second half of the query heads, over values of twice the width: a
    KV head's values are those of two, so that a cache may keep other tokens for each head."""
    states = (
        made(hidden).unflatten(2, (-1, module.head_dim)) for made in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key, value = (part.transpose(1, 2) for part in states)
    query, key = _its(module, "apply_rotary_pos_emb")(query, key, *position_embeddings)
    wide = torch.cat(value.chunk(2, 1), 3).repeat(1, 2, 1, 1)
    first, second = step.attention(query, key, wide).transpose(1, 2).chunk(2, 2)
    one, other = (
        torch.exp((getattr(module, f"lambda_q{at}") * getattr(module, f"lambda_k{at}")).sum(dtype=torch.float32))
        for at in (1, 2)
    )
    share = one.to(query.dtype) - other.to(query.dtype) + module.lambda_init
    mixed = (1 - module.lambda_init) * module.groupnorm(first - share * second)
    out: Tensor = module.o_proj(mixed.flatten(2))
    return out


class _Attending:
    """A module whose method `_attn` is another one."""

    def __init__(self, module: nn.Module, attend: Callable[..., Any]) -> None:
        self._module, self._attn = module, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _by_method(module: Any, hidden: Tensor, step: LayerStep, **kwargs: Any) -> tuple[Any, ...]:
    """Modules that attend in a method `_attn`, to keys and values that the cache gave them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> tuple[Tensor, None]:
        return step.attend(query.to(key.dtype), key, value), None

    made: tuple[Any, ...] = type(module).forward(_Attending(module, attend), hidden, **kwargs)
    return made


def _scaled(module: Any) -> dict[str, Any]:
    return {"scale": module.inv_norm_factor}


def _scaling(module: Any) -> dict[str, Any]:
    return {"scale": module.scaling}


def _divided(module: Any) -> dict[str, Any]:
    return {"scale": 1.0 / float(module.scale_attn)}


def _normed(module: Any) -> dict[str, Any]:
    return {"scale": 1.0 / float(module.norm_factor)}


OWN = {
    "bloom": OwnAttention("self_attention", _bloom, _bloom_asks),
    "diffllama": OwnAttention("self_attn", _diffllama, _scaling),
    "codegen": OwnAttention("attn", _by_method, _divided),
    "gpt_neox_japanese": OwnAttention("attention", _by_method, _normed),
    "falcon": OwnAttention("self_attention", _falcon, _scaled),
    "gptj": OwnAttention("attn", _by_method, _divided),
    "mpt": OwnAttention("attn", _mpt, _mpt_asks),
}
"""By model type."""
