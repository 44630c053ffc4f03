"""The decision across layers against the rule, written once more in plain Python for one row at a time."""

import weakref
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placing import here

from flexasl import ASLConfig, LayerSelector, ops
from flexasl.config import SELECT_ON

LAYERS = 7


@dataclass
class Decision:
    """What the rule makes of one row."""

    layer: int | None = None
    settled: bool = False
    kept: list[int] = field(default_factory=list)
    eval_layers: list[int] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    union_size: list[int] = field(default_factory=list)


def places(scores):
    """Rank of each token, 1 = best, the earlier first among equals."""
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    ranks = [0] * len(scores)
    for place, j in enumerate(order):
        ranks[j] = place + 1
    return ranks


def decide(config, scores):
    """The rule for one row: scores [layer][prefix token] → Decision with prompt positions; config is resolved."""
    prefix, decision = len(scores[0]), Decision()
    budget = min(config.token_budget(prefix + config.window) - config.window, prefix)
    ranks = [places(row) for row in scores]
    first, last, seen = config.min_layer, config.max_layer, config.observe_layers
    reference = 0.0
    for layer in range(first, last + 1):
        settled = False
        if first < last:
            observed = ranks[layer - seen + 1 : layer + 1]
            union = [j for j in range(prefix) if min(row[j] for row in observed) <= budget]
            total = Fraction(0)
            for j in union:
                mean = Fraction(sum(row[j] for row in observed), seen)
                total += sum((row[j] - mean) ** 2 for row in observed)
            variance = float(total / (seen * len(union)))
            if layer == first or (config.variance_reference == "peak" and variance > reference):
                reference = variance
            ratio = variance / reference if reference else 0.0
            settled = ratio < config.tau
            decision.eval_layers.append(layer)
            decision.variance.append(variance)
            decision.ratio.append(ratio)
            decision.union_size.append(len(union))
        if settled or (layer == last and config.if_never == "select"):
            best = ranks[layer]
            if config.select_on != "last":
                fade = np.float32(1 if config.select_on == "max" else 0.8)
                join = np.add if config.select_on == "sum" else np.maximum
                counted = np.float32(scores[layer - seen + 1])
                for later in scores[layer - seen + 2 : layer + 1]:
                    counted = join(counted * fade, np.float32(later))
                best = places(counted)
            decision.layer, decision.settled = layer, settled
            decision.kept = [j for j in range(prefix) if best[j] <= budget]
            decision.kept += range(prefix, prefix + config.window)
            break
    return decision


def wanted_layers(config):
    """Layers whose scores an open decision rests on."""
    compares = config.min_layer < config.max_layer
    if not compares and config.if_never == "keep":
        return []
    back = config.observe_layers - 1 if compares or config.select_on != "last" else 0
    return list(range(config.min_layer - back, config.max_layer + 1))


def select(selector, layer, scores):
    selector.observe(layer, scores)
    return selector.select(layer)


def run(config, scores, tokens, rows=None, trim=lambda layer: False):
    """Feeds a selector as a prefill does: scores[row][layer] at the right end of `tokens` columns, junk in padding."""
    lengths = [len(row[0]) + config.window for row in scores]
    selector = LayerSelector(config, lengths, tokens=tokens, rows=rows, device=here())
    made, asked, prefix = {}, [], tokens - config.window
    for layer in range(LAYERS):
        if not selector.needs(layer):
            continue
        asked.append(layer)
        fed = torch.full((len(selector.rows), prefix), 1e9)
        for place, row in enumerate(selector.rows):
            fed[place, prefix - len(scores[row][0]) :] = torch.tensor(scores[row][layer])
        if trim(layer):
            fed = fed[:, prefix - max(len(scores[row][0]) for row in selector.rows) :]
        before = list(selector.rows)
        selections = select(selector, layer, fed)
        assert selector.rows == [row for row in before if row not in {made_.row for made_ in selections}]
        for selection in selections:
            assert selection.row not in made and selection.layer == layer
            made[selection.row] = selection
    assert not any(selector.needs(layer) for layer in range(LAYERS, LAYERS + 3))
    return selector, made, asked


def check_row(config, selector, made, row, scores, tokens):
    want, trace = decide(config, scores[row]), selector.traces[row]
    assert (trace.eval_layers, trace.union_size) == (want.eval_layers, want.union_size)
    assert (trace.variance, trace.variance_ratio) == (want.variance, want.ratio)
    if want.layer is None:
        assert row not in made and row in selector.rows
        return
    assert made[row].layer == want.layer
    assert bool(trace.variance_ratio and trace.variance_ratio[-1] < config.tau) == want.settled
    assert torch.equal(made[row].indices, made[row].keep.nonzero().flatten())
    start = tokens - len(scores[row][0]) - config.window
    assert (made[row].keep.nonzero().flatten() - start).tolist() == want.kept
    assert len(made[row].keep) == tokens


