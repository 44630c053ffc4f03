"""What must always hold, whatever the model family, prompts and settings.

The models run in float64 and only scores are float32, so that a row computes the same scores alone and in a batch, and
no decision hangs on rounding.
"""

import contextlib
import copy
import functools
import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import (
    FAMILIES,
    GREEDY,
    LAYERS,
    counting,
    left_padded,
    prefills,
    prompts,
    recompute,
    selected,
    sliding_window,
    tiny,
)
from placing import DEVICE, PRETENDED, here
from test_selector import Decision, decide
from test_staged import budgets

import flexasl
from flexasl import ASLConfig
from flexasl.attention_spec import AttentionSpec
from flexasl.compiling import with_fused_rows
from flexasl.config import SELECT_ON
from flexasl.ops import reference
from flexasl.prefill import Prefill
from flexasl.stages import Stage

FACTOR = int(os.environ.get("FLEXASL_FUZZ", "1"))
"""How many times more examples to try: `make fuzz` sets it."""
CLOSE = {"rtol": 0, "atol": 1e-4}


def examples(count):
    return hypothesis_settings(max_examples=count * FACTOR)


lengths = st.integers(1, 90) | st.integers(40, 90)


@st.composite
def rules(draw, most=40, layers=LAYERS, settled_by=None):
    """Any settings that a stack of so many layers can run, by this rule or by any."""
    window = draw(st.integers(1, 8))
    amount = st.integers(window + 1, most) | st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0])
    cache = draw(st.sampled_from(["full", "budget", "budget", "top_p"]))
    by_lookup = draw(st.booleans()) if settled_by is None else settled_by == "lookup"
    observe = 1 if by_lookup else draw(st.sampled_from([1, 2, 2, 3, 3]))
    first = draw(st.none() | st.integers(observe - 1, layers - 2))
    return ASLConfig(
        select_tokens=draw(amount),
        kv_budget=draw(amount) if cache == "budget" else None,
        kv_top_p=draw(st.sampled_from([0.3, 0.6, 0.9, 0.99])) if cache == "top_p" else None,
        min_layer=first,
        max_layer=draw(st.none() | st.integers(max(first or 0, observe - 1), layers - 1)),
        window=window,
        kernel_size=draw(st.sampled_from([1, 3, 5, 7])),
        pooling=draw(st.sampled_from(["avgpool", "maxpool", "phrase"])),
        select_on=draw(st.sampled_from(SELECT_ON)),
        if_never=draw(st.sampled_from([None, "select", "keep"])),
        propagate=draw(st.sampled_from(["gather", "gather", "mask"])) if cache == "full" else "gather",
        **draw(look_ups(layers) if by_lookup else variances(observe)),
    )


def variances(observe):
    """Settings that the rule of rank variance has for itself."""
    return st.fixed_dictionaries(
        {
            "settled_by": st.just("variance"),
            "observe_layers": st.just(observe),
            "tau": st.sampled_from([None, 0.2, 0.5, 0.9, 1.0]),
            "score_power": st.sampled_from([1, 1, 2, "max"]),
            "variance_reference": st.sampled_from(["initial", "peak"]),
        }
    )


@st.composite
def look_ups(draw, layers):
    """Settings that the rule of look-ups has for itself."""
    taus, stages = st.sampled_from([None, 0.05, 0.1, 0.2, 0.3]), []
    for _ in range(draw(st.integers(0, 2))):
        ends = sorted(draw(st.integers(0, layers - 1)) for _ in range(2))
        bounds = dict(zip(("min_layer", "max_layer"), ends)) if draw(st.booleans()) else {}
        stages.append(Stage(tokens=draw(st.sampled_from([0.3, 0.5, 0.8, 20, 45])), tau=draw(taus), **bounds))
    return {
        "settled_by": "lookup",
        "tau": draw(taus),
        "stages": draw(st.just(stages) | st.none()),
        "score_from": draw(st.sampled_from([None, 0])),  # later ones may come behind a selection, which is refused
        "score_power": draw(st.sampled_from([None, 1, 2, "max"])),
        "contrast": draw(st.sampled_from([None, False])),
    }


