"""Each policy against its definition, against its neighbours, and in batches."""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from models import GREEDY, LAYERS, SMALL, STAGED, counting, decoder_layers, left_padded, prompts, recompute, tiny

import flexasl
from flexasl import ASLConfig, ConfigError, policies
from flexasl.config import SETTINGS
from flexasl.integrations.transformers.fingerprint import calibrated_for

FAMILIES = ["llama", "gemma2", "deepseek_v3", "gpt2"]
TWO_PASS = ["asl_two_pass", "gemfilter"]
CLOSE = {"rtol": 0, "atol": 1e-5}


def run(model, ids, policy, config=SMALL, steps=4):
    """Logits [steps, V], cache and report of one prompt [M] and greedy tokens after it."""
    with flexasl.patch(model, counting(policy, config), policy) as patch:
        out = model.generate(ids[None], max_new_tokens=steps, output_logits=True, **GREEDY)
        return torch.cat(out.logits).double(), out.past_key_values.layers, patch.report.rows[0], out.sequences[0]


def positions(layer, prompt):
    """[head][entry] prompt positions in a layer's cache."""
    columns = layer.positions[0].expand(layer.keys.shape[1], -1)
    return [[at for at in head.tolist() if at < prompt] for head in columns]


@pytest.mark.parametrize("kv_budget", [None, 16])
@pytest.mark.parametrize("policy", policies.POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_alone_under_every_policy(family, policy, kv_budget, monkeypatch):
    monkeypatch.setattr("flexasl.rows.GROUP", 100)
    model, rows = tiny(family, torch.float64), prompts(90, 61, 9, 33, seed=1)
    config = counting(policy, STAGED.replace(kv_budget=kv_budget))
    if family == "gemma2" and policy == "pyramid_infer":
        with pytest.raises(ConfigError, match="ranks tokens at every layer, but only layers 1, 3, 5 attend"):
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
    assert len(kept) == counting(policy).select_tokens and row.reread_layers == row.selected_layer + 1
    for layer in layers:
        assert all(set(head) <= set(kept.tolist()) for head in positions(layer, 80))
    at = torch.cat([kept, torch.arange(80, 83)])
    want = model(sequence[at][None], position_ids=at[None]).logits[0, -4:]
    torch.testing.assert_close(logits, want, **CLOSE)


@pytest.mark.parametrize("config", [SMALL, STAGED.replace(stages=())], ids=["variance", "lookup"])
def test_two_passes_select_what_one_pass_selects(config):
    model, ids = tiny("llama", torch.float64), prompts(80)[0]
    one, two = (run(model, ids, policy, config) for policy in ("asl", "asl_two_pass"))
    assert one[2].kept_positions == two[2].kept_positions and one[2].selected_layer == two[2].selected_layer
    assert (one[0][0] - two[0][0]).abs().max() > 1e-3
    assert [layer.keys.shape[2] for layer in one[1]] != [layer.keys.shape[2] for layer in two[1]]


def test_two_passes_pass_over_the_stages_that_calibration_found():
    model = tiny("llama")
    with flexasl.patch(model, STAGED.replace(calibrated_for=calibrated_for(model)), "asl_two_pass") as patch:
        assert patch.config == STAGED.replace(stages=()).resolve(LAYERS)
    with pytest.raises(ConfigError, match=r"stages=.* do not go with policy 'asl_two_pass'"):
        flexasl.patch(model, STAGED, "asl_two_pass")


def test_gemfilter_selects_by_the_last_token_pooled_over_five():
    model, ids = tiny("llama", torch.float64), prompts(80)[0]
    row = run(model, ids, policies.GemFilter(2))[2]
    same = ASLConfig(select_tokens=33, window=1, kernel_size=5)
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
    columns = [layer.positions for layer in layers]
    want = recompute(model, sequence[None, :-1], 0, columns, None, torch.arange(0))
    torch.testing.assert_close(logits, want[0, -4:], **CLOSE)


def test_pyramid_infer_drops_what_the_layer_ranks_last():
    model, ids = tiny("llama", torch.float64), prompts(90)[0]
    with flexasl.patch(model, counting("pyramid_infer"), policies.PyramidInfer(1, 4)):
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


@pytest.mark.parametrize("first", [0, 4, 15])
def test_streaming_keeps_the_first_and_the_last(first):
    model, rows = tiny("llama", torch.float64), prompts(90, 61)
    with flexasl.patch(model, counting("streaming", SMALL.replace(kv_budget=20)), policies.Streaming(first)) as patch:
        layers = model(**left_padded(rows), use_cache=True).past_key_values.layers
    assert [row.kept_tokens for row in patch.report.rows] == [90, 61]
    assert patch.report.rows[0].scored_layers == ()
    for layer in layers:
        for index, length in enumerate((90, 61)):
            first = min(first, 20 - SMALL.window)  # the window stays in any case
            want = [*range(first), *range(length - 20 + first, length)]
            assert (layer.positions[index] - (90 - length)).tolist() == [want] * 2


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        ("asl_two_pass", {"propagate": "mask"}, "propagate='mask' drops no tokens, which policy 'asl_two"),
        ("pyramid_infer", {"propagate": "mask"}, "propagate='mask' drops no tokens, which policy 'pyramid"),
        ("gemfilter", {"later_turns": "prune"}, "later_turns='prune' does not go with policy 'gemfilter'"),
        ("pyramid_kv", {"kv_top_p": 0.5}, "kv_top_p=0.5 sets no budget that could fall with depth"),
        ("streaming", {"kv_top_p": 0.5}, "kv_top_p=0.5 goes by attention, policy 'streaming' by position"),
        (
            "fixed_layer",
            {"max_layer": 1},
            r"max_layer=1 would have no .* 'fixed_layer', .* give FixedLayer\(layer=...\)",
        ),
        ("gemfilter", {"tau": 0.3, "window": 8}, r"tau=0.3 would .* give GemFilter.*; window=8 would have no effect"),
        ("pyramid_infer", {"max_layer": 2}, r"give PyramidInfer\(first=..., last=...\)"),
        ("full", {"kv_budget": 40}, r"kv_budget=40 would .* give policy='snapkv' \(of ASLConfig, it takes kv_dtype\)"),
        ("snapkv", {"propagate": "mask"}, "propagate='mask' would have no effect under policy 'snapkv'"),
        (policies.PyramidInfer(4, 2), {}, "first=4 and last=2 are not layers in order; give 0 to 5"),
    ],
)
def test_refuses_settings_that_do_not_go_together(policy, given, message):
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        flexasl.patch(model, ASLConfig(**given), policy)
    assert not hasattr(model, "flexasl_patch")


