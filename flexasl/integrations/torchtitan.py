"""Patches torchtitan's Llama 3 and Qwen 3 decoders: hooks on the decoder and its layers, and inner attention of ours.
The forward pass goes down in the place of torchtitan's attention masks. Brings a KV cache and `generate`, which
torchtitan has not.

Shapes: B batch, M new tokens, N positions of the sequence so far, T tokens of all prompts at the current layer, H query
heads, G KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional as F
from torchtitan.config import override
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.protocols.module import Module

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.checks import article
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.forward_pass import ForwardPass, positions_read
from flexasl.integrations.base import SLACK, BasePatch
from flexasl.integrations.inputs import padding, refuse_state, restart
from flexasl.policies import Policy


class Patch(BasePatch):
    """A patched torchtitan decoder."""

    KEYWORD = MASK = "attention_masks"
    ARGUMENTS = ("attention_masks", "positions")
    TABLES = ("positions",)

    def __init__(self, model: Decoder, config: ASLConfig, policy: Policy, *, kernel: Any, foreign_hooks: str) -> None:
        _refuse_model(model, kernel)
        layers = list(model.layers.values())
        attention = [FlexASLAttention(scale=layer.attention.scaling, kernel=kernel) for layer in layers]
        reduce = functools.partial(_sum_over_ranks, model)
        super().__init__(model, layers, attention, config, policy, reduce=reduce, foreign_hooks=foreign_hooks)
        self._before = [layer.attention.inner_attention for layer in layers]
        for layer, inner in zip(layers, self._before, strict=True):
            if not isinstance(inner, PrunedAttention):
                layer.attention.inner_attention = PrunedAttention(PrunedAttention.Config())
        self.hook(model)

    def restore(self) -> None:
        for layer, inner in zip(self._layers, self._before, strict=True):
            layer.attention.inner_attention = inner

    def _enter(
        self,
        decoder: Decoder,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.refuse_training()
        kwargs = dict(zip(("tokens", "positions", "attention_masks"), args, strict=False)) | kwargs
        tokens, positions, cache = kwargs["tokens"], kwargs.get("positions"), kwargs.get("attention_masks")
        _refuse_call(decoder, positions, cache)
        batch, count = tokens.shape
        caches = cache.layers if isinstance(cache, KVCache) else None
        past = positions_read(caches, batch) if caches else 0
        given = cache.validity(past + count) if isinstance(cache, KVCache) else cache
        valid = padding(given, batch, past + count, tokens.device, self.MASK)
        forward_pass = self.begin(caches, valid, batch, count, tokens.device)
        if positions is None:
            positions = forward_pass.positions
            if valid is not None:
                positions = (positions - (~valid).sum(1, keepdim=True)).clamp(min=0)
        return (tokens,), {"positions": positions, "attention_masks": forward_pass}

    def _leave(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        super()._leave(decoder, args, kwargs, output)
        forward_pass: ForwardPass = kwargs[self.KEYWORD]
        if forward_pass.blank == 0:
            forward_pass.blank_out(output.to_local() if isinstance(output, DTensor) else output)

    def _whole(self, hidden: Any) -> Tensor:
        made: Tensor = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
        return made

    def _spread(self, like: Any, hidden: Tensor) -> Any:
        if not isinstance(like, DTensor):
            return hidden
        whole = DTensor.from_local(hidden, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
        return whole.redistribute(placements=like.placements)


class KVCache:
    """What the layers remember of a batch of prompts. Give it to a patched model as `attention_masks`, pass after pass:
    `model(tokens, attention_masks=cache)`.

    padding [B, M] bool is False at the prompts' padding, which is on the left; None where there is none.
    """

    def __init__(self, model: Decoder, padding: Tensor | None = None) -> None:
        self.layers = [LayerCache(SLACK) for _ in model.layers]
        self._padding = padding

    @property
    def seen(self) -> int:
        """Tokens read by each row, kept or not, padding included."""
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def validity(self, positions: int) -> Tensor | None:
        """So many positions [B, N] bool, False at padding; None where there is none."""
        if self._padding is None:
            return None
        return F.pad(self._padding, (0, max(0, positions - self._padding.shape[1])), value=True)


class PrunedAttention(Module):
    """Inner attention: that of a patched model's forward pass, and without a patch causal attention."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = FlexASLAttention()

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """q_BLNH [B, M, H, D], k_BLNH and v_BLNH [B, M, G, D] → [B, M, H, D], each of this rank's heads."""
        query, key, value = (
            (states.to_local() if isinstance(states, DTensor) else states).transpose(1, 2)
            for states in (q_BLNH, k_BLNH, v_BLNH)
        )
        if isinstance(attention_masks, ForwardPass):
            step = attention_masks.step
            assert step is not None
            out = step.attention(query, key, value)
        elif attention_masks is None:
            if scale != self.attention.scale:
                self.attention = FlexASLAttention(scale=scale)
            out = self.attention(query, key, value)
        else:
            raise UnsupportedError(
                f"attention_masks is {article(attention_masks)}; without a patch this attention is causal and "
                "takes None"
            )
        out = out.transpose(1, 2)
        return DTensor.from_local(out, q_BLNH.device_mesh, q_BLNH.placements) if isinstance(q_BLNH, DTensor) else out


