"""Compiled layers: the same results as uncompiled ones, and nothing compiled after the first prompts."""

import copy

import pytest
import torch
from models import GREEDY, SMALL, left_padded, prompts, tiny
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import flexasl
from flexasl import UnsupportedError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
WARM, LATER = (70, 81), (64, 66, 75, 90, 101, 118)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def plain():
    """A model with biases, unpatched."""
    model = copy.deepcopy(tiny("qwen2"))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def compiled(plain):
    """The same, patched and warm: two prompts and a few new tokens."""
    model = copy.deepcopy(plain)
    torch._dynamo.reset()
    with flexasl.patch(model, SMALL, compile=True) as patch:
        before = graphs()
        for count in WARM:
            model.generate(prompts(count)[0][None], max_new_tokens=3, **GREEDY)
        assert graphs() - before == 3
        yield model, patch


def pair(compiled, plain, inputs, new_tokens):
    """Generated output and report of the compiled model, and of the same model patched without compiling."""
    model, patch = compiled
    mine = model.generate(**inputs, max_new_tokens=new_tokens, output_logits=True, **GREEDY)
    with flexasl.patch(plain, patch.config) as other:
        want = plain.generate(**inputs, max_new_tokens=new_tokens, output_logits=True, **GREEDY)
    return mine, want, patch.report, other.report


def check_same(mine, want, report, plain):
    assert torch.equal(mine.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(want.logits), **CLOSE)
    for ours, theirs in zip(report.rows, plain.rows, strict=True):
        assert (ours.selected_layer, ours.kept_positions) == (theirs.selected_layer, theirs.kept_positions)
    assert (report.kv_tokens, report.kv_bytes) == (plain.kv_tokens, plain.kv_bytes)
    for held, other in zip(mine.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.equal(held.positions, other.positions)
        torch.testing.assert_close(held.keys, other.keys, **CLOSE)
        torch.testing.assert_close(held.values, other.values, **CLOSE)


def test_further_lengths_and_layers_compile_nothing(compiled, plain):
    before, layers = graphs(), set()
    for seed, count in enumerate(LATER):
        mine, want, report, other = pair(compiled, plain, {"input_ids": prompts(count, seed=seed)[0][None]}, 4)
        check_same(mine, want, report, other)
        layers.add(report.rows[0].selected_layer)
    assert len(layers) > 1
    assert graphs() == before


def test_decode_compiles_nothing_and_copies_no_cache(compiled, plain):
    before = graphs()
    ids = prompts(90)[0][None]
    mine, want, report, other = pair(compiled, plain, {"input_ids": ids}, 65)
    check_same(mine, want, report, other)
    assert graphs() == before
    layer = mine.past_key_values.layers[0]
    assert layer.keys.untyped_storage().nbytes() > layer.keys.nbytes
    storage = layer.keys.data_ptr()
    model = compiled[0]
    model(mine.sequences[:, -1:], past_key_values=mine.past_key_values)
    assert layer.keys.data_ptr() == storage


def test_all_padded_batches_are_one_more_graph(compiled, plain):
    before = graphs()
    for lengths in ((90, 71), (61, 33, 80), (50, 60, 70, 80), (40, 48, 20, 49, 60)):
        mine, want, report, other = pair(compiled, plain, left_padded(prompts(*lengths)), 4)
        check_same(mine, want, report, other)
    assert graphs() == before + 1


def test_a_later_turn_compiles_nothing(compiled, plain):
    model, patch = compiled
    before, ids, turn = graphs(), prompts(80)[0][None], prompts(5, seed=4)[0][None]
    with flexasl.patch(plain, patch.config):
        follow = plain(turn, past_key_values=plain(ids).past_key_values).logits
    again = model(turn, past_key_values=model(ids).past_key_values).logits
    torch.testing.assert_close(again, follow, **CLOSE)
    assert graphs() == before


@torch.no_grad()
def test_layers_of_two_kinds_under_a_sliding_window():
    model, outputs = copy.deepcopy(tiny("gemma2")), []
    for settings in ({}, {"compile": True}):
        before = graphs()
        with flexasl.patch(model, SMALL, **settings):
            outputs.append(
                [
                    model.generate(prompts(count)[0][None], max_new_tokens=6, output_logits=True, **GREEDY)
                    for count in (40, 45, 60)
                ]
            )
    # A prompt and a new token for each kind of layer, one also beyond its window and with a mask for gaps; the head.
    assert graphs() - before <= 7
    for want, mine in zip(*outputs, strict=True):
        assert torch.equal(mine.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(mine.logits), torch.stack(want.logits), **CLOSE)


def test_gradients_are_refused_when_they_are_asked_for(compiled):
    model, ids = compiled[0], prompts(90)[0][None]
    with torch.no_grad():
        want = model(ids).logits
    before = graphs()
    out = model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_())
    torch.testing.assert_close(out.logits, want, equal_nan=True)
    with pytest.raises(UnsupportedError, match="compile=True gives no gradients; patch the model with compile=False"):
        out.logits[:, -1].sum().backward()
    assert graphs() == before


def test_remove_makes_the_model_what_it_was():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny().config)).eval()
    model.load_state_dict(tiny().state_dict())
    before = [dict(vars(module)) for module in model.modules()]
    flexasl.patch(model, SMALL, compile=True).remove()
    for module, attributes in zip(model.modules(), before, strict=True):
        now = {name: value for name, value in vars(module).items() if "hooks" not in name}
        assert now == {name: value for name, value in attributes.items() if "hooks" not in name}


def test_compiled_models_are_refused_with_the_way_out():
    model = tiny()
    with pytest.raises(UnsupportedError, match=r"model is the result of torch.compile; patch the model itself"):
        flexasl.patch(torch.compile(model), SMALL)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    fresh.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"is compiled already .* patch it with compile=True instead"):
        flexasl.patch(fresh, SMALL)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    layer = fresh.model.layers[0]
    layer.forward = layer.forward
    with pytest.raises(UnsupportedError, match=r"compile=True cannot take LlamaForCausalLM, because another library"):
        flexasl.patch(fresh, SMALL, compile=True)
    assert fresh.config._attn_implementation != "flexasl"


@pytest.mark.parametrize("first", ["compiled", "patched"])
def test_a_users_own_compile_gives_the_same(first):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny().config)).eval().requires_grad_(False)
    model.load_state_dict(tiny().state_dict())
    torch._dynamo.reset()
    ids = prompts(90)[0][None]
    with flexasl.patch(tiny(), SMALL) as plain:
        want = tiny()(ids)
        step = tiny()(ids[:, :1], past_key_values=want.past_key_values).logits
    assert plain.report.rows[0].pruned
    if first == "compiled":
        compiled = torch.compile(model, backend="eager")
        compiled(ids)
        patch = flexasl.patch(model, SMALL)
    else:
        patch = flexasl.patch(model, SMALL)
        compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        out = compiled(ids)
        assert patch.report.rows[0].kept_positions == plain.report.rows[0].kept_positions
        torch.testing.assert_close(out.logits, want.logits, equal_nan=True, **CLOSE)
        again = compiled(ids[:, :1], past_key_values=out.past_key_values).logits
        torch.testing.assert_close(again, step, **CLOSE)