@st.composite
def batches(draw, rows=3):
    """Prompts of any lengths, and columns of padding in front of all of them."""
    counts = draw(st.lists(lengths, min_size=1, max_size=rows))
    return prompts(*counts, seed=draw(st.integers(0, 99))), draw(st.sampled_from([0, 0, 0, 5, 40]))


models = st.builds(
    functools.partial(tiny, dtype=torch.float64),
    st.sampled_from(sorted(FAMILIES)),
    sliding_window=st.sampled_from([None, 8]),
)
answers = st.sampled_from([3] * 8 + [26] + [150] * (FACTOR > 1))
"""New tokens: now and then more than three sliding windows of 8 or 48."""
policies = st.sampled_from(["asl", "asl", "asl", "fixed_layer", "snapkv"])


@dataclass(frozen=True)
class Process:
    """What the process around a patched model is like."""

    default_dtype: torch.dtype
    compile: bool


processes = st.builds(
    Process,
    st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([False] * 5 + [DEVICE != PRETENDED]),
)
PLAIN = Process(torch.float32, False)


@functools.cache
def compiled(model):
    """A copy of the model with compiled layers, patched for all examples: graphs are good for all settings."""
    return flexasl.patch(copy.deepcopy(model), compile=True)


@contextlib.contextmanager
def patched(model, config, policy="asl", process=PLAIN):
    """The patched model and its patch, in such a process; settings that the model's layers cannot run are no example.
    Other policies than asl run uncompiled, and experts, whose loop in float64 is no graph."""
    graphs = process.compile and policy == "asl" and not hasattr(model.config, "num_experts_per_tok")
    graphs = graphs and (FACTOR > 1 or model.config.model_type in ("llama", "mistral"))
    with pytest.MonkeyPatch.context() as context:
        if FACTOR == 1 or model.config.model_type not in ("llama", "gpt2", "mistral"):
            # Graphs run as they are: building them takes long.
            context.setattr("flexasl.compiling.inductor", lambda graph, inputs: with_fused_rows(graph).forward)
        context.setattr("flexasl.selectors.staged.NEAR", 2)  # so that prompts as short as these have far tokens
        try:
            if graphs:
                patch = compiled(model)
                patch.config = config
            else:
                patch = flexasl.patch(model, counting(policy, config), policy)
        except flexasl.ConfigError:
            reject()
        torch.set_default_dtype(process.default_dtype)
        try:
            with contextlib.nullcontext() if graphs else patch:
                yield patch._model, patch
        finally:
            torch.set_default_dtype(torch.float32)