@st.composite
def configs(draw, compares=False):
    """Any resolved settings; with `compares`, those whose variance ratio can differ from 0 and 1."""
    window = draw(st.integers(1, 3))
    observe = draw(st.integers(2 if compares else 1, 4))
    first = draw(st.integers(observe - 1, LAYERS - (2 if compares else 1)))
    return ASLConfig(
        select_tokens=draw(st.integers(window + 1, 12) | st.floats(0.05, 1.0)),
        window=window,
        observe_layers=observe,
        min_layer=first,
        max_layer=draw(st.integers(first + compares, LAYERS - 1)),
        tau=draw(st.sampled_from([0.05, 0.25, 0.5, 0.9, 1.0])),
        variance_reference=draw(st.sampled_from(["initial", "peak"])),
        select_on=draw(st.sampled_from(SELECT_ON)),
        if_never=draw(st.sampled_from(["select", "keep"])),
    )


@st.composite
def stacks(draw, rows):
    """scores[row][layer]: whole numbers with ties; layers near the row's own, so that ranks settle and unsettle."""
    rng, stacks = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), []
    for _ in range(rows):
        prefix, high = draw(st.integers(1, 24) | st.integers(10, 24)), draw(st.sampled_from([3, 10, 1000]))
        base = rng.integers(0, high, prefix)
        noise = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=LAYERS, max_size=LAYERS))
        mixed = [np.where(rng.random(prefix) < part, rng.integers(0, high, prefix), base) for part in noise]
        stacks.append([[float(score) for score in row] for row in mixed])
    return stacks


@given(config=configs(), data=st.data())
def test_every_row_of_a_batch_follows_the_rule_alone(config, data):
    scores = data.draw(stacks(data.draw(st.integers(1, 4))))
    tokens = max(len(row[0]) for row in scores) + config.window + data.draw(st.sampled_from([0, 0, 5]))
    rows = data.draw(st.lists(st.sampled_from(range(len(scores))), min_size=1, unique=True).map(sorted))
    trimmed = data.draw(st.sets(st.integers(0, LAYERS)))
    selector, made, asked = run(config, scores, tokens, rows, trimmed.__contains__)
    for row in rows:
        check_row(config, selector, made, row, scores, tokens)
    assert set(selector.traces) == set(rows)
    until = LAYERS if selector.rows else max((selection.layer for selection in made.values()), default=LAYERS)
    assert asked == [layer for layer in wanted_layers(config) if layer <= until]


@given(config=configs(), data=st.data())
def test_a_batch_decides_what_its_rows_decide_alone(config, data):
    scores = data.draw(stacks(3))
    tokens = max(len(row[0]) for row in scores) + config.window
    batch, made, _ = run(config, scores, tokens)
    for row, own in enumerate(scores):
        length = len(own[0]) + config.window
        solo, alone, _ = run(config, [own], length)
        assert batch.traces[row] == solo.traces[0]
        assert (row in made) == (0 in alone)
        if row in made:
            assert made[row].layer == alone[0].layer
            assert made[row].keep[tokens - length :].tolist() == alone[0].keep.tolist()
            assert not made[row].keep[: tokens - length].any()


@given(config=configs(compares=True), data=st.data())
def test_settled_means_strictly_below_tau(config, data):
    scores = data.draw(stacks(1))
    open_ended = config.replace(tau=1e-300, if_never="keep")
    ratios = [ratio for ratio in decide(open_ended, scores[0]).ratio if 0 < ratio <= 1]
    assume(ratios)
    exact = config.replace(tau=data.draw(st.sampled_from(ratios)))
    tokens = len(scores[0][0]) + config.window
    selector, made, _ = run(exact, scores, tokens)
    check_row(exact, selector, made, 0, scores, tokens)


UP, DOWN = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
TOP_SWAPPED = [1.0, 2.0, 4.0, 3.0]


def rule(**changes):
    """Two prefix tokens and the window of one stay."""
    settings = {"select_tokens": 3, "window": 1, "min_layer": 1, "max_layer": 5, "observe_layers": 2, "tau": 0.5}
    return ASLConfig(**(settings | changes)).resolve(LAYERS)


def test_variance_ratio_of_one_is_not_below_a_tau_of_one():
    selector, made, _ = run(rule(tau=1.0, if_never="keep"), [[UP, DOWN] * 4], 5)
    assert not made
    assert selector.traces[0].variance_ratio == [1.0] * 5


def test_a_peak_reference_waits_for_the_variance_to_fall():
    stack = [[UP, TOP_SWAPPED, DOWN, UP, TOP_SWAPPED, TOP_SWAPPED, UP]]
    selector, made, _ = run(rule(variance_reference="initial"), stack, 5)
    assert selector.traces[0].variance == [0.25, 1.125, 1.25, 0.25, 0.0]
    assert (made[0].layer, selector.traces[0].variance_ratio) == (5, [1.0, 4.5, 5.0, 1.0, 0.0])
    selector, made, _ = run(rule(variance_reference="peak"), stack, 5)
    assert (made[0].layer, selector.traces[0].variance_ratio) == (4, [1.0, 1.0, 1.0, 0.2])


