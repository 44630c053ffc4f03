"""Which models work, found out by trying a tiny one of each kind; `docs/models.md` is the result.

`FLEXASL_WRITE_DOCS=1 pytest tests/test_models.py` writes the page anew.
"""

import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from answers import STAGES, check_rows_alone, close, say
from hybrids import HYBRIDS
from models import FAMILIES, GREEDY, LAYERS, MOE, SHAPE, SLIDING, SMALL, left_padded, prompts, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import flexasl
from flexasl import UnsupportedError
from flexasl.integrations.transformers import media
from flexasl.integrations.transformers import models as supported

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
GPT = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}

LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

TRIED: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "axk1": LATENT | ROUTED,
    "beam": {"head_dim": 16, "n_group": 2, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"] * 3, **SLIDING},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {},
    "deepseek_v2": LATENT | ROUTED,
    "diffllama": {},
    "doge": {},
    "dots1": ROUTED,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": SLIDING,
    "falcon": {"alibi": False},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT | ROUTED,
    "gpt_bigcode": GPT,
    "gpt_neox_japanese": {},
    "gptj": {**GPT, "rotary_dim": 8},
    "granitemoe": {},
    "llama4_text": {"no_rope_layers": [1, 0, 0, 0, 1, 1], "intermediate_size_mlp": 96},
    "mamba": {},
    "minicpm3": LATENT,
    "minimax": {},
    "ministral3": {},
    "modernbert-decoder": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": LAYERS},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmoe": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phimoe": {},
    "qwen2_moe": {},
    "recurrent_gemma": {},
    "seed_oss": {},
    "stablelm": {},
    "starcoder2": {},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "vaultgemma": SLIDING,
    "youtu": LATENT,
}
"""Model types that no other test covers, with what their configuration needs to be tiny."""


INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"] * (LAYERS // 2),
    "sliding_window_size": 48,
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "rel_extent": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "unpadded_vocab_size": SHAPE["vocab_size"],
}


def model_of(kind):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(SHAPE | MOE | TRIED[kind]))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval().requires_grad_(False)


def outcome(kind):
    """None where the model works patched, else the sentence with which it is refused."""
    model, batch = model_of(kind), left_padded(prompts(70, 41))
    try:
        patch = flexasl.patch(model, SMALL.replace(select_tokens=1.0))
    except UnsupportedError as error:
        return str(error)
    real = batch["attention_mask"].bool()
    with patch:
        whole = model(**batch).logits[real]
        answer = model.generate(**batch, max_new_tokens=6, **GREEDY).sequences
    torch.testing.assert_close(whole, model(**batch).logits[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, **GREEDY).sequences, answer)
    with flexasl.patch(model, SMALL.replace(kv_budget=16)) as patch:
        together = model.generate(**batch, max_new_tokens=6, **GREEDY).sequences[:, 70:]
        rows = patch.report.rows
        for index, row in enumerate(prompts(70, 41)):
            assert torch.equal(model.generate(row[None], max_new_tokens=6, **GREEDY).sequences[0, -6:], together[index])
            assert patch.report.rows[0].kept_positions == rows[index].kept_positions and rows[index].kept_tokens == 24
    return None


found: dict[str, str | None] = {}


@pytest.mark.parametrize("kind", TRIED)
def test_a_model_by_structure_works_or_is_refused_with_the_reason(kind):
    found[kind] = outcome(kind)
    if found[kind] is not None:
        assert found[kind].count("\n") == 0
        model = model_of(kind)
        with pytest.raises(UnsupportedError):
            flexasl.patch(model)
        assert not hasattr(model, "flexasl_patch") and model.config._attn_implementation != "flexasl"


def test_the_families_in_the_other_tests_are_those_called_supported():
    assert {tiny(family).config.model_type for family in FAMILIES} == set(supported.SUPPORTED)


