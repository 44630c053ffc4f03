"""Each policy against its definition, against its neighbours, and in batches."""

import itertools

import pytest
import torch
from models import GREEDY, LAYERS, SMALL, left_padded, prompts, recompute, tiny

import flexasl
from flexasl import ASLConfig, ConfigError, policies

FAMILIES = ["llama", "gemma2", "deepseek_v3", "gpt2"]
TWO_PASS = ["asl_two_pass", "gemfilter"]
CLOSE = {"rtol": 0, "atol": 1e-5}


def run(model, ids, policy, config=SMALL, steps=4):
    """Logits [steps, V], cache and report of one prompt [M] and greedy tokens after it."""
    with flexasl.patch(model, config, policy) as patch:
        out = model.generate(ids[None], max_new_tokens=steps, output_logits=True, **GREEDY)
        return torch.cat(out.logits).double(), out.past_key_values.layers, patch.report.rows[0], out.sequences[0]


def positions(layer, prompt):
    """[head][entry] prompt positions in a layer's cache."""
    columns = layer.columns[0].expand(layer.keys.shape[1], -1)
    return [[at for at in head.tolist() if at < prompt] for head in columns]


@pytest.mark.parametrize("kv_budget", [None, 16])
@pytest.mark.parametrize("policy", policies.POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_alone_under_every_policy(family, policy, kv_budget, monkeypatch):
    monkeypatch.setattr("flexasl.packing.GROUP", 100)
    model, rows = tiny(family, torch.float64), prompts(90, 61, 9, 33, seed=1)
    config = SMALL.replace(kv_budget=kv_budget)
    if family == "gemma2" and policy == "pyramid_infer":
        with pytest.raises(ConfigError, match="ranks tokens at every layer, but only layers 1, 3, 5 see"):
            flexasl.patch(model, config, policy)
        return
    with flexasl.patch(model, config, policy) as patch:
        out = model.generate(**left_padded(rows), max_new_tokens=5, output_logits=True, **GREEDY)
        together, logits = patch.report, torch.stack(out.logits, 1)
        for index, ids in enumerate(rows):
            solo = model.generate(ids[None], max_new_tokens=5, output_logits=True, **GREEDY)
            mine, its = together.rows[index], patch.report.rows[0]
            assert (mine.kept_positions, mine.layer_tokens, mine.reread_layers) == (
                its.kept_positions,
                its.layer_tokens,
                its.reread_layers,
            )
            torch.testing.assert_close(logits[index], torch.stack(solo.logits, 1)[0], **CLOSE)


@pytest.mark.parametrize("policy", TWO_PASS)
@pytest.mark.parametrize("family", ["llama", "phi3", "deepseek_v3", "gpt2"])
def test_two_passes_are_the_unpatched_model_on_the_selected_tokens(family, policy):
    model, ids = tiny(family, torch.float64), prompts(80)[0]
    logits, layers, row, sequence = run(model, ids, policy)
    kept = torch.tensor(row.kept_positions)
    assert len(kept) == 24 and row.reread_layers == row.selected_layer + 1
    for layer in layers:
        assert all(set(head) <= set(kept.tolist()) for head in positions(layer, 80))
    at = torch.cat([kept, torch.arange(80, 83)])
    want = model(sequence[at][None], position_ids=at[None]).logits[0, -4:]
    torch.testing.assert_close(logits, want, **CLOSE)


def test_two_passes_select_what_one_pass_selects():
    model, ids = tiny("llama", torch.float64), prompts(80)[0]
    one, two = run(model, ids, "asl"), run(model, ids, "asl_two_pass")
    assert one[2].kept_positions == two[2].kept_positions and one[2].selected_layer == two[2].selected_layer
    assert (one[0][0] - two[0][0]).abs().max() > 1e-3
    assert [layer.keys.shape[2] for layer in one[1]] != [layer.keys.shape[2] for layer in two[1]]


def test_gemfilter_selects_by_the_last_token_pooled_over_five():
    model, ids = tiny("llama", torch.float64), prompts(80)[0]
    row = run(model, ids, policies.GemFilter(2))[2]
    same = SMALL.replace(window=1, kernel_size=5)
    assert row.kept_positions == run(model, ids, policies.FixedLayer(2), same)[2].kept_positions
    assert row.kept_positions != run(model, ids, policies.FixedLayer(2))[2].kept_positions
    assert policies.GemFilter().resolve(ASLConfig(), 32).max_layer == 13
    assert policies.FixedLayer().resolve(ASLConfig(), 32).max_layer == 15


def test_pyramid_infer_drops_tokens_step_by_step_and_equals_recompute():
    model, ids = tiny("llama", torch.float64), prompts(90)[0]
    logits, layers, row, sequence = run(model, ids, policies.PyramidInfer(1, 4))
    assert row.layer_tokens == (90, 90, 80, 57, 34, 24) and row.reread_layers == 0
    held = [positions(layer, 90)[0] for layer in layers]
    assert [len(at) for at in held] == list(row.layer_tokens)
    for wide, narrow in itertools.pairwise(held):
        assert set(narrow) <= set(wide) and narrow[-8:] == list(range(82, 90))
    assert "step by step, from layer 1 to layer 4" in row.reason
    # Every query sees what the layer's cache holds: tokens that were dropped are seen by none that is left.
    columns = [layer.columns for layer in layers]
    want = recompute(model, sequence[None, :-1], 0, columns, None, torch.arange(0))
    torch.testing.assert_close(logits, want[0, -4:], **CLOSE)


def test_pyramid_infer_drops_what_the_layer_ranks_last():
    model, ids = tiny("llama", torch.float64), prompts(90)[0]
    with flexasl.patch(model, SMALL, policies.PyramidInfer(1, 4)):
        cache = model(ids[None], use_cache=True).past_key_values
    first = positions(cache.layers[2], 90)[0]
    config = SMALL.replace(select_tokens=80)
    assert first == list(run(model, ids, policies.FixedLayer(1), config)[2].kept_positions)


@pytest.mark.parametrize(("budget", "beta"), [(24, 20.0), (40, 4.0), (40, 1.0)])
def test_pyramid_kv_falls_along_a_line_and_sums_to_snapkv(budget, beta):
    model, ids = tiny("llama", torch.float64), prompts(90)[0]
    config = SMALL.replace(kv_budget=budget)
    _, layers, row, _ = run(model, ids, policies.PyramidKV(beta), config, steps=1)
    slots = [layer.keys.shape[2] for layer in layers]
    mean = budget - 8
    assert row.kept_tokens == 90
    assert slots[0] == 8 + round(2 * mean - mean / beta) and slots[-1] == 8 + max(1, round(mean / beta))
    assert slots == sorted(slots, reverse=True)
    assert abs(sum(slots) - LAYERS * budget) <= LAYERS
    steps = [one - other for one, other in itertools.pairwise(slots)]
    assert max(steps) - min(steps) <= 1
    if beta == 1.0:
        snap = run(model, ids, "snapkv", config, steps=1)[1]
        assert [positions(layer, 90) for layer in layers] == [positions(layer, 90) for layer in snap]


@pytest.mark.parametrize("sinks", [0, 4])
def test_streaming_keeps_the_first_and_the_last(sinks):
    model, rows = tiny("llama", torch.float64), prompts(90, 61)
    with flexasl.patch(model, SMALL.replace(kv_budget=20), policies.Streaming(sinks)) as patch:
        layers = model(**left_padded(rows), use_cache=True).past_key_values.layers
    assert [row.kept_tokens for row in patch.report.rows] == [90, 61]
    assert patch.report.rows[0].scored_layers == ()
    for layer in layers:
        for index, length in enumerate((90, 61)):
            want = [*range(sinks), *range(length - 20 + sinks, length)]
            assert (layer.columns[index] - (90 - length)).tolist() == [want] * 2


@pytest.mark.parametrize(
    ("policy", "config", "message"),
    [
        ("asl_two_pass", SMALL.replace(propagate="mask"), "propagate='mask' drops no tokens, which policy 'asl_two"),
        ("pyramid_infer", SMALL.replace(propagate="mask"), "propagate='mask' drops no tokens, which policy 'pyramid"),
        ("gemfilter", SMALL.replace(later_turns="prune"), "later_turns='prune' does not go with policy 'gemfilter'"),
        ("pyramid_kv", SMALL.replace(kv_top_p=0.5), "kv_top_p=0.5 sets no budget that could fall with depth"),
        ("streaming", SMALL.replace(kv_top_p=0.5), "kv_top_p=0.5 goes by attention, policy 'streaming' by position"),
        (policies.PyramidInfer(4, 2), SMALL, "first=4 and last=2 are no layers in order; give 0 to 5"),
    ],
)
def test_refuses_settings_that_do_not_go_together(policy, config, message):
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        flexasl.patch(model, config, policy)
    assert not hasattr(model, "flexasl_patch")


def test_refuses_settings_of_policies():
    with pytest.raises(ConfigError, match=r"beta=0.5 would give the last layer more than the mean"):
        policies.PyramidKV(0.5)
    with pytest.raises(ConfigError, match="sinks=-1 is negative"):
        policies.Streaming(-1)


def test_a_policy_of_ones_own():
    """As docs/policies.md shows it."""

    class Halves(policies.Policy):
        """Drops half of the tokens that are left at every fourth layer."""

        name = "halves"

        def resolve(self, config, num_layers, voters=None):
            rule = config.replace(select_on="last", observe_layers=1, if_never="select")
            return rule.replace(min_layer=1, max_layer=num_layers - 1).resolve(num_layers)

        def steps(self, config, num_layers, prompt_tokens):
            return {
                layer: max(prompt_tokens >> (1 + layer // 2), config.window + 1) for layer in range(1, num_layers, 2)
            }

    row = run(tiny(), prompts(90)[0], Halves())[2]
    assert row.layer_tokens == (90, 90, 45, 45, 22, 22) and row.kept_tokens == 11