BASE = ASLConfig(select_tokens=40)
"""What the other settings are while each is tried."""
GIVEN = {
    "select_tokens": {"select_tokens": 36},
    "kv_budget": {"kv_budget": 36},
    "kv_top_p": {"kv_top_p": 0.3},
    "tau": {"tau": 0.05, "max_layer": 5, "kernel_size": 3, "window": 8, "stages": ()},
    "min_layer": {"min_layer": 4, "tau": 1.0, "observe_layers": 2, "max_layer": 5},
    "min_layer_unasked": {
        **{"min_layer_unasked": 4, "max_layer": 4, "stages": (), "tau": 0.01},
        **{"kernel_size": 3, "pooling": "maxpool", "window": 8},
    },
    "max_layer": {"max_layer": 4, "stages": ()},
    "observe_layers": {"observe_layers": 1, "tau": 0.7},
    "window": {"window": 20},
    "kernel_size": {"kernel_size": 3},
    "pooling": {"pooling": "maxpool", "variance_reference": "initial", "max_layer": 3},
    "score_power": {"score_power": 4.0},
    "variance_reference": {"variance_reference": "initial", "if_never": "select", "tau": 0.95, "max_layer": 4},
    "select_on": {"select_on": "last", "kernel_size": 1},
    "if_never": {"if_never": "keep"},
    "propagate": {"propagate": "mask"},
    "later_turns": {"later_turns": "prune"},
    "settled_by": {"settled_by": "variance", "tau": 0.9, "stages": ()},
    "stages": {"stages": "0.8@1"},
    "score_from": {"score_from": 5, "stages": (), "min_layer": 5, "select_on": "max"},
    "contrast": {"contrast": True, "kernel_size": 1, "settled_by": "variance"},
}
"""A value of each setting, with those in whose company it shows."""


def seen(model, ids, policy, config, question=None):
    """What a policy makes of a prompt [N] and of a turn that follows it: the ran tokens, and every cached entry."""
    with flexasl.patch(model, config, policy, question=question) as patch:
        out = model(ids[None, :100], use_cache=True)
        told = patch.report.rows[0]
        model(ids[None, 100:], past_key_values=out.past_key_values)
    layers = out.past_key_values.layers
    return [
        (told.layer_tokens, told.kept_positions, patch.config.propagate),
        *((layer.positions.tolist(), [str(part.dtype) for part in layer.stored]) for layer in layers),
    ]


@pytest.mark.parametrize("policy", [name for name in policies.POLICIES if name != "fastkv"])
def test_every_setting_counts_or_is_refused(policy):
    model, (ids,) = tiny(), prompts(160, seed=2)
    kind = policies.POLICIES[policy]
    chosen = kind(keep_first=12) if policy == "streaming" else kind()  # with few, only a tight budget feels the window
    assert {*GIVEN, "kv_dtype"} == set(SETTINGS) and "kv_dtype" in kind.takes, "which tests/test_quantizing.py tries"
    for name, given in GIVEN.items():
        company = {other: value for other, value in given.items() if other != name and other in kind.takes}
        before = counting(policy, BASE.replace(**company))
        if name == "stages" and name not in kind.takes:  # which the rule of rank variance refuses as well
            with pytest.raises(ConfigError, match="stages="):
                chosen.check(before.replace(stages=given[name]))
            continue
        after = before.replace(**{name: given[name]})
        if name in kind.takes:
            question = (70, 80) if name == "contrast" else None  # which it counts for
            differs = seen(model, ids, chosen, after, question) != seen(model, ids, chosen, before, question)
            assert differs, name
            continue
        with pytest.raises(ConfigError, match=f"{name}={given[name]!r} "):
            chosen.check(after)
        said_anyway = getattr(chosen.resolve(before, LAYERS), name) == given[name]
        refused = pytest.raises(ConfigError, match=f"{name}={given[name]!r} .*it takes ")
        with contextlib.nullcontext() if said_anyway else refused, flexasl.patch(model, after, chosen):
            pass
        assert not hasattr(model, "flexasl_patch")


