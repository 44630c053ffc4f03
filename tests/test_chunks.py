"""Layers that attend in chunks of positions, as Llama 4's."""

import pytest
import torch
from answers import FIXED, KEEP_ALL, STAGES, check_caches, close, say
from hypothesis import given
from hypothesis import strategies as st
from models import HEADS, SHAPE, held_columns, left_padded, prefills, prompts, pruned_masks, selected
from placing import shared
from transformers import AutoConfig, AutoModelForCausalLM

import flexasl
from flexasl import ConfigError, FlexASLAttention, Scoring, UnsupportedError, Visibility
from flexasl.kernels import eager, sdpa

LAYERS = 6
LLAMA4 = {
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "head_dim": 16,
    "attention_chunk_size": 20,
    "no_rope_layers": [1, 0, 1, 1, 0, 1],
    "interleave_moe_layer_step": 2,
    "floor_scale": 16,
}
RULES = {"one selection": (FIXED, "fixed_layer:layer=1"), "stages": (STAGES, "asl")}


@shared
def chunked(chunk=20, floor_scale=16):
    torch.manual_seed(3)
    settings = LLAMA4 | {"attention_chunk_size": chunk, "floor_scale": floor_scale}
    config = AutoConfig.for_model("llama4_text", **(SHAPE | settings))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


def masked_run(model, ids, prompt, cache, selections):
    """Logits [1, N, V] of an unpatched run over all tokens [1, N], each layer's pruning as a mask."""
    at = torch.arange(ids.shape[1]) // model.config.attention_chunk_size
    same = torch.where(at[:, None] == at, 0.0, float("-inf"))
    columns = [held_columns(layer) for layer in cache.layers]
    masks = pruned_masks(ids.shape[1], prompt, columns, selections, [None] * LAYERS)
    masks = [mask + same if model.config.no_rope_layers[layer] else mask for layer, mask in enumerate(masks)]
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("chunk", [7, 20, 64, 200])
def test_keep_all_is_identity_through_a_hundred_tokens(chunk):
    model, batch = chunked(chunk), left_padded(prompts(70, 41))
    sequences, logits, _ = say(model, 100, **batch)
    with flexasl.patch(model, KEEP_ALL) as patch:
        mine, got, _ = say(model, 100, **batch)
    close(got, logits)
    assert torch.equal(mine, sequences) and patch.report.kv_bytes <= patch.report.kv_bytes_full


@pytest.mark.parametrize("length", [1, 19, 20, 21, 39, 40, 41, 61])
def test_lengths_around_chunks(length):
    model, ids = chunked(), prompts(length)[0][None]
    want = say(model, 24, input_ids=ids)[1]
    with flexasl.patch(model, KEEP_ALL):
        close(say(model, 24, input_ids=ids)[1], want)


@pytest.mark.parametrize("budget", [None, 16])
@pytest.mark.parametrize("rule", RULES)
def test_pruned_decode_equals_a_masked_run(rule, budget):
    model, ids = chunked(), prompts(67)[0][None]
    config, policy = RULES[rule]
    with flexasl.patch(model, config.replace(kv_budget=budget), policy=policy) as patch, prefills() as read:
        sequences, logits, cache = say(model, 17, input_ids=ids)
    assert patch.report.rows[0].kept_tokens == 24
    full = masked_run(model, sequences[:, :-1], 67, cache, selected(read[0], 0))
    close(logits, full[:, -17:])


@pytest.mark.parametrize("propagate", ["gather", "mask"])
def test_a_row_is_alone(propagate):
    """With queries that are not scaled by their places in the padded batch, as unpatched ones are."""
    model, rows = chunked(floor_scale=10_000), prompts(70, 12, 43)
    with flexasl.patch(model, STAGES.replace(propagate=propagate)):
        alone = [say(model, 30, input_ids=row[None]) for row in rows]
        sequences, logits, _ = say(model, 30, **left_padded(rows))
    for row, (tokens, own_logits, _) in enumerate(alone):
        close(logits[row], own_logits[0])
        assert torch.equal(sequences[row, -30:], tokens[0, -30:])


