"""Patches torchtune's `TransformerDecoder`: hooks on it and its layers, the attention function of each layer, and KV
caches whose layers have lengths of their own. The forward pass goes down in the place of torchtune's mask.

Shapes: B batch, M new tokens, N positions of the sequence so far, T tokens of all prompts at the current layer, H query
heads, G KV heads, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import KVCache, MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.forward_pass import ForwardPass, positions_read
from flexasl.integrations.base import SLACK, BasePatch
from flexasl.integrations.inputs import padding, refuse_state
from flexasl.masks import Visibility
from flexasl.policies import Policy

TILE = 256
"""Queries whose mask is checked at once."""


class Patch(BasePatch):
    """A patched torchtune decoder."""

    KEYWORD = MASK = "mask"
    TABLES = ("input_pos",)

    def __init__(
        self, model: TransformerDecoder, config: ASLConfig, policy: Policy, *, kernel: Any, foreign_hooks: str
    ) -> None:
        _refuse_model(model, kernel)
        attention = [FlexASLAttention(kernel=kernel) for _ in model.layers]
        super().__init__(model, model.layers, attention, config, policy, foreign_hooks=foreign_hooks)
        self._before = model.decoder_max_cache_seq_len, [layer.attn._attention_call for layer in model.layers]
        for layer in model.layers:
            own = layer.attn
            own._attention_call = functools.partial(_attend, own)
            own.setup_cache = functools.partial(_setup_cache, own)
            if own.kv_cache is not None:
                own.kv_cache = PrunedKVCache.replacing(own.kv_cache)
        self.hook(model)

    def _leave(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        super()._leave(decoder, args, kwargs, output)
        forward_pass: ForwardPass = kwargs[self.KEYWORD]
        if forward_pass.blank == 0:
            first = 0
            for logits in output if isinstance(output, list) else [output]:
                forward_pass.blank_out(logits, slice(first, first + logits.shape[1]))
                first += logits.shape[1]

    def restore(self) -> None:
        self._model.decoder_max_cache_seq_len, functions = self._before
        for layer, function in zip(self._layers, functions, strict=True):
            own = layer.attn
            own._attention_call = function
            del own.setup_cache
            if isinstance(own.kv_cache, PrunedKVCache):
                before = own.kv_cache.replaced()
                del own.kv_cache  # where it is None it was no module
                own.kv_cache = before
                own.cache_enabled = own.cache_enabled and before is not None

    def _enter(
        self, decoder: TransformerDecoder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.refuse_training()
        tokens = args[0] if args else kwargs["tokens"]
        mask, positions = kwargs.get("mask"), kwargs.get("input_pos")
        caches = [layer.attn.kv_cache for layer in self._layers] if decoder.caches_are_enabled() else None
        if caches is not None and (mask is None or positions is None):
            return None  # which torchtune refuses
        batch, count = tokens.shape
        past = positions_read(caches, batch) if caches else 0
        _refuse_call(decoder, kwargs, tokens, caches)
        forward_pass = self.begin(caches, _validity(mask, batch, past, count), batch, count, tokens.device)
        positions = forward_pass.positions if positions is None else positions.reshape(-1, count)
        return (tokens,), {"mask": forward_pass, "input_pos": positions}


class PrunedKVCache(LayerCache, KVCache):
    """A layer's cache in the place of torchtune's. It takes memory for what it holds and room for `SLACK` more entries,
    not for all tokens that it was set up for."""

    def __init__(self, batch_size: int, max_seq_len: int, dtype: torch.dtype, stood_for: Any = None) -> None:
        nn.Module.__init__(self)
        LayerCache.__init__(self, SLACK)
        self.batch_size, self.max_seq_len, self.dtype = batch_size, max_seq_len, dtype
        self._stood_for = stood_for

    @classmethod
    def replacing(cls, cache: KVCache) -> PrunedKVCache:
        """An empty cache for as many tokens."""
        batch_size, heads, length, dim = cache.k_cache.shape
        device, dtype = cache.k_cache.device, cache.k_cache.dtype

        def make() -> KVCache:
            with device:
                return KVCache(batch_size, length, heads, dim, dtype)

        return cls(batch_size, length, dtype, make)

    def replaced(self) -> KVCache | None:
        """torchtune's own, empty, that this one stands for; None where there was none."""
        return None if self._stood_for is None else self._stood_for()

    @property
    def k_cache(self) -> Tensor | None:
        """[B, G, N, D]: what is held, of N entries."""
        return self.keys

    @property
    def v_cache(self) -> Tensor | None:
        return self.values

    @property
    def size(self) -> int:
        """Tokens read, kept or not."""
        return self.seen

    def reset(self) -> None:
        self.clear()

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves it to the layer's `LayerStep`, in attention, which knows the tokens that are left."""
        return k_val, v_val