def columns_in_front(rows, padding):
    """Model inputs of left-padded rows, with so many more columns of padding."""
    batch = left_padded(rows)
    mask = torch.cat([torch.zeros(len(rows), padding, dtype=torch.long), batch["attention_mask"]], 1)
    ids = torch.cat([torch.full((len(rows), padding), 7), batch["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def decode(model, rows, padding, more):
    """Logits [B, 1 + T, V] of the last prompt token and of the tokens `more` [B, T], one by one; the cache; and the
    positions that it held after the prompt, by row, layer and head."""
    batch = columns_in_front(rows, padding)
    out = model(**batch, use_cache=True)
    logits, mask = [out.logits[:, -1]], batch["attention_mask"]
    width, layers = mask.shape[1], out.past_key_values.layers
    held = [[cached_positions(layer, row, width - len(ids)) for layer in layers] for row, ids in enumerate(rows)]
    for step in range(more.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        out = model(
            input_ids=more[:, step : step + 1],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=out.past_key_values,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), out.past_key_values, held


def cached_positions(layer, row, start):
    """[head][entry] positions that a row of a layer's cache holds; position 0 is at column `start`."""
    heads = layer.keys.shape[1]
    columns = layer.positions[row].expand(heads, -1)
    real = torch.ones_like(columns, dtype=torch.bool) if layer.valid is None else layer.valid[row].expand(heads, -1)
    return [(columns[head][real[head]] - start).tolist() for head in range(heads)]


# ---------------------------------------------------------------- keep-all is identity


def keep_everything(config, amount):
    budget = None if config.kv_budget is None else amount
    return config.replace(select_tokens=amount, kv_budget=budget)


@examples(60)
@given(
    model=models,
    batch=batches(rows=2),
    config=rules(),
    amount=st.sampled_from([1.0, 90, 5000]),
    policy=policies,
    process=processes,
)
def test_keep_all_is_identity(model, batch, config, amount, policy, process):
    assume(policy != "snapkv" or config.propagate == "gather")
    rows, padding = batch
    config = keep_everything(config, amount)
    inputs = columns_in_front(rows, padding)
    real = inputs["attention_mask"].bool()
    plain = model(**inputs, use_cache=True)
    # transformers' eager attention in float64 gives NaN where a padded query sees nothing, and spreads it.
    assume(not plain.logits[real].isnan().any())
    with patched(model, config, policy, process) as (pruning, patch):
        pruned = pruning(**inputs, use_cache=True)
    torch.testing.assert_close(pruned.logits[real], plain.logits[real], **CLOSE)
    assert [row.kept_positions for row in patch.report.rows] == [tuple(range(len(row))) for row in rows]
    layers = zip(pruned.past_key_values.layers, plain.past_key_values.layers, strict=True)
    for index, (mine, theirs) in enumerate(layers):
        for row, ids in enumerate(rows):
            start = real.shape[1] - len(ids)
            held = min(len(ids), (sliding_window(model, index) or len(ids) + 1) - 1)
            want = list(range(len(ids) - held, len(ids)))
            assert cached_positions(mine, row, start) == [want] * theirs.keys.shape[1]
            # The row's entries are the last ones: nothing of it was dropped.
            for name in ("keys", "values"):
                stored, whole = getattr(mine, name)[row], getattr(theirs, name)[row]
                torch.testing.assert_close(stored[:, -held:], whole[:, -held:], **CLOSE)


@examples(20)
@given(model=models, batch=batches(rows=2), config=rules(), count=answers, process=processes)
def test_keep_all_generates_the_same_tokens(model, batch, config, count, process):
    rows, padding = batch
    inputs = columns_in_front(rows, padding)
    del inputs["position_ids"]
    assume(not model(**inputs).logits[:, -1].isnan().any())
    want = model.generate(**inputs, max_new_tokens=count, **GREEDY)
    with patched(model, keep_everything(config, 1.0), process=process) as (pruning, _):
        got = pruning.generate(**inputs, max_new_tokens=count, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    for layer, (mine, theirs) in enumerate(zip(got.past_key_values.layers, want.past_key_values.layers, strict=True)):
        held, theirs = mine.keys.shape[2], theirs.keys.shape[2]
        assert theirs - padding <= held <= theirs + (sliding_window(model, layer) or 0)


# ---------------------------------------------------------------- a row is alone, pruned decode equals recompute


@examples(100)
@given(
    model=models,
    batch=batches(),
    config=rules(),
    policy=policies,
    group=st.sampled_from([1, 60, 2048]),
    count=answers,
    process=processes,
)
def test_a_row_is_alone(model, batch, config, policy, group, count, process):
    assume(policy != "snapkv" or config.propagate == "gather")
    rows, padding = batch
    more = torch.stack(prompts(*[count] * len(rows), seed=7))
    width = padding + max(map(len, rows))
    with patched(model, config, policy, process) as (pruning, patch), pytest.MonkeyPatch.context() as context:
        context.setattr("flexasl.rows.GROUP", group)
        logits, cache, _ = decode(pruning, rows, padding, more)
        together = patch.report.rows
        for index, ids in enumerate(rows):
            alone, own, _ = decode(pruning, [ids], 0, more[index : index + 1])
            solo = patch.report.rows[0]
            mine = together[index]
            assert (mine.selections, mine.kept_positions) == (solo.selections, solo.kept_positions)
            assert (mine.kept_tokens, mine.eval_layers, mine.reason) == (
                solo.kept_tokens,
                solo.eval_layers,
                solo.reason,
            )
            for layer, single in zip(cache.layers, own.layers, strict=True):
                held = cached_positions(layer, index, width - len(ids))
                assert held == cached_positions(single, 0, 0)
            torch.testing.assert_close(logits[index], alone[0], **CLOSE)


@examples(100)
@given(model=models, batch=batches(rows=2), config=rules(), policy=policies, count=answers, process=processes)
def test_pruned_decode_equals_recompute(model, batch, config, policy, count, process):
    assume(policy != "snapkv" or config.propagate == "gather")
    rows, padding = batch
    more = torch.stack(prompts(*[count] * len(rows), seed=8))
    with patched(model, config, policy, process) as (pruning, patch), prefills() as read:
        logits, _, after_prompt = decode(pruning, rows, padding, more)
    for index, ids in enumerate(rows):
        made, *before = patch.report.rows[index], *selected(read[0], index)[:-1]
        new = list(range(len(ids), len(ids) + count))
        held = []
        for heads in after_prompt[index]:
            longest = max(map(len, heads))
            held.append(torch.tensor([head + [new[-1]] * (longest - len(head)) + new for head in heads])[None])
        whole = torch.cat([ids, more[index]])[None]
        kept = torch.tensor(made.kept_positions)
        full = recompute(model, whole, len(ids), held, made.selected_layer, kept, before)
        torch.testing.assert_close(logits[index], full[0, len(ids) - 1 :], **CLOSE)


# ---------------------------------------------------------------- kept is well-formed, what is dropped is freed


def share_of(amount, tokens, window):
    return amount if isinstance(amount, int) else max(math.floor(amount * tokens), window + 1)


def check_kept(config, policy, made, tokens):
    """Kept positions of one row: the budget to the token where the row was pruned for good, what its last stage leaves
    where that is all, else the whole prompt."""
    kept = list(made.kept_positions)
    budget = share_of(config.select_tokens, tokens, config.window)
    assert kept == sorted(set(kept)) and made.kept_tokens == len(kept) > 0
    assert kept[0] >= 0 and kept[-1] == tokens - 1
    assert set(range(max(0, tokens - config.window), tokens)) <= set(kept)
    if made.selected_layer is None:
        assert kept == list(range(tokens))
    else:
        counts = budgets(config, tokens, not made.ranked_by.startswith("the last "))
        assert policy != "snapkv" and len(kept) in counts and budget < tokens
        assert len(kept) == budget or (config.if_never == "keep" and counts[-1] < len(kept))
        assert [one.kept_tokens for one in made.selections][-1] == len(kept)
        assert all(one.kept_tokens in counts for one in made.selections)
    if config.if_never == "select" and policy == "asl":
        assert len(kept) == min(budget, tokens)


def check_entries(config, policy, selections, tokens, index, heads, window):
    """Cache entries of one row at one layer, from whose prompt these selections were made."""
    present = [list(range(tokens)), *(at.tolist() for layer, at in selections if layer < index)][-1]
    limit = len(present)
    amount = config.kv_budget
    if policy == "snapkv" and amount is None and config.kv_top_p is None:
        amount = config.select_tokens
    if amount is not None:
        limit = min(limit, share_of(amount, tokens, config.window))
    seen_later = [at for at in present if window is None or at > tokens - window]
    sliding = window is not None
    by_mass = config.kv_top_p is not None and limit > share_of(config.select_tokens, tokens, config.window)
    for held in heads:
        assert held == sorted(set(held)) and set(held) <= set(seen_later)
        assert set(present[-config.window :]) & set(seen_later) <= set(held)
        if by_mass:
            assert present[0] in held or sliding
        elif limit == len(present):
            assert held == seen_later
        else:
            assert len(held) == limit or (sliding and len(held) < limit)


@pytest.mark.real("looks at storage")
@examples(200)
@given(model=models, batch=batches(), config=rules(), policy=policies, process=processes)
def test_kept_is_well_formed_and_the_rest_is_freed(model, batch, config, policy, process):
    assume(policy != "snapkv" or config.propagate == "gather")
    rows, padding = batch
    with patched(model, config, policy, process) as (pruning, patch), prefills() as read:
        cache = pruning(**columns_in_front(rows, padding), use_cache=True).past_key_values
        resolved = patch.config
    report, width = patch.report, padding + max(map(len, rows))
    for row, ids in enumerate(rows):
        check_kept(resolved, policy, report.rows[row], len(ids))
        for index, layer in enumerate(cache.layers):
            heads = cached_positions(layer, row, width - len(ids))
            made = selected(read[0], row)
            check_entries(resolved, policy, made, len(ids), index, heads, sliding_window(model, index))
    check_bytes(
        cache, report, len(rows), [min(width, (sliding_window(model, n) or width + 1) - 1) for n in range(LAYERS)]
    )


def check_bytes(cache, report, batch, whole):
    """whole: entries per head of every layer, were none dropped that its sliding window leaves."""
    storages, used, full = {}, 0, 0
    for layer, slots, most in zip(cache.layers, report.kv_tokens, whole, strict=True):
        assert layer.keys.shape[:3] == layer.values.shape[:3] == (batch, layer.keys.shape[1], slots)
        assert layer.keys.dtype == torch.float64
        entry = 8 * layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3])
        used, full = used + batch * slots * entry, full + batch * most * entry
        for states in (layer.keys, layer.values):
            storages[states.untyped_storage().data_ptr()] = states.untyped_storage().nbytes()
        for marks in (layer.positions, layer.valid):
            assert marks is None or marks.untyped_storage().nbytes() <= marks.numel() * marks.element_size()
    assert len(storages) == 2 * LAYERS
    assert report.kv_bytes == sum(storages.values()) == used
    assert report.kv_bytes_full == full


# ---------------------------------------------------------------- every decision, from its definition


def layer_oracle(query, key, positions, config, sliding_window):
    """Share of attention [G, m] and pooled scores [G, P] of one row's layer that sees the tokens at these positions."""
    last = torch.tensor(query[None, :, positions[-config.window :]])
    keys, at = torch.tensor(key[None, :, positions]), torch.tensor([positions])
    spec = AttentionSpec(sliding_window=sliding_window).text
    how = config.kernel_size, config.pooling, spec
    scores, mass = reference.window_scores_and_mass(last, keys, *how, positions=at, power=config.power)
    share = mass / (len(query) // len(key) * config.window)
    return share[0].cpu().numpy(), scores[0].cpu().numpy()


def distinct(scores, power=1):
    """Whether no two scores are closer than float32 can tell, but for exact ties."""
    ordered = np.sort(scores, axis=-1)
    gaps, near = np.diff(ordered, axis=-1), 1e-5 * scores.max() if power == 1 else 1e-4 * ordered[..., 1:]
    return bool(((gaps == 0) | (gaps > near)).all())


def entries_oracle(share, scores, config, tokens):
    """Entries that each KV head keeps of the layer's m tokens, in the order that `replay` gives."""
    (groups, count), window = share.shape, config.window
    everything = [list(range(count))] * groups
    if config.kv_top_p is not None:
        if count <= config.token_budget(tokens):
            return everything
        reached = np.sort(share, axis=-1)[:, ::-1].cumsum(-1)
        assume(distinct(share) and abs(reached - config.kv_top_p).min() > 1e-5)
        keep = reference.top_p_entries(torch.tensor(share)[None], config.kv_top_p, window)[0]
        return [head.nonzero().flatten().tolist() for head in keep]
    if config.kv_budget is None:
        return everything
    budget = min(config.cache_budget(tokens), count) - window
    assume(distinct(scores, config.power))
    best = [sorted(range(count - window), key=lambda j: (-head[j], j))[:budget] for head in scores]
    return [head + list(range(count - window, count)) for head in best]


def replay_oracle(query, key, config, sliding_window=None):
    """Every decision on one row: query [L, H, n, D], key [L, G, n, D] → Decision and kept entries [layer][KV head]."""
    layers, groups, tokens, _ = key.shape
    everything = list(range(tokens))
    if tokens <= config.window:
        return Decision(), [[everything] * groups] * layers
    seen = [layer_oracle(query[layer], key[layer], everything, config, sliding_window) for layer in range(layers)]
    scores = [by_head.max(0) if config.score_power == "max" else by_head.sum(0) for _, by_head in seen]
    assume(distinct(np.stack(scores), config.power))
    decision = decide(config, [row.tolist() for row in scores])
    kept = []
    for layer, states in enumerate(seen):
        if decision.layer is not None and layer > decision.layer:
            states = layer_oracle(query[layer], key[layer], decision.kept, config, sliding_window)
        kept.append(entries_oracle(*states, config, tokens))
    return decision, kept


@st.composite
def recordings(draw, least=1):
    """Query [L, B, H, N, D] and key [L, B, G, N, D] of left-padded rows, and the lengths of these."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.lists(st.integers(least, 26), min_size=1, max_size=2))
    layers, groups, dim, noise = 5, 2, 4, draw(st.sampled_from([0.1, 0.4, 1.0]))

    def states(heads):
        base = rng.standard_normal((1, len(counts), heads, max(counts), dim))
        return (base + noise * rng.standard_normal((layers, *base.shape[1:]))).astype(np.float32)

    return states(groups * draw(st.sampled_from([1, 2]))), states(groups), counts


def own_states(states, row, count):
    return states[:, row, :, states.shape[3] - count :]


@examples(150)
@given(config=rules(most=20, layers=5, settled_by="variance"), recording=recordings())
def test_replay_decides_what_the_definition_says(config, recording):
    query, key, counts = recording
    mask = torch.arange(max(counts)) >= max(counts) - torch.tensor(counts)[:, None]
    rows = flexasl.replay(torch.tensor(query), torch.tensor(key), config, attention_mask=mask)
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        own = [own_states(states, index, count) for states in (query, key)]
        want, kept = replay_oracle(*own, config.resolve(len(key)))
        assert [[head.tolist() for head in layer] for layer in row.kept_indices] == kept
        assert (row.selected_layer, row.eval_layers, row.union_size) == (want.layer, want.eval_layers, want.union_size)
        assert (row.variance, row.variance_ratio) == (want.variance, want.ratio)
        assert (None if row.selected is None else row.selected.tolist()) == (want.kept or None)


@examples(60)
@given(
    config=rules(most=14, layers=5, settled_by="variance"),
    recording=recordings(least=15),
    select_tokens=st.integers(10, 14),
    sliding_window=st.integers(2, 20),
)
def test_prefill_scores_within_the_sliding_window_by_position(config, recording, select_tokens, sliding_window):
    config = config.replace(select_tokens=select_tokens, if_never="select")
    query, key, counts = recording
    layers, width, rule = len(key), max(counts), config.resolve(len(key))
    prefill = Prefill(flexasl.policies.ASL(), rule, layers, counts, tokens=width, device=here())
    attention = flexasl.FlexASLAttention(sliding_window=sliding_window)
    want = [
        replay_oracle(own_states(query, row, count), own_states(key, row, count), rule, sliding_window)
        for row, count in enumerate(counts)
    ]
    for layer in range(layers):
        rows = prefill.rows
        states = [
            torch.tensor(recorded[layer]).transpose(0, 1).flatten(1, 2)[:, rows.flat(width)][None]
            for recorded in (query, key)
        ]
        entries = prefill.observe(layer, states[0][:, :, rows.queries(rule.window)], states[1], attention)
        for row, (decision, kept) in enumerate(want):
            below = decision.layer is not None and layer > decision.layer
            present = decision.kept if below else list(range(counts[row]))
            for group, head in enumerate(kept[layer]):
                if entries is None:
                    mine = torch.arange(rows.lengths[row]) + rows.starts[row]
                    mine = mine if rows.kept is None else mine[rows.kept[mine]]
                else:
                    mine = entries[0][row, group]
                    mine = mine if entries[1] is None else mine[entries[1][row, group]]
                assert (rows.positions[mine] - (width - counts[row])).tolist() == sorted(present[slot] for slot in head)
        prefill.advance()


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_prompts_shorter_than_the_window_pass_untouched(family):
    model = tiny(family)
    config = ASLConfig(kv_budget=40, min_layer=1, observe_layers=2)
    for rows in (prompts(1), prompts(5), prompts(3, 1, 5)):
        inputs = columns_in_front(rows, 0)
        real = inputs["attention_mask"].bool()
        want = model(**inputs).logits
        with flexasl.patch(model, config) as patch:
            got = model(**inputs).logits
        torch.testing.assert_close(got[real], want[real], **CLOSE)
        assert [row.kept_tokens for row in patch.report.rows] == [len(row) for row in rows]
