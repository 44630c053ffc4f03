"""Tiny random models of every supported family, and an oracle that recomputes a pruned run without pruning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch
from placing import shared
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import flexasl
from flexasl.cache import LayerCache
from flexasl.prefill import Prefill

VOCAB, LAYERS, HEADS, GROUPS = 199, 6, 4, 2

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SLIDING = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral_sliding": {"model_type": "mistral", "sliding_window": 48},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, **SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "olmo3": SLIDING,
    "cohere2": SLIDING,
    "mixtral": MOE,
    "qwen3_moe": {"head_dim": 16, **MOE},
    "deepseek_v3": {
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "num_key_value_heads": HEADS,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"head_dim": 16, **MOE, **SLIDING},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 1024},
}

SMALL = flexasl.ASLConfig(
    select_tokens=24, window=8, kernel_size=3, observe_layers=2, min_layer=1, max_layer=3, tau=0.9
)
"""Settings that prune short prompts of the tiny models, by the rule of rank variance."""
STAGED = flexasl.ASLConfig(
    select_tokens=24,
    window=8,
    kernel_size=3,
    pooling="maxpool",
    stages=flexasl.Stage(tokens=0.5, tau=0.25, min_layer=1, max_layer=2),
    min_layer=2,
    min_layer_unasked=2,
    max_layer=4,
    tau=0.2,
)
"""Likewise, by the rule of look-ups, in two stages, with a pool that leaves such short prompts far tokens."""
RULES = {"variance": SMALL, "lookup": STAGED}


def counting(policy: str | flexasl.policies.Policy, config: flexasl.ASLConfig = SMALL) -> flexasl.ASLConfig:
    """Those of the settings that count under the policy; the others at their defaults."""
    takes = flexasl.policies.find_policy(policy).takes
    own = {name: value for name, value in config.to_dict().items() if name in takes}
    if "window" not in takes:  # the default's, which every budget exceeds
        own |= {name: max(own[name], 33) for name in ("select_tokens", "kv_budget") if isinstance(own.get(name), int)}
    return flexasl.ASLConfig(**own)


@shared
def tiny(
    family: str = "llama", dtype: torch.dtype = torch.float32, sliding_window: int | None = None
) -> PreTrainedModel:
    """The family's tiny model in eval mode; shared, so leave it as it was. sliding_window: another one than the
    family's, where it has one."""
    extra = dict(FAMILIES[family])
    if sliding_window is not None:
        if extra.get("sliding_window") is None:
            return tiny(family, dtype)
        extra["sliding_window"] = sliding_window
    torch.manual_seed(3)
    config = AutoConfig.for_model(extra.pop("model_type", family), **(SHAPE | extra))
    # The grouped products of experts that transformers takes by default know no float64.
    settings = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    if "attn_logit_softcapping" in extra:
        # The default of transformers 5.17, SDPA, forgets the soft-cap.
        settings["attn_implementation"] = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **settings).eval().requires_grad_(False)


def prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, one [length] tensor each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a batch."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


def recompute(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int,
    columns: list[torch.Tensor],
    selected_layer: int | None,
    kept: torch.Tensor,
    before: Sequence[tuple[int, torch.Tensor]] = (),
) -> torch.Tensor:
    """Logits [1, N, V] of one unpatched forward over all N tokens of one row, each layer's pruning as a mask.

    columns: per layer the cached columns [1, N_l] or [1, G, N_l] after generation; kept: the prompt positions that
    go on below `selected_layer`; before: layer and positions of the selections before that one. Queries of the prompt
    see the prompt; those after it see what the layer's cache holds.
    """
    windows = [sliding_window(model, layer) for layer in range(len(columns))]
    selections = [*before, *([] if selected_layer is None else [(selected_layer, kept)])]
    with _layer_masks(model, pruned_masks(ids.shape[1], prompt, columns, selections, windows)):
        return model(ids, use_cache=False).logits


def pruned_masks(
    total: int,
    prompt: int,
    columns: list[torch.Tensor],
    selections: Sequence[tuple[int, torch.Tensor]],
    windows: list[int | None],
    heads: int = HEADS,
) -> list[torch.Tensor]:
    """Per layer [1, H, N, N]: 0 where a pruned run lets a query see a key, else -inf; selections: layers and the
    positions that go on from there; else as `recompute`'s arguments."""
    at = torch.arange(total)
    causal = at[None] <= at[:, None]
    seen, masks, going = torch.ones(total, dtype=torch.bool), [], {layer + 1: kept for layer, kept in selections}
    for layer, (held, window) in enumerate(zip(columns, windows, strict=True)):
        if layer in going:
            seen = at >= prompt
            seen[going[layer]] = True
        held = held.expand(1, held.shape[-1])[None] if held.dim() == 2 else held
        stored = torch.zeros(held.shape[1], total, dtype=torch.bool)
        stored.scatter_(1, held[0], True)
        near = causal if window is None else causal & (at[None] > at[:, None] - window)
        allowed = (near & seen[None])[None].repeat(held.shape[1], 1, 1)
        allowed[:, prompt:] &= stored[:, None]
        allowed |= torch.eye(total, dtype=torch.bool)
        allowed = allowed.repeat_interleave(heads // held.shape[1], 0)[None]
        masks.append(torch.where(allowed, 0.0, float("-inf")))
    return masks


@contextmanager
def prefills():
    """The prefills that end here."""
    read, close = [], Prefill.close
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Prefill, "close", lambda self: (close(self), read.append(self))[0])
        yield read


def selected(prefill: Prefill, row: int) -> list[tuple[int, torch.Tensor]]:
    """Layer and prompt positions [K] of each selection from the row."""
    whole = left = torch.arange(prefill.lengths[row])
    made = []
    for one in prefill.selections.get(row, []):
        among = whole if prefill.config.propagate == "mask" else left
        left = among[one.keep[-len(among) :]]
        made.append((one.layer, left))
    return made


def held_columns(cache: LayerCache) -> torch.Tensor:
    """Columns that a layer's cache of one row holds, as `recompute` takes them."""
    assert cache.positions is not None
    return (
        cache.positions
        if cache.valid is None
        else cache.positions.masked_fill(~cache.valid, int(cache.positions.max()))
    )


def sliding_window(model: PreTrainedModel, layer: int) -> int | None:
    """Positions that a layer's queries look back, or None for all."""
    window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else getattr(model.config, "use_sliding_window", True)
    return window if slides else None


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@contextmanager
def _layer_masks(model: PreTrainedModel, masks: list[torch.Tensor]):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")

    def with_mask(mask):
        def hook(layer, args, kwargs):
            # GPT-2 gives its layers cache and mask by position.
            return args[:1] if model.config.model_type == "gpt2" else args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        layer.register_forward_pre_hook(with_mask(mask), with_kwargs=True)
        for layer, mask in zip(decoder_layers(model), masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