def test_the_page_says_which_settings_count():
    page = (Path(__file__).parents[1] / "docs/policies.md").read_text(encoding="utf-8")
    told = {}
    for names, which in re.findall(r"^\| ((?:`\w+`,? ?)+) \| (all.*|`asl`.*) \|$", page, re.MULTILINE):
        listed = set(re.findall(r"`(\w+)`", which.partition(": its")[0]))
        every = set(policies.POLICIES) - {"fastkv"}
        told |= {name: every - listed if which.startswith("all") else listed for name in re.findall(r"`(\w+)`", names)}
    counts = {
        name: {policy for policy, kind in policies.POLICIES.items() if name in kind.takes} - {"fastkv"}
        for name in SETTINGS
    }
    assert told == counts


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_what_a_policy_resolves_it_takes_again(policy):
    chosen = policies.find_policy(policy)
    rule = chosen.resolve(counting(policy), LAYERS)
    assert chosen.resolve(rule, LAYERS) == rule


def _of(kind, **settings):
    return lambda: kind(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_of(policies.PyramidKV, beta=0.5), "beta=0.5 would give the last layer more than the mean"),
        (_of(policies.PyramidKV, beta=float("nan")), "beta=nan is out of range; give a number of at least 1"),
        (_of(policies.PyramidKV, beta="abc"), "beta='abc' is out of range"),
        (_of(policies.Streaming, keep_first=-1), "keep_first=-1 is negative"),
        (_of(policies.Streaming, keep_first=2.5), "keep_first=2.5 is not a whole number; give an int"),
        (_of(policies.Streaming, keep_first=float("nan")), "keep_first=nan is not a whole number"),
        (_of(policies.Streaming, keep_first=True), "keep_first=True is not a whole number"),
        (_of(policies.FixedLayer, depth=99), r"depth=99 is out of range; give a share of the layers, in \[0, 1\]"),
        (_of(policies.FixedLayer, depth=-1), "depth=-1 is out of range"),
        (_of(policies.FixedLayer, depth="abc"), "depth='abc' is out of range"),
        (_of(policies.FixedLayer, layer="abc"), "layer='abc' is out of range; give an int from 0 on, or None"),
        (_of(policies.GemFilter, layer=[3]), r"layer=\[3\] is out of range"),
        (_of(policies.PyramidInfer, first=-1), "first=-1 is too small; give at least 0"),
        (_of(policies.PyramidInfer, last="abc"), "last='abc' is not a whole number; give an int of at least 0"),
    ],
)
def test_refuses_settings_of_policies(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class Own(policies.Policy):
    """Returns what it is told to."""

    name = "own"

    def __init__(self, plan=None, budget=None, rule=None, **attributes):
        self.plan, self.budget, self.made = plan, budget, rule
        vars(self).update(attributes)

    def rule(self, config, num_layers, ranking_layers=None):
        return super().rule(config, num_layers, ranking_layers) if self.made is None else self.made(config, num_layers)

    def selector(self, config, prompts):
        if self.plan is None:
            return super().selector(config, prompts)
        return policies.ScheduledSelector(
            self.plan if callable(self.plan) else lambda tokens: self.plan, config, prompts
        )

    def retention(self, config, num_layers):
        if self.budget is None:
            return super().retention(config, num_layers)
        return policies.top_k(lambda layer, tokens: self.budget)


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        (Own({1: 4}), {}, "policy 'own': plan: tokens after layer 1, window=8 included=4 is too small"),
        (Own({1: 0}), {}, "=0 is too small"),
        (Own({1: -5}), {}, "=-5 is too small"),
        (Own({1: 2.5}), {}, "=2.5 is not a whole number"),
        (Own({6: 20}), {}, "'own': plan: layer=6 is too large; give from 0 to 5"),
        (Own({"1": 20}), {}, "plan: layer='1' is not a whole number"),
        (Own([1]), {}, r"'own': plan returned \[1\]; return how many tokens are kept, by layer, as a dict"),
        (Own(lambda tokens: {1: 20} if tokens > 70 else None), {}, "'own': plan returned None; return how many tokens"),
        (
            Own({1: 20}),
            {"propagate": "mask"},
            "propagate='mask' does not go with policy 'own', whose ScheduledSelector has no mask",
        ),
        (Own({1: 20}), {"later_turns": "prune"}, "later_turns='prune' does not go with policy 'own'"),
        (Own(budget=0), {}, "'own': limit of layer 0, window=8 included=0 is too small"),
        (Own(budget=7), {}, "=7 is too small"),
        (Own(budget=9.5), {}, "=9.5 is not a whole number"),
        (Own(budget=9), {"propagate": "mask"}, "propagate='mask' does not go with policy 'own', which drops cache"),
        (
            Own(budget=9),
            {"kv_top_p": 0.5},
            "kv_top_p=0.5 does not go with policy 'own', whose retention goes by",
        ),
        (Own(rule=lambda config, layers: None), {}, "policy 'own' resolves settings to None; return an ASLConfig"),
        (Own(rule=lambda config, layers: config), {"tau": None}, "policy 'own' resolves settings to tau=None"),
        (
            Own(rule=lambda config, layers: config.resolve(9).replace(max_layer=8)),
            {},
            "policy 'own' resolves settings to max_layer=8, of 6 layers; give layers up to 5",
        ),
        (
            Own(rule=lambda config, layers: config.replace(propagate="gather").resolve(layers)),
            {"propagate": "mask"},
            "policy 'own' makes propagate='gather' of propagate='mask'",
        ),
        (Own(second_pass=True), {"propagate": "mask"}, "propagate='mask' does not go with policy 'own', which reads"),
        (Own(name=None), {}, "has no name"),
    ],
)
def test_what_a_policy_returns_is_checked_before_the_first_layer(policy, given, message):
    model, ran = tiny(), []
    handle = decoder_layers(model)[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ConfigError, match=message), flexasl.patch(model, SMALL.replace(**given), policy):
            model(**left_padded(prompts(90, 61)), use_cache=True)
    finally:
        handle.remove()
    assert not ran and not hasattr(model, "flexasl_patch")