TEXT = """# Models

Made by `FLEXASL_WRITE_DOCS=1 pytest tests/test_models.py`, which patches a tiny random model of every kind.

## Tested

Keep-all identity, pruned decode against a recomputation without pruning, batches against their rows, later turns and
generation, in the test matrix:

| model type | what is special |
| --- | --- |
{tested}

## Works by structure

Any other model is tested when it is patched. The attention settings of its layers are read, and a self-test on 48
tokens compares keep-all with the unpatched model, in a padded batch and for the next token, and dropping tokens with
masking them out. A model that fails is refused, and the error gives the reason. These models pass, and generate in a
batch what they generate row by row:

{works}.

## Layers with states

Hybrids mix full attention with layers that keep states (convolutions, state spaces, linear attention), or have both in
one layer. Tokens are ranked and dropped only at layers with full attention. Deeper layers with states read the kept
tokens, in order, at their true positions, in prompts and in decode. For these layers dropping a token is not the same
as masking it, because a state is made of the tokens that were read. So `propagate="mask"` is refused, and the tests
compare with a run of the deeper layers on the kept tokens alone. The self-test at patching does the same, on every
second token.

In half precision the self-test of such a model finds only gross errors, in all of four pairs of prompts, because
rounding errors add up from token to token and choose other experts.

- In a batch such layers run row by row, so that each row gets what it gets alone. Kernels that separate the rows of one
  sequence do not help: transformers passes `cu_seqlens` only to the delta rule of Qwen 3-Next, Qwen 3.5 and OLMo
  hybrid, for flash-linear-attention's kernel, and its PyTorch code refuses any; its cache takes the last tokens of the
  sequence, which are those of the last row, as a convolution's state.
- `compile=True` is refused, and so is a padded later turn of several rows.
- `kv_budget` trims only layers with keys. `Report.state_bytes` counts the states, whose size does not depend on
  pruning. Saved prompts hold them.
- `crop` is refused, before anything is lost, where states cannot be undone. Recurrent states never can. Those of
  convolutions can, from `cache.activate_past_recording()` on.
- Where several tokens follow a cache, Jamba and Zamba begin with new states, patched or not.

These pass keep-all identity through 100 tokens, the recomputation, with and without `kv_budget` and stages, batches,
later turns, beams, saved and copied caches, in every length around kernels and chunks that was tried, as tiny random
models:

{hybrids}.

Others work by structure if the self-test passes. No real weights were available, so the effect of pruning on their
answers is not measured; `flexasl eval --model FOLDER_OR_ID --tasks niah_multikey_1,niah_multivalue,by_meaning --samples
8` measures it on yours.

## Layers that share keys and values

In Gemma 3n and the small sizes of Gemma 4 the last layers have no keys and values of their own: each uses those of the
last earlier layer of its type. Tokens are ranked and dropped before the first layer that others use, so that all of
them run on the same tokens: in a model of 35 layers, of which the last 20 share, at layers 4 and 9. A later layer is
refused as a selection layer by name. Caches, saved prompts and reports hold nothing of layers that share.

These pass keep-all identity, pruned decode against a masked recomputation, with and without `kv_budget` and stages,
gathering against masking, batches, later turns, beams, saved, copied and cropped caches: `gemma3n_text`, `gemma4_text`
(with and without embeddings by layer, with experts, and its large sizes, which share nothing).

Unpatched, Gemma 4 runs the layers that share on the last token of a prompt alone, because nothing reads their output
for other tokens. Patched, they run on the kept tokens. Counted costs compare with all tokens in all layers. Compared
with what the unpatched model does, a model of 35 layers, of which 20 share, runs .60 of the layers times tokens, if
half of the tokens are kept after layer 4 and a sixteenth after layer 9. `compile=True` is refused.

Tokens are not dropped after a layer whose keys and values others use (a lender), because nothing is gained there. After
the last lender all layers share: they have no entries, and only their output for the last token is read. After the
first of two lenders there are few layers with entries of their own: the length of a pattern of sliding and full layers,
less one. Its own new tokens attend to the dropped tokens, so the lender would still hold them, and the layers that
share its entries would read them under a mask.

## ALiBi

BLOOM and MPT have no rotary positions, but a bias by distance: a slope for each head, times the distance of a key.
FlexASL computes it from true positions, as one more number of each key and each query, so that scores, masks, caches
and all kernels include it: `FlexASLAttention(alibi=)`. It is exact in half precision. Unpatched, BLOOM rounds logits
with the bias to half precision, to the next 4 at position 900: a tiny random model in bfloat16 is .12 to .15 from its
float32 results there, and .01 when patched. Falcon models with ALiBi are refused; those with rotary positions work.

BLOOM, CodeGen, Falcon, GPT-J, GPT-NeoX Japanese and MPT attend without transformers' interface, and are patched at
their attention modules; `compile=True` is refused. So is DiffLlama, whose layers use their weights on two kinds of
values: the cache then holds both beside each key, which takes 1.5 times the memory of an unpatched cache of as many
entries.

## Keys chosen by an indexer

In DeepSeek V3.2 and models like it (`glm_moe_dsa`, `axk2`, `hy_v4`) each query attends to no more than `index_topk`
keys, chosen by scores of keys of another kind. Tokens can be dropped: the indexer then chooses among the kept tokens,
as it does when the others are masked out, and as in a run on the kept tokens alone. Keys of the indexer are cached
beside the values of their tokens, and dropped with them. Prompts run row by row, with a mask of all pairs, as in the
models' own PyTorch code; `compile=True` is refused.

Tokens are ranked by attention to all of them, because attention to the chosen ones alone says nothing about the others.
Where layers use the choice of an earlier one (`indexer_types`), tokens are dropped before a layer that chooses anew,
and `kv_budget`, `kv_top_p` and policies that trim caches or read twice are refused, because choices name cache entries.
Choices are made in float32 in any dtype of the model. In a batch sums have another order, so near ties may be broken
differently; from there on tokens differ. `kv_dtype` is refused: keys of the
indexer in eight bits choose other keys, and logits of a tiny model moved by 3.3 after one token.

These pass keep-all identity through 100 tokens, the recomputation on the kept tokens, gathering against masking,
batches, later turns, beams, saved, copied and cropped caches: `deepseek_v32`, `glm_moe_dsa` (all its layers choosing,
and some sharing), `hy_v4`; and `axk2` but for the recomputation, as its unpatched logits differ by .3 between tokens
read at once and one by one.

## Attention in chunks

In most layers of Llama 4 a token attends only to its own chunk of positions, counted from the row's first token. The
mask goes by true positions, as for sliding windows, also where tokens were dropped. These layers neither rank tokens
nor select. Text alone; images and `compile=True` are refused. Its layers without rotary positions scale queries by
their place in the padded batch, patched or not: in a batch with more than 8,191 tokens, padding included, rows differ a
little from rows alone.

## Refused

| model type | why |
| --- | --- |
{refused}

## Models that read images

In a model that reads images, the text decoder is patched; the vision tower keeps its attention. These models take
images, alone and in batches, several in a prompt, in a first and in a later turn:

{images}.

Their image features take the places of placeholder tokens, and are ranked, kept and dropped like text. The report says
how many of each image were kept (`RowReport.images`; a part of an image with text around it counts separately). Kept
tokens keep Qwen-VL's positions of three parts. Qwen3-VL adds features to the outputs of its first layers, by places in
the prompt, so no token may be dropped at these layers: such settings are refused, and the defaults drop none there in
models of 24 layers and more.

In Gemma 3, the large sizes of Gemma 4 (in layers with a sliding window) and PaliGemma (the whole prompt), tokens of an
image attend to each other in both directions. They also do so in a patched model, in a first and in a later turn.
PaliGemma attends in this way in a first turn only, patched or not, so its later turns with images are refused. An image
with `compile=True` is refused.

All others can be patched for text alone if the self-test passes, and refuse the first image, video or sound before it
is read. No real weights were available, so the effect of pruning on answers about images is not measured.

## Layers with a sliding window

A sliding window counts positions of the prompt, also where tokens between them were dropped. In a model with layers of
both kinds, only layers with full attention rank tokens and can select: `observe_layers` counts them, and `min_layer`
and `max_layer` move to the nearest of them. If all layers have a window, all of them rank, each the tokens in its
window.

Caches of sliding layers keep no more than their window of a prompt. While an answer grows they keep some entries
more, 64 or half the window, whichever is less, so that the last tokens can be cropped; with `compile=True` up to twice
as many. To crop further, as drafts do, call `cache.activate_past_recording()` before the tokens are read, as without a
patch: then nothing is dropped that a crop of all tokens since the last crop would need. transformers does this for an
assistant model.
"""