@pytest.mark.parametrize("reference", ["initial", "peak"])
def test_no_variance_at_min_layer_is_settled(reference):
    config = rule(tau=0.01, variance_reference=reference)
    selector, made, _ = run(config, [[UP, UP, DOWN, UP, DOWN, UP, UP]], 5)
    assert (made[0].layer, selector.traces[0].variance_ratio) == (1, [0.0])


def test_ranks_that_never_settle_end_as_if_never_says():
    stack = [[UP, DOWN] * 4]
    made = run(rule(select_on="last", if_never="select"), stack, 5)[1]
    assert (made[0].layer, made[0].keep.tolist()) == (5, [True, True, False, False, True])
    assert not run(rule(if_never="keep"), stack, 5)[1]


def test_selecting_on_the_best_score_looks_back_as_far_as_observe_layers():
    high = [[9.0 if j == layer else float(j == 4) for j in range(5)] for layer in range(LAYERS)]
    config = rule(min_layer=3, max_layer=3, select_on="max")
    made, asked = run(config, [high], 6)[1:]
    assert asked == [2, 3]
    assert made[0].keep.tolist() == [False, False, True, True, False, True]
    made, asked = run(config.replace(select_on="last"), [high], 6)[1:]
    assert asked == [3]
    assert made[0].keep.tolist() == [False, False, False, True, True, True]


def test_a_share_is_taken_of_each_rows_own_length():
    stacks = [[[float(j) for j in range(prefix)]] * LAYERS for prefix in (30, 18, 2)]
    made = run(rule(select_tokens=0.5, window=2), stacks, 40)[1]
    assert [int(made[row].keep.sum()) for row in range(3)] == [16, 10, 3]


def test_no_layer_is_needed_where_nothing_can_come_of_it():
    never = LayerSelector(rule(min_layer=3, max_layer=3, if_never="keep"), [9, 9], device=here())
    no_rows = LayerSelector(rule(), [9, 9], rows=[], device=here())
    assert not any(selector.needs(layer) for selector in (never, no_rows) for layer in range(LAYERS))


def test_prompts_shorter_than_the_window_are_left_alone():
    selector = LayerSelector(rule(select_tokens=9, window=8), [3, 5], rows=[], device=here())
    assert not any(selector.needs(layer) for layer in range(LAYERS))


@pytest.mark.parametrize("select_on", SELECT_ON)
def test_only_the_observed_layers_are_held(select_on, monkeypatch):
    seen = {"scores": [], "ranks": []}

    def token_ranks(scores, valid=None):
        ranks = ops.token_ranks(scores, valid)
        seen["scores"].append(weakref.ref(scores))
        seen["ranks"].append(weakref.ref(ranks))
        return ranks

    monkeypatch.setattr("flexasl.selectors.adaptive.token_ranks", token_ranks)
    prefix, rows, observe = 61, 3, 3
    config = ASLConfig(
        select_tokens=20, window=2, min_layer=2, max_layer=9, observe_layers=observe, tau=1e-9, select_on=select_on
    ).resolve(12)
    selector = LayerSelector(config, [prefix + 2] * rows, device=here())
    most = {"ranks": observe, "scores": 1 if select_on == "last" else observe}
    for layer in range(9):
        assert select(selector, layer, torch.rand(rows, prefix)) == []
        for name, held in (("ranks", selector._ranks), ("scores", selector._scores)):
            assert sum(ref() is not None for ref in seen[name]) == len(held) == min(layer + 1, most[name])
            assert all(tensor.untyped_storage().nbytes() == rows * prefix * 4 for tensor in held)
    del held
    assert len(select(selector, 9, torch.rand(rows, prefix))) == rows
    assert not any(ref() is not None for refs in seen.values() for ref in refs)


def test_a_decided_row_leaves_nothing_behind():
    settles = [UP, TOP_SWAPPED] + [UP] * 5
    config = rule(select_on="max")
    selector, made, _ = run(config, [settles, [UP, DOWN] * 4], 5)
    assert [made[row].layer for row in range(2)] == [3, 5]
    assert selector.rows == [] and not selector._ranks and not selector._scores
    selector = LayerSelector(config, [5, 5], device=here())
    for layer in range(4):
        scores = torch.tensor([settles[layer], [UP, DOWN][layer % 2]])
        select(selector, layer, scores)
    assert selector.rows == [1]
    assert all(held.shape == (1, 4) and held.untyped_storage().nbytes() == 16 for held in selector._ranks)
    assert all(held.shape == (1, 4) and held.untyped_storage().nbytes() == 16 for held in selector._scores)