def test_steps_of_ones_own_are_for_layers_that_see_the_whole_prompt():
    model = tiny("gemma2")
    with flexasl.patch(model, SMALL, Own({1: 40, 3: 20})) as patch:
        model(prompts(90)[0][None])
    assert patch.report.rows[0].layer_tokens == (90, 90, 40, 40, 20, 20)
    with (
        flexasl.patch(model, SMALL, Own({2: 40})),
        pytest.raises(
            ConfigError, match=r"drops tokens after layer 2, which does not attend to the whole prompt; .* 1, 3, 5"
        ),
    ):
        model(prompts(90)[0][None])


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("fixed_layer:layer=2", (policies.FixedLayer(2), {})),
        ("fastkv:depth=0.9", (policies.FixedLayer(depth=0.9), {})),
        ("asl:tau=0.3, min_layer=2", ("asl", {"tau": 0.3, "min_layer": 2})),
        ("streaming:keep_first=2,kv_budget=33", (policies.Streaming(2), {"kv_budget": 33})),
        ("snapkv:select_tokens=0.5k,pooling=maxpool", ("snapkv", {"select_tokens": 512, "pooling": "maxpool"})),
        ("paper", ("asl", ASLConfig.paper().to_dict())),
        ("paper:tau=0.5,select_on=max", ("asl", ASLConfig.paper(tau=0.5, select_on="max").to_dict())),
    ],
)
def test_words_are_instances_with_settings(words, same):
    model = tiny()
    policy, settings = same
    with flexasl.patch(model, ASLConfig(**settings), policy) as patch:
        want = patch.config, vars(patch.policy), type(patch.policy)
    with flexasl.patch(model, policy=words) as patch:
        assert (patch.config, vars(patch.policy), type(patch.policy)) == want


def test_words_and_settings_go_together_or_are_refused():
    chosen, config = policies.choose("asl:tau=0.3", ASLConfig(tau=0.3, select_tokens=99))
    assert (chosen.name, config) == ("asl", ASLConfig(tau=0.3, select_tokens=99))
    assert policies.choose("paper", ASLConfig(kernel_size=3, tau=0.2))[1] == ASLConfig.paper(kernel_size=3, tau=0.2)
    for policy, config, message in (
        ("asl:tau=0.3", ASLConfig(tau=0.2), "tau=0.2 contradicts policy='asl:tau=0.3'; give one of them"),
        ("best", None, "policy='best' is not known; give one of asl, .*, full, paper$"),
        (
            "asl:layer=3",
            None,
            "policy='asl:layer=3': layer is not a setting of asl; its settings are select_tokens, kv_",
        ),
        ("asl:tau", None, "policy='asl:tau': 'tau' is not a setting; give name=value"),
        ("asl:", None, "policy='asl:': '' is not a setting"),
        ("asl:tau=0.1,tau=0.2", None, "policy='asl:tau=0.1,tau=0.2' gives tau twice"),
        ("asl:tau=2", None, "tau=2 is out of range"),
        ("snapkv:tau=0.3", None, "tau=0.3 would have no effect under policy 'snapkv'"),
        ("fixed_layer:layer=abc", None, "layer='abc' is out of range"),
        (3, None, "policy=3 is an int; give a name such as 'asl', or an instance of a policy"),
        (policies.ASL, None, "is a type; give a name such as 'asl', or an instance"),
        (None, None, "policy=None is None; give a name"),
    ):
        with pytest.raises(flexasl.FlexASLError, match=message):
            policies.choose(policy, config)
    with pytest.raises(flexasl.FlexASLError, match="comes with settings of ASLConfig; give it to flexasl"):
        policies.find_policy("asl:tau=0.3")


def documented(heading):
    """What the code under a heading of docs/own-policy.md defines."""
    page = (Path(__file__).parents[1] / "docs" / "own-policy.md").read_text()
    code = page.partition(f"## {heading}")[2].partition("```python\n")[2].partition("```")[0]
    names = {}
    exec("\n".join(line for line in code.splitlines() if not line.startswith("flexasl.patch(")), names)
    return names