@pytest.mark.parametrize("kind", ["inkling_text", "inkling2_text"])
def test_models_that_look_through_their_cache_are_refused_whether_or_not_they_are_known(kind, monkeypatch):
    """A layer that asks for the sizes of masks looks for the first layer with keys."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | MOE | INKLING))).eval()
    with pytest.raises(UnsupportedError, match="bias by distance"):
        flexasl.patch(model)
    monkeypatch.delitem(supported.REFUSED, kind)
    with pytest.raises(UnsupportedError, match="self-test failed"):
        flexasl.patch(model)


def test_scales_of_queries_are_those_of_the_tokens_that_are_left(monkeypatch):
    """Beam's layers without rotary positions scale queries by position; here far more than its own few per cent."""
    module = sys.modules[type(model_of("beam")).__module__]
    steep = lambda positions: torch.log2(2.0 + positions.float())[:, None, :, None]  # noqa: E731
    monkeypatch.setattr(module, "compute_attention_scaling", steep)
    model, batch = model_of("beam"), left_padded(prompts(70, 12, 43))
    said = []
    assert check_rows_alone(model, STAGES, "asl")[0] == 24
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, STAGES.replace(propagate=propagate)):
            said.append(say(model, 12, **batch)[:2])
    assert torch.equal(said[0][0], said[1][0])
    close(said[0][1], said[1][1])


