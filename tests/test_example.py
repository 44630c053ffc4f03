"""The plain decoder of `examples/`: dropping tokens and masking them out are the same, and masking is one graph."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_invariants import rules
from torch.nn import functional as F

import flexasl
from flexasl import ASLConfig

PATH = Path(__file__).parents[1] / "examples" / "plain_decoder.py"
spec = importlib.util.spec_from_file_location("plain_decoder", PATH)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)

CLOSE = {"rtol": 0, "atol": 1e-9}


def decoder(layers=6, heads=4, groups=2, seed=0):
    torch.manual_seed(seed)
    return plain.Decoder(layers=layers, heads=heads, groups=groups).double().eval().requires_grad_(False)


def read(model, prompt, config):
    """Logits, report and caches of prompts."""
    caches = [flexasl.LayerCache() for _ in model.blocks]
    return *plain.read(model, prompt, caches, torch.ones_like(prompt), config), caches


def after(model, tokens, caches):
    """Logits of tokens after what the caches hold."""
    seen = torch.ones(len(tokens), caches[0].seen + tokens.shape[1], dtype=torch.int64)
    return plain.read(model, tokens, caches, seen, ASLConfig())[0]


def without_flexasl(model, tokens):
    """The same decoder, in textbook attention."""
    hidden = model.embed(tokens)
    cos, sin = plain.rotary_tables(torch.arange(tokens.shape[1])[None], model.dim)
    for block in model.blocks:
        normed = block.attention_norm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, block.dim)).transpose(1, 2)
            for project in (block.query, block.key, block.value)
        )
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        logits = plain.rotate(query, cos, sin) @ plain.rotate(key, cos, sin).mT * block.dim**-0.5
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        mixed = logits.masked_fill(future, float("-inf")).softmax(-1) @ value
        hidden = hidden + block.out(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.down(F.gelu(block.up(block.mlp_norm(hidden))))
    return F.linear(model.norm(hidden), model.embed.weight)


def test_with_everything_kept_it_is_the_plain_decoder():
    model, tokens = decoder(), torch.randint(257, (2, 50))
    logits, _, caches = read(model, tokens[:, :-3], ASLConfig(select_tokens=1.0))
    torch.testing.assert_close(logits, without_flexasl(model, tokens[:, :-3]), **CLOSE)
    for index in (47, 48, 49):
        logits = after(model, tokens[:, index : index + 1], caches)
    torch.testing.assert_close(logits, without_flexasl(model, tokens)[:, -1:], **CLOSE)


@settings(max_examples=100)
@given(
    config=rules(layers=5),
    shape=st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 2)]),
    layers=st.integers(5, 7),
    rows=st.integers(1, 3),
    tokens=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_dropping_tokens_equals_masking_them_out(config, shape, layers, rows, tokens, seed):
    model, config = decoder(layers, *shape, seed), config.replace(kv_budget=None, kv_top_p=None)
    prompt = torch.randint(257, (rows, tokens))
    dropped, mine, caches = read(model, prompt, config)
    masked, theirs, others = read(model, prompt, config.replace(propagate="mask"))
    assert mine.kv_tokens == theirs.kv_tokens
    for row, its in zip(mine.rows, theirs.rows, strict=True):
        assert (row.selected_layer, row.kept_positions) == (its.selected_layer, its.kept_positions)
        assert (row.variance, row.variance_ratio) == (its.variance, its.variance_ratio)
        assert row.selections == its.selections and row.lookup == pytest.approx(its.lookup, rel=1e-5)
        assert row.reason == its.reason
    torch.testing.assert_close(dropped, masked, equal_nan=True, **CLOSE)
    for held, kept in zip(caches, others, strict=True):
        for row in range(rows):
            one, two = (
                part.positions[row].expand(shape[1], -1)
                if part.valid is None
                else part.positions[row].expand(shape[1], -1)[part.valid[row].expand(shape[1], -1)].view(shape[1], -1)
                for part in (held, kept)
            )
            assert torch.equal(one, two)
            torch.testing.assert_close(*(part.keys[row][:, -one.shape[1] :] for part in (held, kept)), **CLOSE)
    more = torch.randint(257, (rows, 1))
    torch.testing.assert_close(after(model, more, caches), after(model, more, others), **CLOSE)


@pytest.mark.parametrize(
    "rule",
    [
        {"tau": 0.9, "min_layer": 1, "max_layer": 4, "observe_layers": 2},
        {
            **{"tau": 0.1, "min_layer": 2, "min_layer_unasked": 2, "max_layer": 4, "stages": "0.5@1-2"},
            **{"kernel_size": 3, "pooling": "maxpool"},
        },
    ],
    ids=["variance", "lookup"],
)
def test_a_masked_prefill_is_one_graph_for_many_lengths(rule):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = decoder()
    eager = plain.Decoder.forward
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counting)
    config = ASLConfig(select_tokens=24, window=8, propagate="mask", **rule)
    layers = set()
    for tokens in (60, 75, 90, 110):
        prompt = torch.randint(257, (2, tokens))
        want, first, _ = read(model, prompt, config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain.Decoder, "forward", lambda *arguments: compiled(*arguments))
            logits, report, _ = read(model, prompt, config)
        torch.testing.assert_close(logits, want, equal_nan=True, **CLOSE)
        assert [row.kept_positions for row in report.rows] == [row.kept_positions for row in first.rows]
        layers |= {row.selected_layer for row in report.rows}
    assert len(layers) > 1
    assert len(graphs) == 1


def test_a_masked_prefill_is_one_graph_of_inductor():
    torch._dynamo.reset()
    model, prompt = decoder(), torch.randint(257, (2, 90))
    config = ASLConfig(select_tokens=24, window=8, propagate="mask", stages="0.5@1-2", min_layer=2, max_layer=4)
    want, first, _ = read(model, prompt, config)
    compiled = torch.compile(plain.Decoder.forward, fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain.Decoder, "forward", lambda *arguments: compiled(*arguments))
        logits, report, _ = read(model, prompt, config)
    # Rotary tables are in float32, whose cosines a compiler makes in another way.
    torch.testing.assert_close(logits, want, equal_nan=True, rtol=0, atol=1e-6)
    assert [row.kept_positions for row in report.rows] == [row.kept_positions for row in first.rows]
    assert [row.kept_tokens for row in report.rows] == [24, 24]


def test_the_example_runs(capsys):
    plain.main()
    said = capsys.readouterr().out
    assert "64 kept from layer 4 of 6 on" in said
    apart = [float(line.split(": ")[1].split()[0]) for line in said.splitlines() if "apart" in line]
    assert apart[0] < 1e-4 < apart[1]


def test_a_later_turn_of_a_decoder_of_ones_own_is_pruned_like_a_prompt_or_kept():
    model, prompt, more = decoder(), torch.randint(257, (2, 60)), torch.randint(257, (2, 50))
    mask = torch.ones(2, 110, dtype=torch.int64)
    mask[0, :7] = 0
    config = ASLConfig(select_tokens=24, window=8, min_layer=1, max_layer=1, observe_layers=1)
    for later, kept in (("keep", 50), ("prune", 24)):
        caches, config = [flexasl.LayerCache() for _ in model.blocks], config.replace(later_turns=later)
        first = plain.read(model, prompt, caches, mask[:, :60], config)[1]
        assert [row.kept_tokens for row in first.rows] == [24, 24] and [row.prompt_tokens for row in first.rows] == [
            53,
            60,
        ]
        second = plain.read(model, more, caches, mask, config)[1]
        assert (second is None) == (later == "keep")
        assert caches[5].keys.shape[2] == 24 + kept and caches[0].seen == 110


def test_a_forward_pass_refuses_what_does_not_belong_together():
    model, prompt = decoder(), torch.randint(257, (2, 60))
    caches = [flexasl.LayerCache() for _ in model.blocks]
    begin, ones = flexasl.ForwardPass.begin, torch.ones
    with pytest.raises(flexasl.FlexASLError, match="caches is empty; give a LayerCache for each layer"):
        begin([], ones(2, 60))
    with pytest.raises(flexasl.FlexASLError, match=r"attention_mask is \[0, 60\] where the caches have read 0 tokens"):
        begin(caches, ones(0, 60))
    for arguments, message in (
        ((None, ones(2, 60)), r"caches=None is None; give a list of a LayerCache for each layer"),
        (([None] * 6, ones(2, 60)), "caches holds None, None; give a LayerCache for each layer"),
        ((caches[:1] * 6, ones(2, 60)), "caches holds one for several layers; give a LayerCache for each layer"),
        ((caches, None), r"attention_mask is None; give a tensor \[rows, all tokens so far\]"),
        ((caches, ones(60)), r"attention_mask is \[60\]; give a tensor"),
        ((caches, ones(2, 1, 60, 60)), r"attention_mask is \[2, 1, 60, 60\]; give a tensor"),
    ):
        with pytest.raises(flexasl.FlexASLError, match=message):
            begin(*arguments)
    for layers in ([3, 1], [1, 6], []):
        with pytest.raises(flexasl.FlexASLError, match=r"ranking_layers=\[.*\]; give some of 0 to 5, ascending"):
            begin(caches, ones(2, 60), ranking_layers=layers)
    with pytest.raises(flexasl.FlexASLError, match="ranking_layers=3 is an int; give a list of layers"):
        begin(caches, ones(2, 60), ranking_layers=3)
    plain.read(model, prompt, caches, torch.ones_like(prompt), ASLConfig())
    with pytest.raises(
        flexasl.FlexASLError, match=r"attention_mask is \[2, 1\] where the caches have read 60 tokens; give"
    ):
        begin(caches, ones(2, 1))
    with pytest.raises(flexasl.UnsupportedError, match="the batch has 3 rows where KV caches hold 2"):
        begin(caches, ones(3, 61))
    started = begin(caches, ones(2, 61))
    hidden, step = started.before_layer(0, model.blocks[0].attention, torch.zeros(2, 1, 64).double())
    cos, sin = plain.rotary_tables(started.positions, model.dim)
    started.after_layer(0, step, model.blocks[0](hidden, cos, sin, step))
    with pytest.raises(flexasl.UnsupportedError, match="half filled by a pass that failed"):
        begin(caches, ones(2, 62))


def test_layers_that_take_other_tokens_or_no_attention_are_refused():
    model, prompt = decoder(), torch.randint(257, (2, 60))
    caches, before = [flexasl.LayerCache() for _ in model.blocks], torch.ones(2, 60)
    for tokens in (60, 1):  # prompts, and what follows them
        begun = flexasl.ForwardPass.begin(caches, before)
        with pytest.raises(
            flexasl.UnsupportedError, match=rf"hidden states are \[2, 5, 64\] where \[2, {tokens}\] tok"
        ):
            model(torch.ones(2, 5, dtype=torch.int64), begun)
        begun = flexasl.ForwardPass.begin(caches, before)
        hidden, step = begun.before_layer(0, model.blocks[0].attention, torch.zeros(2, tokens, 64).double())
        if tokens == 60:
            with pytest.raises(flexasl.FlexASLError, match=r"layer 0 ran without LayerStep\.attention; call it"):
                begun.after_layer(0, step, hidden)
            plain.read(model, prompt, caches, before, ASLConfig())
            before = torch.ones(2, 61)