def test_a_score_of_ones_own():
    policy = documented("Another score")["KeyNorm"]()
    model, rows = tiny("llama", torch.float64), prompts(90, 61)
    config = SMALL.replace(kv_budget=20, kernel_size=None, pooling=None, min_layer=1, max_layer=1, observe_layers=1)
    keys = []
    handle = decoder_layers(model)[1].self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[2]))
    with flexasl.patch(
        model, config.replace(min_layer=1, max_layer=1, observe_layers=1), policy, foreign_hooks="packed"
    ):
        cache = model(**left_padded(rows), use_cache=True).past_key_values
    handle.remove()
    report = model_report(model, config, policy, rows)
    norms = torch.cat(keys, 1)[0].unflatten(-1, (2, -1)).norm(dim=-1)  # which rotary positions leave as they are
    for row, (start, length) in enumerate(((0, 90), (90, 61))):
        best = 1 / norms[start : start + length - SMALL.window]
        chosen = best.sum(-1).topk(report.rows[row].kept_tokens - SMALL.window).indices.sort().values
        assert report.rows[row].kept_positions[: len(chosen)] == tuple(chosen.tolist())
        for head in range(2):
            held = best[:, head].topk(20 - SMALL.window).indices.sort().values + 90 - length
            assert torch.equal(cache.layers[1].positions[row, head][: len(held)], held)


def model_report(model, config, policy, rows):
    with flexasl.patch(model, config, policy) as patch:
        model(**left_padded(rows), use_cache=True)
    return patch.report


def test_a_selector_of_ones_own_that_selects_twice():
    policy, model, rows = documented("Another selector")["TwoCuts"](), tiny("llama", torch.float64), prompts(90, 20, 61)
    config = counting(policy)
    report = model_report(model, config, policy, rows)
    for row, length in zip(report.rows, (90, 20, 61), strict=True):
        alone = model_report(model, config, policy, prompts(90, 20, 61)[[90, 20, 61].index(length)][None].unbind())
        assert (alone.rows[0].selections, alone.rows[0].kept_positions) == (row.selections, row.kept_positions)
        if length == 20:
            assert row.selections == () and row.selected_layer is None
            continue
        first, second = row.selections
        assert (first.layer, second.layer, row.selected_layer) == (1, 3, 3)
        assert length > first.kept_tokens > second.kept_tokens == row.kept_tokens == 24
        assert row.layer_tokens == (length, length, *[first.kept_tokens] * 2, 24, 24)
        assert row.reason == "the tokens with 95 % of the scores, then the budget"
    assert flexasl.Report.from_dict(report.to_dict()) == report
    with pytest.raises(ConfigError, match="propagate='mask' does not go with policy 'two_cuts', whose MassThenBudget"):
        flexasl.policies.contract.selector_of(policy, config.replace(propagate="mask"), a_prompt(90))


def a_prompt(tokens):
    return policies.Prompts([tokens], [0], tokens, 6, None, torch.device("cpu"))


class Told(policies.Selector):
    """Selects what it is told to, at layer 1."""

    def __init__(self, prompts, selections):
        self.rows, self.first_layer, self.selections = list(prompts.rows), 1, selections

    def needs(self, layer):
        return layer == 1

    def select(self, layer):
        return [policies.Selection(row, layer, keep, count) for row, keep, count in self.selections]


def kept(tokens, *places):
    return torch.zeros(tokens, dtype=torch.bool).index_fill(0, torch.tensor([*places, *range(-8, 0)]) % tokens, True)


@pytest.mark.parametrize(
    ("selections", "message"),
    [
        ([(0, kept(90, 1), 9), (0, kept(90, 1), 9)], "row 0 is selected from twice at layer 1; give one selection"),
        ([(2, kept(90, 1), 9)], "row=2 is too large; give from 0 to 1"),
        ([(0, kept(90, 1), 7)], "count of row 0, window=8 included=7 is too small; give from 8 to 90"),
        ([(1, kept(61, 1), 62)], "count of row 1, window=8 included=62 is too large; give from 8 to 61"),
        ([(1, kept(60, 1), 9)], r"keep of row 1 is torch.bool \[60\] on cpu; give bool \[61\]"),
        ([(1, kept(61, 1).int(), 9)], r"keep of row 1 is torch.int32 \[61\] on cpu; give bool \[61\]"),
        ([(1, kept(61, 1), 10)], "keep of row 1 is not 10 tokens with the last 8 among them"),
        ([(1, kept(61, 1, 2) & ~kept(61), 9)], "keep of row 1 is not 9 tokens with the last 8 among them"),
        ([(1, [True] * 61, 61)], r"keep of row 1 is a list; give bool \[61\]"),
    ],
)
def test_selections_are_checked(selections, message):
    refused_while_reading(Selecting(selections), f"policy 'own': selection: {message}")


class Selecting(policies.ASL):
    """Selects what it is told to by a selector with these attributes."""

    name = "own"

    def __init__(self, selections=(), select=None, **attributes):
        self.selections, self.select, self.attributes = selections, select, attributes

    def selector(self, config, prompts):
        made = Told(prompts, self.selections)
        if self.select is not None:
            made.select = self.select
        vars(made).update(self.attributes)
        return made


def refused_while_reading(policy, message, config=SMALL):
    """The model is as it was after the error."""
    model, batch = tiny(), left_padded(prompts(90, 61))
    before = model(**batch).logits
    with flexasl.patch(model, config, policy), pytest.raises(ConfigError, match=message):
        model(**batch)
    assert torch.equal(model(**batch).logits, before)


