"""Selection in stages against its rule, written once more in plain Python for one row at a time."""

import re
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placing import here

from flexasl import ASLConfig, ConfigError, stages
from flexasl.config import SELECT_ON, SETTLED_BY
from flexasl.replaying import replay_scores
from flexasl.selectors import LayerSelector, StagedSelector, staged
from flexasl.stages import Stage

LAYERS = 7
INF = float("inf")


def combine(before, scores, select_on):
    if before is None or select_on == "last":
        return scores
    fade = np.float32(1 if select_on == "max" else 0.8)
    return before * fade + scores if select_on == "sum" else np.maximum(before * fade, scores)


def budgets(config, length, asked=True):
    """Tokens that go on from each stage, the final one last."""
    final = min(config.token_budget(length), length)
    counts = [length]
    for stage in config.stages:
        wanted = stage.tokens
        if not isinstance(wanted, int):
            wanted = max(int(wanted * length), int(1.5 * final))
        if not asked and config.min_layer_unasked > config.min_layer:
            wanted = max(wanted, length // 2)
        counts.append(min(counts[-1], max(wanted, final)))
    return [*counts[1:], final]


def decide(config, scores, counting, near, asked):
    """The rule for one row: scores [layer][prefix token] → what was selected, as (layer, prompt positions), and the
    highest score of a far token by layer."""
    prefix, window = len(scores[0]), config.window
    counts, stages = budgets(config, prefix + window, asked), [*config.stages, config]
    firsts = [stage.min_layer for stage in config.stages] + [config.min_layer if asked else config.min_layer_unasked]
    phrase = config.pooling == "phrase" and config.kernel_size > 1
    back = near + config.kernel_size // 2 + (3 if phrase else 0)
    on = back + (2 * config.kernel_size if phrase else 0)
    marked = [-1, *np.flatnonzero(np.isinf(scores[0])), prefix]
    far = {j for j in range(prefix) if all(j - at > on or at - j > back for at in marked)}
    left, best, made, seen = list(range(prefix)), None, [], {}
    last = len(stages) - 1

    def coming(at, left):
        return next((one for one in range(at, last) if counts[last] < counts[one] < left), max(at, last))

    at = coming(0, prefix + window)
    for layer in counting:
        if at == len(stages):
            break
        own = np.where(np.isinf(scores[layer]), 0, scores[layer]).astype(np.float32)
        best = combine(best, own, config.select_on)
        forced = set(np.flatnonzero(np.isinf(scores[layer])))
        seen[layer] = max((float(best[j]) for j in left if j in far and j not in forced), default=0.0)
        selects = config.if_never == "select"
        if selects and layer == config.max_layer:
            at = last
        while not selects and at < last and layer > stages[at].max_layer:
            at = coming(at + 1, counts[at] + 1)
        settled = layer >= firsts[at] and seen[layer] >= np.float32(stages[at].tau)
        if settled or (selects and layer >= stages[at].max_layer):
            order = sorted(left, key=lambda j: (j not in forced, -best[j], j))
            left = sorted(order[: counts[at] - window])
            made.append((layer, [*left, *range(prefix, prefix + window)]))
            at = coming(at + 1, counts[at])
    return made, seen


@st.composite
def configs(draw):
    """Any resolved settings of the rule, and the layers that count."""
    layers = draw(st.just(list(range(LAYERS))) | st.sets(st.integers(0, LAYERS - 1), min_size=2).map(sorted))
    window, share = draw(st.integers(1, 3)), st.floats(0.1, 1.0)
    taus = st.sampled_from([None, 0.1, 0.4, 0.5, 0.7, 0.9, 1.0])
    stages = []
    for _ in range(draw(st.integers(0, 3))):
        ends = sorted(draw(st.sampled_from(layers)) for _ in range(2))
        first, last = (end if draw(st.booleans()) else None for end in ends)
        stages.append(Stage(tokens=draw(share | st.integers(2, 30)), tau=draw(taus), min_layer=first, max_layer=last))
    first, last = sorted(draw(st.sampled_from(layers)) for _ in range(2))
    assume(all(stage.min_layer is None or stage.min_layer <= last for stage in stages))
    config = ASLConfig(
        settled_by="lookup",
        select_tokens=draw(st.integers(window + 1, 12) | st.floats(0.05, 1.0)),
        window=window,
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        pooling=draw(st.sampled_from(["maxpool", "phrase"])),
        stages=stages,
        min_layer=draw(st.sampled_from([first, None])),
        min_layer_unasked=draw(st.sampled_from([None, last])),
        max_layer=last,
        score_from=draw(st.sampled_from([None, 0])),
        tau=draw(taus),
        select_on=draw(st.sampled_from(SELECT_ON)),
        if_never=draw(st.sampled_from(["select", "keep"])),
    ).resolve(LAYERS, layers)
    opens = min(stage.min_layer for stage in (*config.stages, config))
    since = opens if config.select_on == "last" else config.score_from
    return config, layers, [layer for layer in layers if since <= layer <= config.max_layer]


@st.composite
def stacks(draw, rows):
    """scores[row] [layer, prefix token] in tenths, with ties, and some tokens that are kept in any case."""
    rng, made = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), []
    for _ in range(rows):
        prefix = draw(st.integers(1, 30))
        high = np.array(draw(st.lists(st.integers(1, 10), min_size=LAYERS, max_size=LAYERS)))
        scores = (rng.integers(0, high[:, None] + 1, (LAYERS, prefix)) / 10).astype(np.float32)
        scores[:, rng.permutation(prefix)[: draw(st.integers(0, 3))]] = INF
        made.append(scores)
    return made


