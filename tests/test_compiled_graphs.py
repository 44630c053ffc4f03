"""How many graphs compiled layers make: few, whatever the batch, the lengths, the window and the turns."""

import copy

import pytest
import torch
from models import FAMILIES, GREEDY, RULES, SMALL, decoder_layers, left_padded, prompts, tiny

import flexasl
from flexasl import FlexASLError, UnsupportedError, compiling, rows

TWO_KINDS = {"gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss", "smollm3", "deepseek_v3"}
"""Families with two kinds of layers: with and without a sliding window, rotary embeddings, experts."""
PHASES = 5
"""Of each kind of layer: prompts, and a new token of one row or several, with or without a mask."""
WORK = [
    (64,),  # the model's width, and two rows are its KV heads: sizes that are equal by chance
    (50, 50),
    (61, 33, 80),
    (47, 48, 49, 50),
    (40, 48, 20, 49, 60),
    (45,),
    (20, 22),
    (1,),
    (130,),
]


@pytest.fixture
def graphs(monkeypatch):
    """Graphs as they are made, which run as they are, uncompiled, but with products of one row as reductions."""
    made = []

    def backend(graph, inputs):
        made.append(compiling.with_fused_rows(graph))
        return made[-1].forward

    monkeypatch.setattr(compiling, "inductor", backend)
    return made


def own(family="llama"):
    """A family's model that may be changed, with a bias wherever it can have one."""
    model = copy.deepcopy(tiny(family))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model


def go_through(model, config, **settings):
    """Logits of a prompt, new tokens and a later turn for all of `WORK`."""
    logits = []
    with flexasl.patch(model, config, **settings):
        for lengths in WORK:
            batch = left_padded(prompts(*lengths))
            out = model.generate(**batch, max_new_tokens=3, output_logits=True, **GREEDY)
            logits += out.logits
            if len(set(lengths)) == 1:
                cache, turn = out.past_key_values, torch.stack(prompts(*[30] * len(lengths), seed=3))
                logits += model(turn, past_key_values=cache).logits[:, -1:].unbind(1)
                logits += model(turn[:, :1], past_key_values=cache).logits.unbind(1)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_graph_for_each_kind_of_layer_and_phase(family, graphs, monkeypatch):
    monkeypatch.setattr(rows, "GROUP", 100)
    config = SMALL.replace(kv_budget=24, later_turns="prune" if family == "gemma2" else "keep")
    model = own(family)
    want = go_through(model, config)
    got = go_through(model, config, compile=True)
    assert 0 < len(graphs) <= PHASES * (2 if family in TWO_KINDS else 1) + 1
    for mine, plain in zip(got, want, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"propagate": "mask"}, {"kv_top_p": 0.6}], ids=str)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_other_settings_make_no_more(rule, settings, graphs):
    model, config = own(), RULES[rule].replace(**settings)
    want = go_through(model, config)
    got = go_through(model, config, compile=True)
    # A prompt whose tokens are masked out has one more.
    assert len(graphs) <= PHASES + 2
    for mine, plain in zip(got, want, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_of_an_uncompiled_patch_and_full_storage_make_no_more(graphs, monkeypatch):
    from flexasl.integrations.transformers import patch

    monkeypatch.setattr(patch, "SLACK", 4)
    model, ids = own(), prompts(60)[0][None]
    with flexasl.patch(model, SMALL):
        cache = model(ids).past_key_values
    with flexasl.patch(model, SMALL, compile=True):
        model(ids[:, :1], past_key_values=cache)
        model.generate(ids, max_new_tokens=12, **GREEDY)
    assert len(graphs) == 3


# ---------------------------------------------------------------- what cannot be compiled


@torch.no_grad()
def test_the_recompile_limit_is_a_sentence_and_the_model_stays_usable(graphs):
    model, ids = own(), prompts(60)[0][None]
    with torch._dynamo.config.patch(recompile_limit=1), flexasl.patch(model, SMALL, compile=True):
        want = model(ids).logits
        model.requires_grad_(True)
        with pytest.raises(FlexASLError, match=r"has made 1 graphs of LlamaDecoderLayer, .* patch with compile=False"):
            model(ids)
        model.requires_grad_(False)
        torch.testing.assert_close(model(ids).logits, want, equal_nan=True)
    with flexasl.patch(model.requires_grad_(True), SMALL):
        torch.testing.assert_close(model(ids).logits, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def graph_break(self, states):
    torch._dynamo.graph_break()
    return states


def loop_over_data(self, states):
    for row in states[0, :, 0].nonzero()[:, 0]:
        states = states * (1 + 0 * row)
    return states


@pytest.mark.parametrize("breaks", [graph_break, loop_over_data])
@torch.no_grad()
def test_a_layer_that_is_no_single_graph_is_refused(graphs, monkeypatch, breaks):
    model = own()
    monkeypatch.setattr(type(decoder_layers(model)[0].mlp), "forward", breaks)
    with (
        flexasl.patch(model, SMALL, compile=True),
        pytest.raises(UnsupportedError, match=r"cannot make LlamaDecoderLayer one graph: .*; patch with compile=False"),
    ):
        model(prompts(60)[0][None])


def test_no_compiler_is_said_when_patching():
    model = own()
    before = dict(vars(model))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UnsupportedError, match=r"compile=True needs a C\+\+ compiler on cpu, .* or give compile=False"),
    ):
        flexasl.patch(model, SMALL, compile=True)
    assert vars(model) == before and model.config._attn_implementation != "flexasl"


# ---------------------------------------------------------------- products of one row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_times_a_weight(dtype, bias):
    layer = torch.nn.Linear(24, 7, bias, dtype=dtype)
    row = torch.randn(1, 1, 24, dtype=dtype)
    got = compiling._row_times_weight(row, layer.weight, layer.bias)
    torch.testing.assert_close(got, layer(row))
    assert got.dtype == dtype