def test_selections_of_another_layer_or_type_are_refused():
    one = policies.Selection(0, 1, kept(90, 1), 9)
    for policy, message in (
        (Selecting(select=lambda layer: None), "selection is None; return a list of Selection"),
        (Selecting(select=lambda layer: (one for _ in "a")), "selection is a generator; return a list"),
        (Selecting(select=lambda layer: [(0, 9)]), "selection is a tuple; return a list of Selection"),
        (Selecting(select=lambda layer: [dataclasses.replace(one, layer=3)]), "layer=3 is given after layer 1"),
        (Selecting([(0, kept(90, 1), 9)], first_layer=None), "after layer 1, with first_layer=None; give the earliest"),
        (Selecting([(0, kept(90, 1), 9)], first_layer=2), "after layer 1, with first_layer=2; give the earliest"),
        (Selecting(rows=[1, 0]), r"policy 'own', whose Told has rows=\[1, 0\]; give some of \[0, 1\], ascending"),
        (Selecting(rows=[0, 2]), r"rows=\[0, 2\]; give some of"),
        (Selecting(rows=None), "rows=None; give some of"),
        (Selecting(reason=lambda row, selection: None), "policy 'own': reason is None; give a text"),
    ):
        refused_while_reading(policy, message)
    for change, message in (
        ({"propagate": "mask"}, "propagate='mask' does not go with policy 'own', whose Told has no mask"),
        ({"later_turns": "prune"}, "later_turns='prune' does not go with policy 'own', whose Told selects several"),
    ):
        refused_while_reading(Selecting(once=False), message, SMALL.replace(**change))
    refused_while_reading(Selecting(once=True), "whose Told has no mask", SMALL.replace(propagate="mask"))


@pytest.mark.parametrize(
    ("score", "given"),
    [
        (lambda scores: None, "None"),
        (lambda scores: scores.tolist(), "a list"),
        (lambda scores: scores[..., 1:], r"torch.float32 \[1, 2, 81\] on cpu"),
        (lambda scores: scores[:, :1], r"torch.float32 \[1, 1, 82\] on cpu"),
        (lambda scores: scores[0], r"torch.float32 \[2, 82\] on cpu"),
        (lambda scores: scores.long(), r"torch.int64 \[1, 2, 82\] on cpu"),
        (lambda scores: scores.to("meta"), r"torch.float32 \[1, 2, 82\] on meta"),
    ],
)
def test_scores_are_checked(score, given):
    policy = Own(score=lambda seen: score(seen.window_scores()))
    refused_while_reading(policy, rf"policy 'own': score is {given}; return float32 \[1, 2, 82\]")


def test_scores_are_numbers_and_methods():
    refused_while_reading(Own(score=lambda seen: seen.window_scores() / 0 * 0), "'own': score has NaN; return numbers")
    for name in ("score", "scoring_tokens"):
        with pytest.raises(ConfigError, match=f"policy 'own' has {name}=3; make it a method"):
            flexasl.patch(tiny(), SMALL, Own(**{name: 3}))


def test_wide_and_narrow_scores_rank_alike():
    model, rows = tiny(), prompts(90, 61)
    made = [
        model_report(model, SMALL, Own(score=lambda seen, dtype=dtype: seen.window_scores().to(dtype)), rows)
        for dtype in (torch.float32, torch.float64)
    ]
    assert made[0].rows == made[1].rows


@pytest.mark.parametrize(
    ("places", "given"),
    [
        ([], r"\[\]"),
        ([90], r"\[90\]"),
        ([-1, 3], r"\[-1, 3\]"),
        ([2, 2], r"\[2, 2\]"),
        ([5, 2], r"\[5, 2\]"),
        ([[1, 2]], r"\[\[1, 2\]\]"),
        ([1.0], r"torch.float32 \[1\] on cpu"),
    ],
)
def test_scoring_tokens_are_checked(places, given):
    dtype = torch.float32 if places == [1.0] else torch.int64
    policy = Own(scoring_tokens=lambda rows, config: [torch.tensor(places, dtype=dtype)] * len(rows.lengths))
    refused_while_reading(
        policy, rf"policy 'own': scoring_tokens of row 0 is {given}; return int64 places from 0 to 89"
    )


def test_scoring_tokens_are_one_tensor_a_row():
    for made, given in (([], r"\[\]"), (None, "None"), ([torch.tensor([1])] * 3, r"\[tensor\(.*")):
        policy = Own(scoring_tokens=lambda rows, config, made=made: made)
        refused_while_reading(policy, f"'own': scoring_tokens is {given}; return a tensor for each row")