def run(config, layers, scores, tokens, rows, known, masks=False):
    """Feeds a selector as a prefill does: each row's tokens that are left at the right end, junk in padding. Gives what
    was selected by row, as `decide` does, and the layers that were needed."""
    lengths = [row.shape[1] + config.window for row in scores]
    selector = StagedSelector(
        config, lengths, tokens=tokens, rows=rows, ranking_layers=layers, asked=known, device=here()
    )
    left, made, asked = {row: np.arange(lengths[row]) for row in rows}, {row: [] for row in rows}, []
    for layer in layers:
        if not selector.needs(layer):
            continue
        asked.append(layer)
        fed = torch.full((len(selector.rows), tokens - config.window), 1e9)
        for place, row in enumerate(selector.rows):
            own = left[row][: -config.window]
            fed[place, fed.shape[1] - len(own) :] = torch.tensor(scores[row][layer, own])
        selector.observe(layer, fed)
        if masks:
            selects, keep = selector.mask(layer)
            found = [(row, keep[place]) for place, row in enumerate(selector.rows) if selects[place]]
        else:
            found = [(made_.row, made_.keep) for made_ in selector.select(layer)]
        for row, keep in found:
            assert len(keep) == tokens and not keep[: tokens - len(left[row])].any(), "padding is not kept"
            left[row] = left[row][keep[tokens - len(left[row]) :].tolist()]
            made[row].append((layer, left[row].tolist()))
    return selector, made, asked


@given(case=configs(), data=st.data())
def test_every_row_of_a_batch_follows_the_rule_alone(case, data):
    config, layers, counting = case
    scores = data.draw(stacks(data.draw(st.integers(1, 4))))
    tokens = max(row.shape[1] for row in scores) + config.window + data.draw(st.sampled_from([0, 0, 5]))
    rows = data.draw(st.lists(st.sampled_from(range(len(scores))), min_size=1, unique=True).map(sorted))
    near = data.draw(st.sampled_from([0, 2, 5]))
    known = [data.draw(st.booleans()) for _ in scores]
    with mock.patch.object(staged, "NEAR", near), mock.patch.object(stages, "PATIENCE", 1.0):
        selector, made, asked = run(config, layers, scores, tokens, rows, known)
        masking, masked, _ = run(config, layers, scores, tokens, rows, known, masks=True)
        replays = {row: replay_scores(torch.tensor(scores[row]), config, ranking_layers=layers) for row in rows}
    assert made == masked
    assert set(selector.traces) == set(masking.traces) == set(rows)
    latest = 0
    for row in rows:
        want, seen = decide(config, scores[row], counting, near, known[row])
        assert made[row] == want
        for one, other in pairwise(want):
            assert set(other[1]) <= set(one[1]) and other[0] > one[0]
        trace = selector.traces[row]
        assert dict(zip(trace.eval_layers, trace.lookup, strict=True)) == seen
        latest = max(latest, max(seen))
        if known[row]:  # scores alone tell no question
            continue
        replayed = replays[row]
        assert replayed.selections == [(layer, len(kept)) for layer, kept in want]
        assert (None if replayed.selected is None else replayed.selected.tolist()) == (want[-1][1] if want else None)
        assert dict(zip(replayed.eval_layers, replayed.lookup, strict=True)) == seen
    assert asked == [layer for layer in counting if layer <= latest]


@pytest.mark.parametrize(("pooling", "on", "back"), [("maxpool", 1, 1), ("phrase", 10, 4)])
def test_a_look_up_counts_from_tau_on_and_far_from_what_is_kept_anyway(monkeypatch, pooling, on, back):
    settings = {"select_tokens": 5, "window": 1, "kernel_size": 3, "min_layer": 1, "max_layer": 5, "stages": ()}
    settings |= {"settled_by": "lookup", "tau": 0.5, "pooling": pooling}
    monkeypatch.setattr(stages, "PATIENCE", 1.0)
    config = ASLConfig(**settings).resolve(LAYERS)
    first, last = staged.NEAR + on, 98 - staged.NEAR - back
    for token, weight, layer in (
        (first, 0.5, 1),
        (first, 0.49, 5),
        (first - 1, 0.5, 5),
        (last + 1, 0.5, 5),
        (last, 0.5, 1),
    ):
        scores = torch.zeros(1, 99)
        scores[0, token] = weight
        selector = StagedSelector(config, [100], device=here())
        made = []
        for at in range(LAYERS):
            if selector.needs(at):
                selector.observe(at, scores)
                made += selector.select(at)
        assert [(one.layer, one.count) for one in made] == [(layer, 5)], (token, weight)
        assert made[0].keep.nonzero().flatten().tolist() == [0, 1, 2, token, 99]
        reason = selector.reason(0, made[0])
        wanted = "the question found a far token: score 0.50" if layer == 1 else "no far token scored enough"
        assert wanted in reason