@override(target=GQAttention.Config, description="FlexASL: inner attention of decoders that prune prompts")
def inner_attention(config: GQAttention.Config) -> GQAttention.Config:
    """For `--override.imports flexasl.integrations.torchtitan.inner_attention`: builds decoders with the inner
    attention that a patch needs."""
    sharding = config.inner_attention.sharding_config
    return replace(config, inner_attention=PrunedAttention.Config(sharding_config=sharding))


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    pad_id: int | None = None,
    stop_ids: Collection[int] = (),
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Prompts [B, M] int64 and what a patched model says after them: [B, M + max_new_tokens], or less where all rows
    have stopped.

    pad_id: the token that fills prompts up on the left, and rows that have stopped; None where prompts have no padding
    and 0 is to fill. stop_ids: tokens after which a row stops. choose: next tokens [B] from logits [B, V], default the
    most probable; under tensor parallelism it must choose alike on all ranks. Under FSDP all ranks make as many passes,
    so give all the same max_new_tokens. Raises `FlexASLError` before work starts.
    """
    if not hasattr(model, "flexasl_patch"):
        raise UnsupportedError(f"{type(model).__name__} is not patched; call flexasl.patch(model) first")
    if prompts.dim() != 2 or max_new_tokens < 1:
        raise FlexASLError(
            f"prompts are {list(prompts.shape)}, max_new_tokens={max_new_tokens}; give [batch, tokens] and at least 1"
        )
    longest = model.config.max_seq_len
    if prompts.shape[1] + max_new_tokens - 1 > longest:
        raise FlexASLError(
            f"{prompts.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} exceed the {longest} positions of "
            f"{type(model).__name__}; give fewer"
        )
    cache = KVCache(model, None if pad_id is None else prompts != pad_id)
    stops = torch.tensor(sorted(stop_ids), dtype=prompts.dtype, device=prompts.device)
    running = torch.ones(len(prompts), 1, dtype=torch.bool, device=prompts.device)
    tokens, out = prompts, [prompts]
    for _ in range(max_new_tokens):
        logits = _whole(model, model(tokens, attention_masks=cache)[:, -1:])[:, -1]
        tokens = logits.argmax(-1, keepdim=True) if choose is None else choose(logits).view(-1, 1)
        tokens = tokens.where(running, 0 if pad_id is None else pad_id)
        out.append(tokens)
        running = running & ~torch.isin(tokens, stops)
        if stop_ids and not _anywhere(model, running.any()):
            break
    return torch.cat(out, 1)


def _refuse_model(model: Decoder, kernel: str) -> None:
    """Raises `UnsupportedError` for a decoder that cannot be patched, or not as it is spread over processes."""
    kind = type(model).__name__
    if not isinstance(model, (Llama3Model, Qwen3Model)):
        raise UnsupportedError(f"{kind} is not among torchtitan's decoders that can be patched: Llama 3 and Qwen 3")
    parts = [model.tok_embeddings, model.norm, model.lm_head]
    if any(part is None for part in parts) or len(model.layers) < len(model.config.layers):
        raise UnsupportedError(
            f"{kind} is a stage of a pipeline, and tokens are dropped for all layers in one process; "
            "give pipeline_parallel_degree=1"
        )
    refuse_state(model, kernel, next(model.parameters()).device)
    spread = any(module._parallelized for module in model.modules() if isinstance(module, Module))
    if spread and get_spmd_backend() == "full_dtensor":
        raise UnsupportedError(
            f"{kind} is spread with spmd_backend='full_dtensor'; give 'partial_dtensor' or 'spmd_types'"
        )
    meshes = {weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)}
    if any("cp" in (mesh.mesh_dim_names or ()) and mesh["cp"].size() > 1 for mesh in meshes):
        raise UnsupportedError(CONTEXT.format(kind=kind))
    for index, layer in model.layers.items():
        if not isinstance(layer.attention, GQAttention):
            raise UnsupportedError(
                f"layer {index} of {kind} has a {type(layer.attention).__name__}; a patched layer needs a GQAttention"
            )
        if "forward" in vars(layer.attention.inner_attention) and not spread:
            raise UnsupportedError(CONTEXT.format(kind=kind))
        if spread and get_spmd_backend() == "spmd_types" and _shards_tokens(layer):
            raise UnsupportedError(
                f"{kind} has sequence parallelism with spmd_backend='spmd_types', where tensors do not tell which "
                "tokens a rank has; give enable_sequence_parallel=False"
            )


CONTEXT = (
    "{kind} has context parallelism, which gives each rank a part of the tokens, and they are ranked together; "
    "give context_parallel_degree=1"
)


def _shards_tokens(layer: Any) -> bool:
    """Whether the ranks of tensor parallelism have a part of the layer's tokens each."""
    config = layer.attention_norm._sharding_config
    layout = None if config is None else (config.in_src_shardings or {}).get("input")
    return layout is not None and layout.partition_spec is not None