class Keeping(policies.ASL):
    """Keeps the last 20 entries, or what `change` makes of that."""

    name = "own"

    def __init__(self, change, exact=True):
        self.change, self.exact = change, exact

    def retention(self, config, num_layers):
        def keep(seen, limits, window, rows):
            made = torch.arange(rows.width) >= rows.width - limits[:, None]
            return self.change(made[:, None].repeat(1, 2, 1))

        return policies.Retention(lambda layer, tokens: 20, keep, exact=self.exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keep: None, r"is None; return bool \[2, 2, 90\]"),
        (lambda keep: keep.int(), r"is torch.int32 \[2, 2, 90\] on cpu; return bool"),
        (lambda keep: keep[..., 1:], r"is torch.bool \[2, 2, 89\] on cpu; return bool"),
        (lambda keep: keep[:1], r"is torch.bool \[1, 2, 90\] on cpu; return bool"),
        (lambda keep: keep[:, 0], r"is torch.bool \[2, 90\] on cpu; return bool"),
        (lambda keep: torch.ones_like(keep), "is not as many entries as its limit with the last 8 among them"),
        (lambda keep: keep & keep.roll(-1, -1), "is not as many entries as its limit"),
        (lambda keep: keep.roll(-1, -1), "is not as many entries as its limit"),
        (lambda keep: keep.roll(-30, -1), "is not as many entries as its limit"),
    ],
)
def test_kept_entries_are_checked(change, message):
    refused_while_reading(Keeping(change), f"policy 'own': keep of its retention {message}")


