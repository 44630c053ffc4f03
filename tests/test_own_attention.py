"""Models whose attention does not go through transformers' interface, and ALiBi, the bias by distance of some."""

import copy
import functools
import gc

import pytest
import torch
from answers import FIXED, KEEP_ALL, RULES, STAGES, check_caches, check_rows_alone, close, say
from hypothesis import given
from hypothesis import strategies as st
from models import (
    HEADS,
    SHAPE,
    counting,
    held_columns,
    left_padded,
    prefills,
    prompts,
    pruned_masks,
    selected,
)
from placing import shared
from transformers import AutoConfig, AutoModelForCausalLM

import flexasl
from flexasl import ConfigError, FlexASLAttention, Scoring, UnsupportedError, Visibility
from flexasl.attention_spec import AttentionSpec
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.integrations.transformers.patch import RUNNING
from flexasl.kernels import attention_gradients, eager, sdpa
from flexasl.kernels.alibi import with_alibi

LAYERS = 6
GPT = {"n_embd": 64, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 1024, "rotary_dim": 8}
FAMILIES = {
    "bloom": {"n_layer": LAYERS, "n_head": HEADS},
    "bloom_of_six_heads": {"model_type": "bloom", "n_layer": LAYERS, "n_head": 6, "hidden_size": 96},
    "codegen": GPT,
    "diffllama": {"num_key_value_heads": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_of_one_kv_head": {"model_type": "falcon"},
    "falcon_of_many": {"model_type": "falcon", "multi_query": False, "parallel_attn": False},
    "gpt_neox_japanese": {},
    "gptj": GPT,
    "mpt": {"d_model": 64, "n_heads": HEADS, "n_layers": LAYERS, "use_cache": True},
    "mpt_of_six_heads": {"model_type": "mpt", "d_model": 96, "n_heads": 6, "n_layers": LAYERS, "use_cache": True},
    "nemotron": {},
    "stablelm": {},
}


@shared
def own(family, dtype=torch.float32):
    settings = dict(FAMILIES[family])
    torch.manual_seed(3)
    config = AutoConfig.for_model(settings.pop("model_type", family), **(SHAPE | settings))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def masked_run(model, ids, prompt, cache, selections):
    """Logits [1, N, V] of an unpatched run over all tokens [1, N], each layer's pruning as a mask."""
    columns = [held_columns(layer) for layer in cache.layers]
    heads = model.config.num_attention_heads
    masks = pruned_masks(ids.shape[1], prompt, columns, selections, [None] * LAYERS, heads)
    as_bool = model.config.model_type == "mpt"

    def masking(mask):
        mask = mask.isinf() if as_bool else mask.clamp(min=torch.finfo(torch.float32).min)
        return lambda layer, args, kwargs: (args, kwargs | {"attention_mask": mask})

    handles = [
        layer.register_forward_pre_hook(masking(mask), with_kwargs=True)
        for layer, mask in zip(decoder_layers(model), masks, strict=True)
    ]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_identity_through_a_hundred_tokens(family):
    model, batch = own(family), left_padded(prompts(70, 41))
    sequences, logits, _ = say(model, 100, **batch)
    with flexasl.patch(model, KEEP_ALL) as patch:
        mine, got, _ = say(model, 100, **batch)
    close(got, logits)
    assert torch.equal(mine, sequences) and patch.report.kv_bytes == patch.report.kv_bytes_full
    assert not any("forward" in vars(module) for module in model.modules())
    close(model(**batch).logits[:, -1], logits[:, 0])


@pytest.mark.parametrize("budget", [None, 16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_decode_equals_a_masked_run(family, rule, budget):
    model, ids = own(family), prompts(67)[0][None]
    config, policy = RULES[rule]
    with flexasl.patch(model, config.replace(kv_budget=budget), policy=policy) as patch, prefills() as read:
        sequences, logits, cache = say(model, 17, input_ids=ids)
    assert patch.report.rows[0].kept_tokens == 24
    full = masked_run(model, sequences[:, :-1], 67, cache, selected(read[0], 0))
    close(logits, full[:, -17:])


@pytest.mark.parametrize("policy", ["asl", "gemfilter:layer=1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_alone(family, policy):
    assert check_rows_alone(own(family), counting(policy, STAGES), policy)[1] == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_gathering_equals_masking(family):
    model, batch, said = own(family), left_padded(prompts(70, 12, 43)), []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, STAGES.replace(propagate=propagate)):
            said.append(say(model, 12, **batch)[:2])
    assert torch.equal(said[0][0], said[1][0])
    close(said[0][1], said[1][1])


@pytest.mark.parametrize("later", ["keep", "prune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_in_a_batch_is_each_rows_own(family, later):
    model, first, second = own(family), prompts(60, 33), torch.stack(prompts(12, 12, seed=1))
    batch = left_padded(first)
    config = FIXED.replace(later_turns=later, select_tokens=16)
    with flexasl.patch(model, config, policy="fixed_layer:layer=2"), prefills() as read:
        answers = []
        for row in range(2):
            cache = model(first[row][None], use_cache=True).past_key_values
            turns = torch.cat([first[row], second[row]])[None]
            answers.append(say(model, 6, input_ids=turns, past_key_values=cache))
        cache = say(model, 1, **batch)[2]  # which gives the rows' own position_ids
        mask = torch.cat([batch["attention_mask"], torch.ones_like(second)], 1)
        turns = torch.cat([batch["input_ids"], second], 1)
        _, logits, _ = say(model, 6, input_ids=turns, attention_mask=mask, past_key_values=cache)
    for row in range(2):
        close(logits[row], answers[row][1][0])
    if later == "keep":
        sequences, logits, cache = answers[0]
        full = masked_run(model, sequences[:, :-1], 60, cache, selected(read[0], 0))
        close(logits, full[:, -6:])


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "mpt", "stablelm"])
def test_caches_are_saved_copied_cropped_and_chosen_from(family, tmp_path):
    check_caches(own(family), FIXED.replace(kv_budget=20), "fixed_layer:layer=2", tmp_path)


@pytest.mark.parametrize("family", ["bloom", "bloom_of_six_heads", "mpt"])
def test_half_precision_has_the_whole_bias(family):
    """What float32 makes of the same weights; unpatched, BLOOM rounds logits, with the bias in them, to bfloat16, which
    at position 900 is to the next 4."""
    model, batch = own(family, torch.bfloat16), left_padded(prompts(900, 700))
    want = copy.deepcopy(model).float()(**batch).logits[:, -1]
    with flexasl.patch(model, KEEP_ALL):
        got = model(**batch).logits[:, -1].float()
    assert (got - want).norm() < 0.03 * want.norm()


def test_what_own_attention_cannot_honour_is_refused():
    with pytest.raises(
        UnsupportedError, match="compile=True cannot take BloomForCausalLM, which has its own attention"
    ):
        flexasl.patch(own("bloom"), compile=True)
    torch.manual_seed(0)
    falcon = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **SHAPE, alibi=True, multi_query=False))
    with pytest.raises(
        UnsupportedError, match="'falcon' cannot be patched: its ALiBi is made of positions in bfloat16"
    ):
        flexasl.patch(falcon.eval())
    with flexasl.patch(own("bloom")) as patch:
        layer = own("bloom").transformer.h[0]
        with pytest.raises(UnsupportedError, match="BloomAttention was called outside the patched model"):
            layer(torch.randn(1, 3, 64), alibi=None, attention_mask=None)
        assert patch.report is None


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj"])
def test_a_pass_that_fails_leaves_nothing(family):
    model, ids = copy.deepcopy(own(family)), prompts(60)[0][None]
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=2", foreign_hooks="packed"):
        want = model(ids).logits[:, -1]
        layer = decoder_layers(model)[3]
        handle = layer.register_forward_hook(lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        handle.remove()
        gc.collect()
        assert RUNNING.get()() is None
        assert torch.equal(model(ids).logits[:, -1], want)


def test_forwards_of_other_libraries_are_refused_or_stay():
    model, ids = copy.deepcopy(own("bloom")), prompts(60)[0][None]
    layer = model.transformer.h[1]
    want = model(ids).logits
    theirs = functools.partial(type(layer.self_attention).forward, layer.self_attention)
    layer.self_attention.forward = theirs
    with pytest.raises(UnsupportedError, match="another library has replaced the forward of BloomAttention"):
        flexasl.patch(model, FIXED)
    assert layer.self_attention.forward is theirs and not hasattr(model, "flexasl_patch")
    del layer.self_attention.forward
    with flexasl.patch(model, KEEP_ALL):
        before = layer.self_attention.forward
        layer.self_attention.forward = around = functools.partial(
            lambda own, *given, **named: own(*given, **named), before
        )
        close(model(ids).logits, want)
    assert layer.self_attention.forward is around
    del layer.self_attention.forward
    assert torch.equal(model(ids).logits, want)


# ---------------------------------------------------------------- the bias


def biased(query, key, value, slopes, at, mask):
    """Attention of query [B, H, M, D] in float64 by the definition, and its weights."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    at = at[:, None] if at.dim() == 2 else at.repeat_interleave(repeats, 1)
    bias = at.double() * torch.tensor(slopes, dtype=torch.float64)[None, :, None]
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias[:, :, None]
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ value, weights


@given(
    st.integers(0, 2**20),
    st.sampled_from([1, 3, 90, 300]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_kernels_and_scores_add_the_bias(seed, queries, groups, by_head):
    generator = torch.Generator().manual_seed(seed)
    slopes = tuple((torch.rand(4, generator=generator, dtype=torch.float64) * 0.3).tolist())
    keys = queries if queries > 3 else queries + 40
    shape = (2, groups, keys) if by_head and queries <= 3 else (2, keys)
    at = torch.randint(1, 5, shape, generator=generator).cumsum(-1)
    at = at - at[..., -1:] + 2000
    own_at = at[..., -queries:]
    query_at = own_at if own_at.dim() == 2 else own_at[:, 0]
    valid = torch.rand(shape, generator=generator) < 0.8
    query, key, value = (
        torch.randn(2, heads, count, 8, dtype=torch.float64, generator=generator)
        for heads, count in ((4, queries), (groups, keys), (groups, keys))
    )
    visible = Visibility(query_at, at, valid)
    mask = visible.dense().repeat_interleave(4 // groups, 1) if len(shape) == 3 else visible.dense()
    want, weights = biased(query, key, value, slopes, at, mask)
    module = FlexASLAttention(alibi=slopes)
    torch.testing.assert_close(module(query, key, value, visible), want)
    spec, wide, longer = with_alibi(module.spec, query, key, visible)
    for kernel in (eager, sdpa):
        torch.testing.assert_close(kernel.attend(spec, wide, longer, value, visible, None), want)
    if queries in (90, 300):
        window = 5
        seen = FlexASLAttention(alibi=slopes).scores(
            query[:, :, -window:], key, Scoring(window, 1), positions=at, valid=None
        )
        whole = Visibility(at, at)
        _, weights = biased(query, key, value, slopes, at, whole.dense())
        totals = weights[:, :, -window:, :-window].sum(2).unflatten(1, (groups, -1)).sum(2)
        torch.testing.assert_close(seen, totals.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_have_the_whole_bias(dtype, groups):
    """Positions up to 100,000, which neither dtype has exactly, differ by 1."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.zeros(3, 1, 4, 500, 16, dtype=dtype)
    value = torch.randn(1, groups, 500, 16, generator=generator).to(dtype)
    slopes, at = (0.5, 0.31, 0.07, 0.01), torch.arange(99_500, 100_000)[None]
    visible = Visibility(at, at)
    want, _ = biased(query.double(), key[:, :groups].double(), value.double(), slopes, at, visible.dense())
    got = FlexASLAttention(alibi=slopes)(query, key[:, :groups], value, visible)
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("groups", [2, 4])
def test_gradients_by_formula(groups):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, 30, 8, dtype=torch.float64, generator=generator) for heads in (4, groups, groups)]
    query, key, value = (one.requires_grad_(True) for one in states)
    visible, spec = Visibility.last(30, 30), AttentionSpec(alibi=(0.5, 0.2, 0.1, 0.3))
    out = eager.attend(*with_alibi(spec, query, key, visible), value, visible, None)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    want = torch.autograd.grad(out, (query, key, value), grad)
    with torch.no_grad():
        got = attention_gradients(spec, grad, query, key, value, visible, None)[:3]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_settings_of_the_bias():
    spec = AttentionSpec(alibi=(0.5, 0.25), scale=0.2)
    assert AttentionSpec.from_text(spec.text) == spec and spec.text.count(" ") == 1
    for wrong, message in (
        ({"alibi": ("a", 0.5)}, "alibi='a'"),
        ({"alibi": (0.5,), "softcap": 2.0}, "alibi has no soft-cap"),
    ):
        with pytest.raises((ConfigError, UnsupportedError), match=message):
            FlexASLAttention(**wrong)
    states = torch.randn(1, 4, 9, 8)
    with pytest.raises(UnsupportedError, match="alibi has slopes of 2 heads where there are 4"):
        FlexASLAttention(alibi=(0.5, 0.25))(states, states, states)
