"""Tiny random models some of whose layers keep states, and an oracle: deeper layers run on the kept tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from models import LAYERS, MOE, SHAPE, pruned_masks
from placing import shared
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "head_dim": 16,
}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"] * (LAYERS // 3)}
CONV = {"layer_types": ["conv", "full_attention", "conv"] * (LAYERS // 3), "conv_L_cache": 3}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
SHARED_EXPERT = {"shared_expert_intermediate_size": 48}
HYBRIDS: dict[str, dict] = {
    "bailing_hybrid": LINEAR | MOE | LATENT | {"head_dim": 16, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "bamba": MAMBA2 | {"attn_layer_indices": [1, 4]},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 128},
    "granitemoehybrid": MAMBA2
    | MOE
    | {"layer_types": ["mamba", "attention", "mamba"] * (LAYERS // 3), "shared_intermediate_size": 48},
    "jamba": MAMBA
    | MOE
    | {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": LINEAR
    | MOE
    | LATENT
    | {
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 4,
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
    },
    "lfm2": CONV | {"block_ff_dim": 96},
    "lfm2_moe": CONV | MOE | {"num_dense_layers": 1},
    "lfm3": {
        "layer_types": ["conv", "full_attention", "conv", "conv", "sliding_attention", "conv"],
        "conv_L_cache": 3,
        "sliding_window": 24,
    },
    "nemotron_h": MOE
    | {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 16,
        "head_dim": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
    },
    "olmo_hybrid": LINEAR | {**DELTA, "linear_num_key_heads": 4, "head_dim": None},
    "qwen3_5_moe_text": LINEAR | DELTA | MOE | SHARED_EXPERT,
    "qwen3_5_text": LINEAR | DELTA,
    "qwen3_next": LINEAR | DELTA | MOE | SHARED_EXPERT,
    "zamba": MAMBA
    | {
        "layers_block_type": ["mamba", "hybrid", "mamba"] * (LAYERS // 3),
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "layers_block_type": ["mamba", "hybrid", "mamba"] * (LAYERS // 3),
    },
}
OWN_ARGUMENTS = ("zamba", "zamba2")
"""Families whose layers take masks by other names than `attention_mask`."""
NEW_STATES = ("jamba", "zamba")
"""Families that begin with new states where several tokens follow a cache, patched or not."""
INEXACT = {"nemotron_h": 2e-3, "zamba2": 2e-2}
"""What may lie between the logits of unpatched models that read the same tokens at once and one by one, where that is
more than 2e-4."""


@shared
def hybrid(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The family's tiny model in eval mode; shared, so leave it as it was."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(SHAPE | {k: v for k, v in HYBRIDS[family].items() if v is not None}))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def recompute_on_kept(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int,
    selections: Sequence[tuple[int, torch.Tensor]],
    columns: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Logits [1, K, V] of one unpatched forward over all N tokens [1, N] of one row, in which the layers behind each
    selection run on the kept prompt positions, and on what comes after the prompt, alone.

    columns: by layer the cached positions [1, N_l] or [1, G, N_l], which new tokens see; None for all.
    """
    total, layers = ids.shape[1], model.get_decoder().layers
    new, left, going = torch.arange(prompt, total), torch.arange(total), dict(selections)
    masks = None
    if columns is not None:
        held = [torch.arange(total)[None] if own is None else own for own in columns]
        config = model.get_decoder().config
        kinds = getattr(config, "layer_types", None) or [""] * len(layers)
        masks = pruned_masks(
            total, prompt, held, [], [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        )
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            fresh = None
            if index - 1 in going:
                fresh = torch.cat([going[index - 1], new])
            stack.callback(
                layer.register_forward_pre_hook(_gathering(left, fresh, masks, index), with_kwargs=True).remove
            )
            left = left if fresh is None else fresh
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def _gathering(before: torch.Tensor, fresh: torch.Tensor | None, masks, index: int):
    """A hook that lets a layer run on the tokens that are left: hidden states come for those `before`, all else for
    all."""
    left = before if fresh is None else fresh

    def gather(value, total, hidden=False):
        if isinstance(value, tuple):
            return tuple(gather(one, total) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        if hidden:
            return value if fresh is None else value[:, torch.searchsorted(before, fresh)]
        if value.dim() == 4:
            return value[:, :, left][..., left]
        return value[:, left] if value.dim() > 1 and value.shape[1] == total else value

    def hook(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        total = max(int(before[-1]) + 1, hidden.shape[1])
        own = {name: gather(value, total, name == "hidden_states") for name, value in kwargs.items()}
        if masks is not None and own.get("attention_mask") is not None:
            mask, given = masks[index][:, :, left][..., left], own["attention_mask"]
            own["attention_mask"] = mask == 0 if given.dtype == torch.bool else mask.to(given.dtype)
        return tuple(gather(value, total, place == 0) for place, value in enumerate(args)), own

    return hook