def test_the_reason_names_the_stage_that_selected():
    """Also of two that keep as many tokens, the first of which found nothing in its range."""
    settings = {"select_tokens": 5, "window": 1, "kernel_size": 1, "if_never": "keep"}
    stages = [Stage(tokens=9, tau=tau, min_layer=layer, max_layer=layer) for tau, layer in ((0.9, 1), (0.3, 2))]
    config = ASLConfig(**settings, stages=stages, tau=0.9, min_layer=4, max_layer=5).resolve(LAYERS)
    scores = torch.zeros(1, 99)
    scores[0, 50] = 0.5
    selector, made = StagedSelector(config, [100], device=here()), []
    for layer in range(LAYERS):
        if selector.needs(layer):
            selector.observe(layer, scores)
            made += selector.select(layer)
    assert [(one.layer, one.count) for one in made] == [(2, 9)]
    assert selector.reason(0, made[0]).endswith("the question found a far token: score 0.50, threshold 0.30")
    selector.asked = [False]
    assert selector.reason(0, made[0]).startswith("the last token found a far token: score 0.50")


def test_a_layer_that_does_not_see_the_whole_prompt_is_refused():
    config = ASLConfig(settled_by="lookup", min_layer=2, max_layer=4, stages="0.5@1").resolve(LAYERS)
    with pytest.raises(ConfigError, match=r"min_layer=1 does not attend to the whole prompt; give one of 2, 4, 6"):
        StagedSelector(config, [100], ranking_layers=[2, 4, 6], device=here())


def test_no_layer_is_needed_without_rows_or_beyond_the_last_one():
    config = ASLConfig(settled_by="lookup", min_layer=2, max_layer=4, score_from=1).resolve(LAYERS)
    assert not any(StagedSelector(config, [9, 9], rows=[], device=here()).needs(layer) for layer in range(LAYERS))
    selector = StagedSelector(config, [99], device=here())
    assert [layer for layer in range(LAYERS) if selector.needs(layer)] == [1, 2, 3, 4]


def test_the_threshold_falls_with_every_layer_of_the_range():
    config = ASLConfig(
        settled_by="lookup", select_tokens=5, window=1, kernel_size=1, min_layer=1, max_layer=6, stages=()
    )
    resolved, token = config.replace(tau=0.5, select_on="last").resolve(LAYERS), 50
    for weight, layer in ((0.5, 1), (0.43, 2), (0.37, 3), (0.31, 4), (0.27, 5)):
        scores = torch.zeros(1, 99)
        scores[0, token] = weight
        selector, made = StagedSelector(resolved, [100], device=here()), []
        for at in range(LAYERS):
            if selector.needs(at):
                selector.observe(at, scores)
                made += selector.select(at)
        assert [one.layer for one in made] == [layer]


@pytest.mark.parametrize("if_never", ["select", "keep"])
def test_a_stage_that_is_no_looser_than_the_final_selection_is_passed_over(if_never):
    narrow = {"window": 1, "kernel_size": 1, "tau": 0.3, "if_never": if_never}
    loose = Stage(tokens=39, tau=0.3, min_layer=1, max_layer=3)
    config = ASLConfig(settled_by="lookup", select_tokens=40, min_layer=4, stages=loose, **narrow).resolve(LAYERS)
    selector, scores = StagedSelector(config, [100], device=here()), torch.zeros(1, 99)
    scores[0, 50] = 0.35
    for at in range(1, 5):
        selector.observe(at, scores)
        made = selector.select(at)
        assert bool(made) == (at == 4)
    assert (made[0].layer, made[0].count, selector.rows) == (4, 40, []) and not selector.needs(5)
    assert re.search("the question found a far token: score 0.35, threshold 0.30$", selector.reason(0, made[0]))


@pytest.mark.parametrize(("budget", "loose"), [(10, 30), (20, 30), (30, 45), (60, 90), (70, None)])
def test_a_stage_of_a_share_is_looser_than_a_large_budget(budget, loose):
    config = ASLConfig(select_tokens=budget, window=1, stages="0.3@1-2", min_layer=3, max_layer=3).resolve(LAYERS)
    selector, made = StagedSelector(config, [100], device=here()), []
    for layer in range(1, 4):
        selector.observe(layer, torch.zeros(1, 99))
        made += [(one.layer, one.count) for one in selector.select(layer)]
    assert made == [*([] if loose is None else [(2, loose)]), (3, budget)]


def test_each_rule_has_its_selector():
    lookup, variance = (ASLConfig(settled_by=rule).resolve(LAYERS) for rule in SETTLED_BY)
    with pytest.raises(ConfigError, match="is for StagedSelector"):
        LayerSelector(lookup, [100])
    with pytest.raises(ConfigError, match="is for LayerSelector"):
        StagedSelector(variance, [100], device=here())
