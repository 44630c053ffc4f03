"""Which models work, found out by trying a tiny one of each kind; `docs/models.md` is the result.

`FLEXASL_WRITE_DOCS=1 pytest tests/test_models.py` writes the page anew.
"""

import os
import re
import textwrap
from pathlib import Path

import pytest
import torch
from hybrids import HYBRIDS
from models import FAMILIES, GREEDY, LAYERS, MOE, SHAPE, SLIDING, SMALL, left_padded, prompts, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import flexasl
from flexasl import UnsupportedError
from flexasl.integrations.transformers import media
from flexasl.integrations.transformers import models as supported

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
GPT = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}

TRIED: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": SLIDING,
    "falcon": {"alibi": False},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_bigcode": GPT,
    "gpt_neox_japanese": {},
    "gptj": {**GPT, "rotary_dim": 8},
    "granitemoe": {},
    "llama4_text": {"no_rope_layers": [1, 0, 0, 0, 1, 1], "intermediate_size_mlp": 96},
    "mamba": {},
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
}
"""Model types that no other test covers, with what their configuration needs to be tiny."""


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

Any other model is tried when it is patched: its layers are asked what attention they want, and a self-test on 48 tokens
compares keep-all with the unpatched model, in a padded batch and for the next token, and dropping tokens with masking
them out. A model that fails is refused with the reason. These pass, and generate in a batch what they generate row by
row:

{works}.

## Layers with states

Hybrids, which mix full attention with layers that keep states (convolutions, state spaces, linear attention), or have
both in one layer. Tokens are ranked and cut at layers with full attention alone. Layers with states that come after a
cut read the tokens that are left, in order, at their true positions, in prompts and in decode. For them dropping a
token is not the same as masking it: a state is made of what was read, as if the prompt had been those tokens. So
`propagate="mask"` is refused, and the tests compare with a run of the deeper layers on the kept tokens alone. The
self-test at patching does so too, on every second token.

In half precision the self-test of such a model sees only what is grossly wrong with all of four pairs of prompts:
rounding goes on from token to token, and chooses other experts.

In a batch such layers run row by row, so that each row is as alone; `compile=True` is refused, and so is a padded
later turn of several rows. Kernels that keep rows of one sequence apart would not do. transformers hands `cu_seqlens`
to the delta rule of Qwen 3-Next, Qwen 3.5 and OLMo hybrid alone, for flash-linear-attention's kernel; its PyTorch code
raises an error where it is given any. And its cache takes the last tokens of the sequence as a convolution's state,
which are those of the last row.

`kv_budget` trims layers with keys alone; `Report.state_bytes` counts the states, which have the same size whatever is
pruned. Saved prompts hold them. `crop` is refused before anything is lost where states
cannot go back: recurrent ones never, those of convolutions from `cache.activate_past_recording()` on. Where several
tokens follow a cache, Jamba and Zamba begin with new states, patched or not.

These pass keep-all identity through 100 tokens, the recomputation, with and without `kv_budget` and stages, batches,
later turns, beams, saved and copied caches, in every length around kernels and chunks that was tried, as tiny random
models:

{hybrids}.

Others work by structure where the self-test passes. No real weights were at hand, so what pruning does to their
answers is not measured; `flexasl eval --model FOLDER_OR_ID --tasks niah_multikey_1,niah_multivalue,by_meaning
--samples 8` measures it on yours.

## Layers that share keys and values

In Gemma 3n and the small sizes of Gemma 4 the last layers have no keys and values of their own: each uses those of the
last earlier layer of its type. Tokens are ranked and dropped before the first layer that others use, so that all of
them run on the same tokens: in a model of 35 layers, of which the last 20 share, at layers 4 and 9. A later layer is
refused as a selection layer by name. Caches, saved prompts and reports hold nothing of layers that share.

These pass keep-all identity, pruned decode against a masked recomputation, with and without `kv_budget` and stages,
gathering against masking, batches, later turns, beams, saved, copied and cropped caches: `gemma3n_text`, `gemma4_text`
(with and without embeddings by layer, with experts, and its large sizes, which share nothing).

Unpatched, Gemma 4 runs the layers that share on the last token of a prompt alone, as nothing reads what others make of
them. Patched, they run on the kept tokens. Counted costs compare with all tokens in all layers; against what the
unpatched model does, a model of 35 layers of which 20 share runs .60 of the layers times tokens where half of the
tokens go on after layer 4 and a sixteenth after layer 9. `compile=True` is refused.

Tokens are not dropped behind a lender, as nothing is to be gained there. Behind the last one all layers share: they
have no entries, and what they make of any token but the last is read by nobody. Behind the first of two lenders there
are as many layers with entries of their own as a pattern of sliding and full layers is long, less one; and the lender
would still hold the tokens that were dropped, as its own new tokens see them, so that those that share its entries
would read them under a mask.

## ALiBi