def _refuse_call(decoder: Decoder, positions: Tensor | None, masks: Any) -> None:
    """Raises `UnsupportedError` before the first layer where the arguments cannot be honoured."""
    if spmd_mesh_size("cp") > 1:
        raise UnsupportedError(CONTEXT.format(kind=type(decoder).__name__))
    if masks is not None and not isinstance(masks, KVCache) and not _is_bool(masks):
        raise UnsupportedError(
            f"attention_masks is {article(masks)}; a patched model makes its own, give a KVCache, padding as "
            "bool [batch, tokens], or None"
        )
    if masks is None and restart(positions):
        raise UnsupportedError("positions restart within a row; give packed documents as rows of a padded batch")


def _is_bool(masks: Any) -> bool:
    return isinstance(masks, Tensor) and masks.dtype == torch.bool


def _tensor_parallel(model: Decoder) -> DeviceMesh | None:
    """The ranks that have a part of the heads each; None where this one has all."""
    weight = model.layers["0"].attention.wo.weight
    mesh = weight.device_mesh if isinstance(weight, DTensor) else current_spmd_mesh()
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return mesh["tp"] if mesh is not None and "tp" in names and mesh["tp"].size() > 1 else None


def _sum_over_ranks(model: Decoder, scores: Tensor) -> Tensor:
    mesh = _tensor_parallel(model)
    if mesh is None:
        return scores
    scores = scores.contiguous()
    dist.all_reduce(scores, group=mesh.get_group())
    return scores


def _whole(model: Decoder, logits: Tensor) -> Tensor:
    """Logits [B, M, V], of which each rank of tensor parallelism has a part."""
    if isinstance(logits, DTensor):
        return logits.full_tensor()
    mesh = _tensor_parallel(model)
    if mesh is None:
        return logits
    logits = logits.contiguous()
    parts = [torch.empty_like(logits) for _ in range(mesh.size())]
    dist.all_gather(parts, logits, group=mesh.get_group())
    return torch.cat(parts, -1)


def _anywhere(model: Decoder, running: Tensor) -> bool:
    """Whether a row is running; under FSDP on any rank, because a pass gathers weights from all of them."""
    if isinstance(model, FSDPModule):
        count = running.long()
        dist.all_reduce(count)
        return bool(count)
    return bool(running)