def test_gathering_equals_masking():
    model, batch, said = chunked(), left_padded(prompts(70, 12, 43)), []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, STAGES.replace(propagate=propagate)):
            said.append(say(model, 12, **batch)[:2])
    assert torch.equal(said[0][0], said[1][0])
    close(said[0][1], said[1][1])


@pytest.mark.parametrize("later", ["keep", "prune"])
def test_a_second_turn_in_a_batch_is_each_rows_own(later):
    model, first, second = chunked(floor_scale=10_000), prompts(60, 33), torch.stack(prompts(12, 12, seed=1))
    batch = left_padded(first)
    config = FIXED.replace(later_turns=later, select_tokens=16)
    with flexasl.patch(model, config, policy="fixed_layer:layer=1"):
        answers = []
        for row in range(2):
            cache = model(first[row][None], use_cache=True).past_key_values
            answers.append(
                say(model, 6, input_ids=torch.cat([first[row], second[row]])[None], past_key_values=cache)[1]
            )
        cache = say(model, 1, **batch)[2]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(second)], 1)
        turns = torch.cat([batch["input_ids"], second], 1)
        _, logits, _ = say(model, 6, input_ids=turns, attention_mask=mask, past_key_values=cache)
    for row in range(2):
        close(logits[row], answers[row][0])


def test_caches_are_saved_copied_and_chosen_from(tmp_path):
    check_caches(chunked(), FIXED.replace(kv_budget=20), "fixed_layer:layer=1", tmp_path)


@given(st.integers(0, 2**20), st.sampled_from([1, 3, 90, 300]), st.sampled_from([5, 40, 128]), st.booleans())
def test_kernels_masks_and_scores_agree_with_the_rule(seed, queries, chunk, gaps):
    generator = torch.Generator().manual_seed(seed)
    keys = queries if queries > 3 else queries + 40
    at = torch.randint(1, 4 if gaps else 2, (2, keys), generator=generator).cumsum(-1) - 1
    valid = torch.rand(at.shape, generator=generator) < 0.8
    visible = Visibility(at[:, -queries:], at, valid)
    query = torch.randn(2, HEADS, queries, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 2, 2, keys, 8, dtype=torch.float64, generator=generator)
    own = torch.arange(keys - queries, keys)[:, None] == torch.arange(keys)
    same = at[:, -queries:, None] // chunk == at[:, None] // chunk
    seen = (at[:, None] <= at[:, -queries:, None]) & valid[:, None] & same | own
    wide = [states.repeat_interleave(2, 1) for states in (key, value)]
    logits = (query @ wide[0].transpose(-1, -2) * 8**-0.5).masked_fill(~seen[:, None], float("-inf"))
    module = FlexASLAttention(sliding_window=chunk, chunked=True)
    torch.testing.assert_close(module(query, key, value, visible), logits.softmax(-1) @ wide[1])
    assert torch.equal(visible.mask(module.spec)[:, 0] | own, seen)
    for kernel in (eager, sdpa):
        made = kernel.attend(
            FlexASLAttention(sliding_window=chunk).spec, query, key, value, visible.in_chunks(chunk), None
        )
        torch.testing.assert_close(made, logits.softmax(-1) @ wide[1])
    if queries == 90:
        weights = (query @ wide[0].transpose(-1, -2) * 8**-0.5)[:, :, -5:]
        real = same[:, -5:] & (at[:, None] <= at[:, -5:, None])
        weights = weights.masked_fill(~real[:, None], float("-inf")).softmax(-1)[..., :-5].sum(2)
        scores = module.scores(query[:, :, -5:], key, Scoring(5, 1), positions=at)
        torch.testing.assert_close(scores, weights.unflatten(1, (2, -1)).sum(2).float(), rtol=1e-4, atol=1e-5)


def test_what_chunks_cannot_honour_is_refused():
    model = chunked()
    for settings, message in (
        ({"compile": True}, "whose layers attend in chunks, counted from each row's first token; give compile=False"),
        ({"policy": "fixed_layer:layer=2"}, "layer=2 does not attend to the whole prompt, .*; give one of 1, 4"),
    ):
        with pytest.raises((ConfigError, UnsupportedError), match=message):
            flexasl.patch(model, **settings)
    with pytest.raises(ConfigError, match="chunked=True needs sliding_window, the size of a chunk"):
        FlexASLAttention(chunked=True)