def test_retentions_are_checked():
    refused_while_reading(Keeping(lambda keep: keep.roll(-1, -1), exact=False), "is not entries with the last 8 among")
    model, batch = tiny(), left_padded(prompts(90, 61))
    with flexasl.patch(model, SMALL, Keeping(lambda keep: keep[:, :1])):  # one head stands for all
        cache = model(**batch, use_cache=True).past_key_values
    assert (cache.layers[0].positions[..., -20:] == torch.arange(70, 90)).all() and cache.layers[0].keys.shape[2] == 20
    for given, message in (
        ({"goes_by": "score"}, "goes_by='score' is not known; give 'nothing' or 'scores' or 'attention'"),
        ({"limit": 20}, "limit=20 is an int; give a function"),
        ({"keep": "all"}, "keep='all' is a str; give a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            policies.Retention(**given)
    no_keep = Own()
    no_keep.retention = lambda config, layers: policies.Retention(lambda layer, tokens: 20)
    refused_while_reading(no_keep, "policy 'own' has a retention with limits and without keep; give it keep")


def test_other_tokens_can_score():
    """As docs/own-policy.md shows it; tokens are ranked by what these queries attend to."""
    names = documented("Other queries")
    policy = next(kind for kind in names.values() if isinstance(kind, type) and kind.__module__ != "flexasl.policies")()
    model, rows = tiny("llama", torch.float64), prompts(90, 20, 61)
    config = counting(policy)
    report = model_report(model, config, policy, rows)
    usual = model_report(model, config, "asl", rows)
    assert [row.kept_tokens for row in report.rows] == [24, 20, 24]
    assert report.rows[0].kept_positions != usual.rows[0].kept_positions
    for row, own in zip(report.rows, rows, strict=True):
        alone = model_report(model, config, policy, [own]).rows[0]
        assert (alone.selections, alone.kept_positions) == (row.selections, row.kept_positions)


class EachRowItsOwn(policies.Selector):
    """Selects three times in rows of an even length, twice in others, at other layers, the best by score."""

    def __init__(self, config, prompts):
        self.rows, self.window = list(prompts.rows), config.window
        self.plans, self.left = {}, {row: prompts.lengths[row] for row in self.rows}
        layers = prompts.ranking_layers or range(prompts.num_layers)
        for row, tokens in self.left.items():
            counts = [max(tokens - drops, config.token_budget(tokens)) for drops in (9, 20, tokens)][tokens % 2 :]
            self.plans[row] = dict(zip(layers[tokens % 2 :], counts))
        self.first_layer = min((layer for plan in self.plans.values() for layer in plan), default=None)

    def needs(self, layer):
        return any(layer in plan for plan in self.plans.values())

    def observe(self, layer, scores):
        self.scores = dict(zip(self.rows, scores))

    def select(self, layer):
        return [self.best(row, layer) for row in self.rows if layer in self.plans[row]]

    def best(self, row, layer):
        scores, count = self.scores[row][self.window - self.left[row] :], self.plans[row][layer]
        keep = torch.zeros(self.left[row], dtype=torch.bool)
        keep[scores.topk(count - self.window).indices] = keep[-self.window :] = True
        self.left[row] = count
        return policies.Selection(row, layer, keep, count)


class ManyCuts(policies.Policy):
    name = "many_cuts"
    takes = policies.CACHE | policies.SCORES | {"select_tokens"}
    fixes = MappingProxyType({"select_on": "last", "observe_layers": 1, "if_never": "select"})

    def selector(self, config, prompts):
        return EachRowItsOwn(config, prompts)


class NormsAndFirst(policies.ASL):
    """A score of its own for its cache; later turns are ranked by how their first tokens attend."""

    name = "norms_and_first"

    def score(self, seen):
        scores = seen.window_scores()
        return scores + 1 / seen.key[:, :, : scores.shape[2]].float().norm(dim=-1) / 100

    def scoring_tokens(self, rows, config):
        return [torch.arange(3 + length % 2) for length in rows.lengths]


@pytest.mark.parametrize("cache", [{}, {"kv_budget": 16}, {"kv_top_p": 0.6}], ids=str)
@pytest.mark.parametrize(
    "policy", [ManyCuts(), NormsAndFirst(), Keeping(lambda keep: keep[:, :1])], ids=["cuts", "score", "keep"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_row_is_alone_under_policies_of_ones_own(family, policy, cache, monkeypatch):
    monkeypatch.setattr("flexasl.rows.GROUP", 100)
    if cache and isinstance(policy, Keeping):
        return  # it has a retention of its own
    model, rows = tiny(family, torch.float64), prompts(90, 61, 9, 33, seed=1)
    with flexasl.patch(model, counting(policy, SMALL.replace(**cache)), policy) as patch:
        out = model.generate(**left_padded(rows), max_new_tokens=4, output_logits=True, **GREEDY)
        together, logits = patch.report, torch.stack(out.logits, 1)
        for index, ids in enumerate(rows):
            solo = model.generate(ids[None], max_new_tokens=4, output_logits=True, **GREEDY)
            mine, its = together.rows[index], patch.report.rows[0]
            assert (mine.kept_positions, mine.layer_tokens, mine.selections) == (
                its.kept_positions,
                its.layer_tokens,
                its.selections,
            )
            torch.testing.assert_close(logits[index], torch.stack(solo.logits, 1)[0], **CLOSE)


def test_many_cuts_equal_recompute():
    model, ids = tiny("llama", torch.float64), prompts(90)[0]
    logits, layers, row, sequence = run(model, ids, ManyCuts())
    assert [(one.layer, one.kept_tokens) for one in row.selections] == [(0, 81), (1, 70), (2, 24)]
    assert row.layer_tokens == (90, 81, 70, 24, 24, 24)
    want = recompute(model, sequence[None, :-1], 0, [layer.positions for layer in layers], None, torch.arange(0))
    torch.testing.assert_close(logits, want[0, -4:], **CLOSE)


@pytest.mark.parametrize("cache", [{}, {"kv_budget": 16}, {"kv_top_p": 0.6}], ids=str)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_later_turns_with_padding_between_are_alone_under_a_score_of_ones_own(family, cache):
    model, policy = tiny(family, torch.float64), NormsAndFirst()
    turns = [prompts(90, 20, 61, seed=1), prompts(50, 33, 40, seed=2), prompts(1, 1, 1, seed=3)]
    with flexasl.patch(model, counting(policy, SMALL.replace(later_turns="prune", **cache)), policy) as patch:
        made = take_turns(model, patch, turns)
        for row in range(3):
            alone = take_turns(model, patch, [[turn[row]] for turn in turns])
            for (logits, told), (its, report) in zip(made, alone, strict=True):
                torch.testing.assert_close(logits[row], its[0], **CLOSE)
                mine, other = told.rows[row], report.rows[0]
                assert (mine.selections, mine.kept_positions) == (other.selections, other.kept_positions)
    assert [row.kept_tokens for row in made[1][1].rows] == [24] * 3


def take_turns(model, patch, turns):
    """Last logits and report of each turn."""
    cache, mask, made = None, torch.zeros(len(turns[0]), 0, dtype=torch.int64), []
    for turn in turns:
        batch = left_padded(turn)
        mask = torch.cat([mask, batch["attention_mask"]], 1)
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, -batch["input_ids"].shape[1] :]
        given = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": at}
        out = model(**given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        made.append((out.logits[:, -1], patch.report))
    return made


def test_scoring_tokens_are_the_same_where_tokens_are_masked_out():
    model, rows, policy = tiny("llama", torch.float64), prompts(90, 20, 61), NormsAndFirst()
    dropped, masked = (
        model_report(model, counting(policy, SMALL.replace(propagate=way)), policy, rows) for way in ("gather", "mask")
    )
    for one, other in zip(dropped.rows, masked.rows, strict=True):
        assert (one.selections, one.kept_positions) == (other.selections, other.kept_positions)


class Naming(policies.ASL):
    """Names these of each row's tokens, from its end."""

    name = "asl"

    def __init__(self, *places):
        self.places = places

    def scoring_tokens(self, rows, config):
        return [(torch.tensor(self.places) + length).clamp(min=0).unique() for length in rows.lengths]


@pytest.mark.parametrize("cache", [{}, {"kv_budget": 16}, {"kv_top_p": 0.6}], ids=str)
def test_who_names_the_window_gets_what_the_window_gets(cache):
    model = tiny("llama", torch.float64)
    turns = [prompts(90, 30, 61, seed=1), prompts(50, 33, 40, seed=2)]
    config, made = SMALL.replace(later_turns="prune", kernel_size=1, **cache), []
    for policy in (policies.ASL(), Naming(*range(-8, 0)), Naming(-25, -24, -23)):
        with flexasl.patch(model, config, policy) as patch:
            made.append(take_turns(model, patch, turns))
    for (logits, told), (same, its), (_, another) in zip(*made, strict=True):
        torch.testing.assert_close(logits, same, **CLOSE)
        rows = [[(row.selections, row.kept_positions) for row in report.rows] for report in (told, its, another)]
        assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("places", [range(-8, 0), (-1,), (-30, -29, -28)])
def test_shares_of_attention_are_whole_however_many_tokens_score(places):
    shares = []

    class Seeing(Naming):
        def retention(self, config, num_layers):
            def keep(seen, limits, window, rows):
                shares.append(seen.sum(-1))
                return torch.ones(seen.shape, dtype=torch.bool)

            return policies.Retention(lambda layer, tokens: 20, keep, "attention", exact=False)

    model_report(tiny("deepseek_v3"), SMALL, Seeing(*places), prompts(90, 61))
    assert shares and all((share - 1).abs().max() < 1e-5 for share in shares)