LEAD = r"^model type '\w+' (\(\w+\) )?(cannot be patched: |is )|; (it cannot be patched|tested models are .*)$"
"""What every refusal says."""


def page():
    refused = {kind: re.sub(LEAD, "", found[kind]) for kind in TRIED if found[kind] is not None}
    refused |= {kind: why for kind, why in supported.REFUSED.items() if kind not in TRIED}
    return TEXT.format(
        tested="\n".join(f"| {kind} | {', '.join(features(kind))} |" for kind in supported.SUPPORTED),
        images=textwrap.fill(", ".join(media.TESTED), 118),
        hybrids=textwrap.fill(", ".join(sorted(HYBRIDS)), 118),
        works=textwrap.fill(", ".join(kind for kind in TRIED if found[kind] is None), 118, break_on_hyphens=False),
        refused="\n".join(f"| {kind} | {why.replace('|', '/')} |" for kind, why in sorted(refused.items())),
    )


def features(kind):
    family = next(name for name in FAMILIES if tiny(name).config.model_type == kind)
    config, special = tiny(family).config, []
    kinds = getattr(config, "layer_types", None) or []
    if {"sliding_attention", "full_attention"} <= set(kinds):
        special.append("sliding and full layers")
    elif kind in ("mistral", "mixtral", "phi3"):
        special.append("sliding window, where configured")
    if getattr(config, "attn_logit_softcapping", None):
        special.append("soft-capped logits")
    if kind == "gpt_oss":
        special.append("attention sinks")
    if kind == "deepseek_v3":
        special.append("latent attention: the latent states are cached")
    if kind in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"):
        special.append("mixture of experts")
    if kind == "gpt2":
        special.append("learned positions")
    return special


def test_the_page_of_models_says_what_was_found():
    if set(found) != set(TRIED):
        pytest.skip("needs the other tests of this file")
    if os.environ.get("FLEXASL_WRITE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "write it anew: FLEXASL_WRITE_DOCS=1 pytest tests/test_models.py"