def _setup_cache(attn: MultiHeadAttention, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
    """In the place of `MultiHeadAttention.setup_cache`."""
    if attn.kv_cache is not None:
        MultiHeadAttention.setup_cache(attn, batch_size, dtype, max_seq_len)  # says so in its log, and changes nothing
        return
    attn.kv_cache = PrunedKVCache(batch_size, max_seq_len, dtype)
    attn.cache_enabled = True


def _attend(
    attn: MultiHeadAttention, query: Tensor, key: Tensor, value: Tensor, *, mask: Any, dropout_p: float, is_causal: bool
) -> Tensor:
    """In the place of torchtune's attention function: query, key, value [B, H, M, D] → [B, H, M, D]."""
    if not isinstance(mask, ForwardPass) or mask.step is None:
        raise UnsupportedError(
            f"{type(attn).__name__} was called outside the patched model; call the model, or patch.remove() first"
        )
    repeats = attn.num_heads // attn.num_kv_heads
    return mask.step.attention(query, key[:, ::repeats], value[:, ::repeats])


def _refuse_model(model: TransformerDecoder, kernel: str) -> None:
    """Raises `UnsupportedError` for a decoder that cannot be patched."""
    refuse_state(model, kernel, model.tok_embeddings.weight.device)
    kind = type(model).__name__
    for index, layer in enumerate(model.layers):
        if type(layer) is not TransformerSelfAttentionLayer or type(layer.attn) is not MultiHeadAttention:
            part = layer if type(layer) is not TransformerSelfAttentionLayer else layer.attn
            raise UnsupportedError(
                f"layer {index} of {kind} has a {type(part).__name__}; a patched layer is a "
                "TransformerSelfAttentionLayer with MultiHeadAttention, as in llama3, llama3_2 and qwen2"
            )
        if not layer.attn.is_causal:
            raise UnsupportedError(f"layer {index} of {kind} has is_causal=False; a patched layer reads left to right")
        if layer.attn.kv_cache is not None and layer.attn.kv_cache.size > 0:
            raise UnsupportedError(
                f"KV caches of {kind} hold {layer.attn.kv_cache.size} tokens that were read by the unpatched model; "
                "call model.reset_caches() first"
            )


def _refuse_call(decoder: Any, kwargs: dict[str, Any], tokens: Tensor, caches: list[Any] | None) -> None:
    """Raises before the first layer where the caches or arguments cannot be honoured."""
    if kwargs.get("encoder_input") is not None:
        raise UnsupportedError("encoder_input is not available on a patched model, which has no cross-attention")
    if decoder.output_hidden_states:
        raise UnsupportedError(
            f"output_hidden_states={decoder.output_hidden_states} is not available on a patched model: layers after "
            "the selection see fewer tokens than those before; set it to []"
        )
    if caches is None:
        return
    first, (batch, count) = caches[0], tokens.shape
    if batch > first.batch_size:
        raise FlexASLError(f"tokens has {batch} rows where KV caches are for {first.batch_size}; set them up anew")
    if first.seen + count > first.max_seq_len:
        raise FlexASLError(
            f"the sequence has {first.seen + count} tokens where KV caches were set up for {first.max_seq_len}; "
            "give setup_caches a larger decoder_max_seq_len, or call model.reset_caches() before a new prompt"
        )
    if first.dtype != decoder.tok_embeddings.weight.dtype:
        raise FlexASLError(
            f"KV caches were set up in {first.dtype} for a model in {decoder.tok_embeddings.weight.dtype}; "
            "give setup_caches the model's dtype"
        )


def _validity(mask: Any, batch: int, past: int, count: int) -> Tensor | None:
    """The positions so far [B, N] bool that are no padding, None where all are: what torchtune's mask [B or 1, M, N or
    more] says besides causal order. Raises `UnsupportedError` where it says anything else."""
    if mask is None:
        return None
    positions = past + count
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[2] < positions:
        given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedError(
            f"mask is {given}; a patched model takes bool [batch, new tokens, tokens so far or more], "
            f"here {[batch, count, positions]}"
        )
    valid = mask[:, -1, :positions]
    at = torch.arange(positions, dtype=torch.int64, device=mask.device)[None]
    visible = Visibility(at[:, past:], at, valid)
    tiles = [slice(first, first + TILE) for first in range(0, count, TILE)]
    causal = all(torch.equal(mask[:, some, :positions], visible.tile(some, slice(None))[:, 0]) for some in tiles)
    if not causal or bool(mask[:, :, positions:].any()):
        raise UnsupportedError(
            f"mask is not causal over {past} cached and {count} new tokens; give that of torchtune.generation, and "
            "call model.reset_caches() before a new prompt"
        )
    return padding(valid.expand(batch, -1), batch, positions, mask.device, "mask")
