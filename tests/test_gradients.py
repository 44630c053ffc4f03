"""Gradients through pruned prompts: autograd's own through the same run without pruning, or finite differences."""

import copy

import models
import pytest
import torch
from models import (
    FAMILIES,
    SMALL,
    STAGED,
    counting,
    decoder_layers,
    held_columns,
    left_padded,
    prompts,
    recompute,
    tiny,
)

import flexasl
from flexasl import ASLConfig, UnsupportedError
from flexasl.cache import LayerCache
from flexasl.policies import POLICIES

pytestmark = pytest.mark.real("needs gradients")


def new():
    return torch.tensor([[7], [8]])


def more():
    return prompts(60, seed=9)[0][None]


def trained(family, dtype=torch.float32):
    """The family's tiny model, with gradients, as the test's own."""
    return copy.deepcopy(tiny(family, dtype)).requires_grad_(True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def check_same(mine, its):
    assert mine.keys() == its.keys() and all(grad.isfinite().all() for grad in mine.values())
    for name, grad in mine.items():
        torch.testing.assert_close(grad, its[name], rtol=0, atol=1e-4 * max(1e-2, float(its[name].abs().max())))


@pytest.mark.parametrize("lengths", [(90,), (90, 70)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding", "gpt_oss", "deepseek_v3", "gpt2"])
@pytest.mark.parametrize("config", [SMALL, STAGED], ids=["variance", "lookup"])
def test_dropping_gives_the_gradients_of_masking(family, lengths, config):
    model, inputs, found = trained(family), left_padded(prompts(*lengths)), []
    for mode in ("gather", "mask"):
        with flexasl.patch(model, config.replace(propagate=mode)) as patch:
            out = model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 1, dtype=torch.long)], 1)
            after = model(new()[: len(lengths)], past_key_values=out.past_key_values, attention_mask=mask)
        assert all(row.pruned for row in patch.report.rows)
        found.append(gradients(model, out.logits[:, -5:].square().mean() + after.logits.square().mean()))
    check_same(*found)


@pytest.mark.parametrize("rule", models.RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_recomputation(family, rule):
    """Of a prompt with a cache budget and two new tokens."""
    model, ids = trained(family), torch.cat([prompts(80)[0], torch.tensor([7, 8])])[None]
    config = models.RULES[rule].replace(kv_budget=20)
    with flexasl.patch(model, config) as patch, models.prefills() as read:
        out = model(ids[:, :80], use_cache=True)
        logits = [out.logits[:, -1:]]
        for at in (80, 81):
            logits.append(model(ids[:, at : at + 1], past_key_values=out.past_key_values).logits)
    row, columns = patch.report.rows[0], [held_columns(layer) for layer in out.past_key_values.layers]
    assert row.pruned
    mine = gradients(model, torch.cat(logits, 1).square().mean())
    kept, before = torch.tensor(row.kept_positions), models.selected(read[0], 0)[:-1]
    want = recompute(model, ids, 80, columns, row.selected_layer, kept, before)[:, 79:]
    torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-4)
    check_same(mine, gradients(model, want.square().mean()))


ROOM = ASLConfig(select_tokens=24, window=8)
RULES = {name: (counting(name, ROOM), name) for name in POLICIES} | {
    "kv_top_p": (SMALL.replace(kv_top_p=0.6), "asl"),
    "later turn": (SMALL.replace(kv_budget=20, later_turns="prune"), "asl"),
}


def whole_loss(model, rule):
    """Of a batch of prompts, two new tokens each, and a later turn; and what was decided."""
    inputs, told = left_padded(prompts(90, 70)), []
    with flexasl.patch(model, *RULES[rule]) as patch:
        out, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
        cache, parts = out.past_key_values, [out.logits[:, -1]]
        told += [row.kept_positions for row in patch.report.rows]
        for ids in (new(), new() + 2, more().expand(2, -1)):
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            parts.append(model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1])
        told += [
            *(row.kept_positions for row in patch.report.rows),
            *(layer.positions.tolist() for layer in cache.layers),
        ]
    return torch.stack(parts).square().mean(), told


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_slopes(rule):
    """In GPT-NeoX alone, which computes in float64 throughout."""
    model, step = trained("gpt_neox", torch.float64), 1e-6
    loss, told = whole_loss(model, rule)
    generator = torch.Generator().manual_seed(2)
    ways = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in model.named_parameters()}
    found = gradients(model, loss)
    slope = sum((grad * ways[name]).sum() for name, grad in found.items())
    ends = []
    with torch.no_grad():
        for size in (step, -2 * step):
            for name, weight in model.named_parameters():
                weight.add_(ways[name], alpha=size)
            ends.append(whole_loss(model, rule))
    assert all(same == told for _, same in ends), "no decision lies between the two ends"
    torch.testing.assert_close(slope, (ends[0][0] - ends[1][0]) / (2 * step), rtol=1e-5, atol=0)


@pytest.mark.parametrize("keep", [0, 3, 60, torch.tensor([0, 40, 85, 89])])
def test_logits_of_dropped_tokens_are_nan_with_gradients_as_without(keep):
    model, inputs = trained("gpt2"), left_padded(prompts(90, 70))
    with flexasl.patch(model, SMALL):
        recorded = model(**inputs, logits_to_keep=keep)
        states = model.get_decoder()(**inputs).last_hidden_state
        with torch.no_grad():
            plain = model(**inputs, logits_to_keep=keep)
            want = model.get_decoder()(**inputs).last_hidden_state
            as_tuple = model(**inputs, logits_to_keep=keep, return_dict=False)[0]
    real = plain.logits.isnan() | (plain.logits != plain.logits[1:, :1])
    assert recorded.logits.requires_grad and recorded.logits.isnan().any() == plain.logits.isnan().any()
    torch.testing.assert_close(recorded.logits[real], plain.logits[real], equal_nan=True)
    torch.testing.assert_close(as_tuple, plain.logits, equal_nan=True)
    torch.testing.assert_close(states, want, equal_nan=True)


def test_a_cache_with_room_keeps_what_gradients_need():
    cache = LayerCache(slack=8)
    one = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    cache.append(one, one, torch.arange(5)[None], None, 5)
    total = torch.zeros((), dtype=torch.float64)
    for at in (5, 6, 7):
        keys, values = cache.extend(torch.tensor([[at]]), None, 1)
        keys[:, :, -1:], values[:, :, -1:] = one[:, :, :1] * at, one[:, :, :1]
        cache.commit(keys, values, 1)
        total = total + (keys.exp() * values).sum()
    (grad,) = torch.autograd.grad(total, one)
    assert grad.isfinite().all()


def test_what_gives_no_gradients_says_so_when_asked():
    pytest.importorskip("torchao")
    model, ids = trained("llama"), prompts(80)[0][None]
    with flexasl.patch(model, SMALL.replace(kv_dtype="int8")):
        out = model(ids, use_cache=True)
        out.logits[:, -1].sum().backward()
        after = model(new()[:1], past_key_values=out.past_key_values)
        with pytest.raises(
            UnsupportedError, match="no gradients flow through a cache in eight bits; patch the model w"
        ):
            after.logits.sum().backward()
        with torch.no_grad():
            held = model(ids, use_cache=True).past_key_values
        model(new()[:1], past_key_values=held).logits.sum().backward()
    assert decoder_layers(model)[0].mlp.up_proj.weight.grad is not None