BLOOM and MPT have no rotary positions, but a bias by distance: a slope for each head, times how far back a key is. It
is computed from true positions, as a number more of each key and each query, so that scores, masks, caches and all
kernels know it: `FlexASLAttention(alibi=)`. It is exact in half precision. Unpatched, BLOOM rounds logits to that,
with the bias in them, to the next 4 at position 900: a tiny random model in bfloat16 is .12 to .15 from what float32
makes of it there, and patched .01. Falcon models with ALiBi are refused; those with rotary positions work.

BLOOM, CodeGen, Falcon, GPT-J, GPT-NeoX Japanese and MPT attend without transformers' interface, and are patched at
their attention modules; `compile=True` is refused.

## Keys chosen by an indexer

In DeepSeek V3.2 and models like it (`glm_moe_dsa`, `axk2`, `hy_v4`) each query attends to no more than `index_topk`
keys, chosen by scores of keys of another kind. Dropping tokens goes together with that: the best of the tokens that are
left are what masking the others out leaves to choose, and what a run on the tokens that are left chooses. Keys of the
indexer are cached beside the values of their tokens, and dropped with them. Prompts run row by row, with a mask of all
pairs, as in the models' own PyTorch code; `compile=True` is refused.

Tokens are ranked by attention to all of them, not to the chosen ones alone, which says nothing of the others. Where
layers use the choice of an earlier one (`indexer_types`), tokens are dropped before a layer that chooses anew, and
`kv_budget`, `kv_top_p` and policies that trim caches or read twice are refused, since choices name cache entries.
Choices are made in float32 whatever the model's dtype, so that in a batch, where sums have another order, near ties
may go another way; from there on tokens differ. With `kv_dtype` keys of the indexer are in eight bits, too.

These pass keep-all identity through 100 tokens, the recomputation on the kept tokens, gathering against masking,
batches, later turns, beams, saved, copied and cropped caches: `deepseek_v32`, `glm_moe_dsa` (all its layers choosing,
and some sharing), `hy_v4`; and `axk2` but for the recomputation, as its unpatched logits differ by .3 between tokens
read at once and one by one.

## Attention in chunks

Most layers of Llama 4 see the tokens of their own chunk of positions alone, counted from the row's first token. They
are masked by true positions whatever was dropped, like sliding windows, and neither rank tokens nor select. Text alone;
images and `compile=True` are refused. Its layers without rotary positions scale queries by their place in the padded
batch, patched or not: in a batch with more than 8,191 tokens, padding included, rows differ a little from rows alone.

## Refused

| model type | why |
| --- | --- |
{refused}

## Models that read images

Of a model that reads more than text, the text decoder is patched; the vision tower keeps its attention. These may be
given images, alone and in batches, several in a prompt, in a first and in a later turn:

{images}.

Their image features take the places of placeholder tokens, and are ranked, kept and dropped like text. The report
says how many of each image went on (`RowReport.images`; a part that has text around it counts by itself). Qwen-VL's
positions of three parts go on with the tokens that are kept. Qwen3-VL adds features to the outputs of its first
layers, by places in the prompt: no token may be dropped before, which is refused, and which the defaults do not do in
models of 24 layers and more.

In Gemma 3, the large sizes of Gemma 4 (in layers with a sliding window) and PaliGemma (the whole prompt), tokens of an
image see each other in both directions. So they do while patched, in a first and in a later turn; but PaliGemma has
them in a first turn alone, patched or not, where a later one is refused. An image with `compile=True` is refused.

All others can be patched for text alone where the self-test passes, and refuse the first image, video or sound before
it is read. No real weights were at hand: what pruning does to answers about
images is not measured.

## Layers with a sliding window

A sliding-window layer sees its window's worth of positions, which are those of the prompt, whatever was pruned between
them. Where a model has layers of both kinds, only those with full attention rank tokens, and only they can be the
selection layer: `observe_layers` counts them, `min_layer` and `max_layer` move to the nearest of them. Where all layers
slide, all rank, each the tokens that it sees.

Caches of sliding layers keep no more than their window of a prompt. While an answer grows they keep some entries
more, 64 or half the window, whichever is less, so that the last tokens can be cropped; with `compile=True` up to twice
as many. To crop further, as drafts do, call `cache.activate_past_recording()` before the tokens are read, as without a
patch: then nothing is dropped that a crop of all tokens since the last crop would need. transformers does so for an
assistant.
"""


LEAD = r"^model type '\w+' (\(\w+\) )?(cannot be patched: |is )|; (it cannot be patched|tested models are .*)$"
"""What every refusal says."""


def page():
    refused = {kind: re.sub(LEAD, "", found[kind]) for kind in TRIED if found[kind] is not None}
    refused |= {kind: why for kind, why in supported.REFUSED.items() if kind not in TRIED}
    return TEXT.format(
        tested="\n".join(f"| {kind} | {', '.join(features(kind))} |" for kind in supported.SUPPORTED),
        images=textwrap.fill(", ".join(media.TESTED), 118),
        hybrids=textwrap.fill(", ".join(sorted(HYBRIDS)), 118),
        works=textwrap.fill(", ".join(kind for kind in TRIED if found[kind] is None), 118),
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
