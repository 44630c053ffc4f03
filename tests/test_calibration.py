"""Calibration: what is recorded, what is looked up, what is chosen, what is written, and what is refused."""

import copy
import dataclasses
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import decoder_layers, tiny
from tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM

import flexasl
from flexasl import profiles, run
from flexasl.asking import Asked
from flexasl.replaying import replay_scores
from flexasl.selectors.staged import StagedSelector
from flexasl.tools.calibration import calibrating
from flexasl.tools.calibration.checking import Answered, answered, falls_short
from flexasl.tools.calibration.choosing import SETTINGS, Judged, candidates, choose, default_of, settings_of
from flexasl.tools.calibration.evidence import files_of
from flexasl.tools.calibration.recording import Prompt, Recording, locate, record
from flexasl.tools.calibration.tables import Outcome, Table, holds_answers
from flexasl.tools.evaluation import build
from flexasl.tools.evaluation.costs import layer_costs, prefill_share
from flexasl.tools.evaluation.samples import Sample, Wording
from flexasl.tools.text import encode

CONFIG = flexasl.ASLConfig(select_tokens=100, window=8, kernel_size=3, pooling="avgpool", score_power=1, contrast=False)
FEW = {"tasks": ("needle", "number_string"), "unseen": "niah_single_2", "samples": 2, "length": 330}


@pytest.fixture(scope="module")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def made(model):
    return flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **FEW)


def prompt_of(*answers, tokens=0, task="needle", index=0):
    return Prompt(task=task, index=index, ids=[0] * tokens, answers=answers)


def recorded(layers, prefix, seed, asking=()):
    """Scores of which some tokens stay high from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    steady = torch.rand(prefix, generator=generator) ** 4
    scores = (steady + 0.6 * torch.rand(layers, prefix, generator=generator)).clamp(max=1) * torch.linspace(
        0.5, 1, layers
    )[:, None]
    scores[0, :3] = scores[0, 3]  # ties
    answer = tuple(scores[-1].topk(6).indices.tolist())
    return Recording(prompt=prompt_of((answer,), ((1, 2, 3), (prefix + 1,))), scores=scores, question=tuple(asking))


# What is recorded.


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", ["needle", "passkey", "niah_multiquery"])
def test_answers_are_located(task: str, chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat)
    sample = build(task, tokenizer, 400)
    prompt = locate(tokenizer, sample)
    assert prompt.ids == encode(tokenizer, sample.prompt)
    assert len(prompt.answers) == len(sample.references)
    for reference, answer in zip(sample.references, prompt.answers, strict=True):
        assert len(answer) == sample.prompt.count(reference) >= 1
        for statement in answer:
            assert list(statement) == list(range(statement[0], statement[-1] + 1))
            text = tokenizer.decode([prompt.ids[at] for at in statement])
            assert reference in text and len(text) <= len(reference) + 4
            inner = tokenizer.decode([prompt.ids[at] for at in statement[1:]])
            assert reference not in inner, "no more tokens than it takes"


@pytest.mark.parametrize("task", ["needle", "passkey", "niah_multivalue", "uniform"])
def test_the_sentences_that_state_an_answer_are_located(task: str) -> None:
    tokenizer = tiny_tokenizer()
    sample = build(task, tokenizer, 400)
    prompt, bare = locate(tokenizer, sample, sentences=True), locate(tokenizer, sample)
    for reference, answer, inner in zip(sample.references, prompt.answers, bare.answers, strict=True):
        for statement, value in zip(answer, inner, strict=True):
            text = tokenizer.decode([prompt.ids[at] for at in statement]).strip()
            assert set(value) < set(statement) and reference in text
            assert len(text) < 150 and text.count(". ") == 0 and text[0].isupper() and text[-1] == "."


def test_a_sentence_without_an_end_is_cut() -> None:
    about = {"task": "needle", "length": 9, "index": 0, "prompt_tokens": 5, "max_new_tokens": 1}
    tokenizer = tiny_tokenizer()
    for text, wanted in (
        ("x " * 300 + "12345" + " y" * 300, "12345"),
        ("One. Two is 12345\n\nThree.", "Two is 12345"),
        ('He said: "No." It is 12345! Then', "It is 12345!"),
        ("12345", "12345"),
    ):
        prompt = locate(tokenizer, Sample(prompt=text, references=("12345",), **about), sentences=True)
        assert tokenizer.decode([prompt.ids[at] for at in prompt.answers[0][0]]).strip() == wanted


def test_an_answer_is_held_with_nine_tenths_of_one_whole_statement() -> None:
    ten, other = tuple(range(10)), tuple(range(20, 30))
    twice = prompt_of((ten, other))
    assert holds_answers(twice, range(1, 10)) and holds_answers(twice, other[:9])
    assert not holds_answers(twice, (*range(8), *other[:8])), "nine tenths of neither"
    both = prompt_of((ten,), (other,))
    assert not holds_answers(both, ten) and holds_answers(both, ten + other)
    assert not holds_answers(prompt_of(((4, 5, 6),)), (4, 5)), "of a short one all"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_prompt_is_read_once_and_scored_as_the_rule_scores(family: str) -> None:
    model = tiny(family)
    prompts = [
        Prompt(task="needle", index=index, ids=torch.randint(3, 199, (count,)).tolist(), answers=())
        for index, count in enumerate((90, 120))
    ]
    runs, counted = [], []
    handle = decoder_layers(model)[-1].register_forward_hook(lambda *_: runs.append(1))
    try:
        recordings, ranking_layers = record(model, prompts, CONFIG, None, counted.append)
    finally:
        handle.remove()
    assert (len(runs), counted) == (2, [1, 2])
    assert not hasattr(model, "flexasl_patch")
    config = CONFIG.replace(select_tokens=40, tau=0.9, stages=())
    for recording in recordings:
        with flexasl.patch(model, config) as patch, torch.no_grad():
            model(torch.tensor([recording.prompt.ids]))
        row, voting = patch.report.rows[0], patch.ranking_layers
        assert ranking_layers == voting
        replayed = replay_scores(recording.scores, config, ranking_layers=ranking_layers)
        assert replayed.selected_layer == row.selected_layer is not None
        assert tuple(replayed.selected.tolist()) == row.kept_positions
        assert tuple(replayed.eval_layers) == tuple(row.eval_layers) and replayed.lookup


@pytest.mark.parametrize("contrast", [True, False])
def test_the_question_ranks_where_a_tokenizer_finds_it(model, contrast: bool) -> None:
    tokenizer = tiny_tokenizer()
    config = CONFIG.replace(stages=(), score_power="max", contrast=contrast, tau=0.9)
    prompts = [locate(tokenizer, build(task, tokenizer, 300)) for task in ("needle", "uniform")]
    recordings, _ = record(model, prompts, config, tokenizer, lambda done: None)
    assert all(of_window.question == () for of_window in record(model, prompts, config, None, lambda done: None)[0])
    for recording in recordings:
        with flexasl.patch(model, config, tokenizer=tokenizer) as patch, torch.no_grad():
            model(torch.tensor([recording.prompt.ids]))
        row = patch.report.rows[0]
        asks = tokenizer.decode([recording.prompt.ids[at] for at in recording.question])
        assert " ".join(asks.split()) in row.ranked_by and asks.endswith("?")
        outcome = Table(recording, layer_costs(model)).outcome(patch.config)
        assert outcome.layers == (row.selected_layer,)
        assert outcome.cost == prefill_share(layer_costs(model), patch.report)
        replayed = replay_scores(recording.scores, config, question=recording.question)
        assert tuple(replayed.selected.tolist()) == row.kept_positions
        assert outcome.waited == ("by max_layer" in row.reason)
        assert replayed.lookup == pytest.approx(row.lookup)


# What is looked up.


def full_read(query, key, config, question=None):
    """The scores of every layer, without pruning."""
    last = {"stages": (), "tau": 1.0, "min_layer": len(key) - 2, "max_layer": len(key) - 1, "if_never": "keep"}
    whole = config.replace(**last, score_from=0)
    return flexasl.replay(query, key, whole, question=question)[0].scores


@pytest.mark.parametrize("question", [None, range(225, 250), range(240, 260)])
def test_recorded_scores_are_replayed_as_states_are(question: range | None) -> None:
    config = CONFIG.replace(
        select_tokens=60, contrast=False, stages="0.5@2-4", min_layer=4, max_layer=6, score_from=1, tau=0.8
    )
    asked = None if question is None else [torch.tensor(question)]
    layers = set()
    for seed in range(8):
        torch.manual_seed(seed)
        query, key = 1.2 * torch.randn(9, 1, 4, 260, 8), torch.randn(9, 1, 2, 260, 8)
        want = flexasl.replay(query, key, config, question=asked)[0]
        scores = full_read(query, key, config, asked)
        assert len(scores) == 9
        row = replay_scores(scores, config, question=question)
        # After the first selection the model's own scores are those of fewer keys.
        assert row.selections[0] == want.selections[0] and len(row.selections) == len(want.selections) == 2
        first = row.scored_layers[0]
        assert torch.allclose(row.scores[0], want.scores[want.scored_layers.index(first)])
        assert row.selected.tolist() == sorted(set(row.selected.tolist())) and len(row.selected) == 60
        assert question is None or set(question[-20:]) <= set(row.selected.tolist())
        layers.add(row.selected_layer)
    assert layers <= {4, 5, 6}


@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("question", [None, range(225, 250), range(240, 260)])
def test_stages_are_replayed_as_states_are(question: range | None, contrast: bool) -> None:
    """Of states in which most tokens get no attention, so that to drop them changes no other token's score."""
    config = CONFIG.replace(
        select_tokens=150, kernel_size=1, score_power="max", contrast=contrast, score_from=1,
        stages=flexasl.Stage(tokens=0.8, tau=0.3, min_layer=2, max_layer=4), min_layer=4, max_layer=8,
    )  # fmt: skip
    asked = None if question is None else [torch.tensor(question)]
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        query, key = torch.randn(9, 1, 4, 260, 8), torch.randn(9, 1, 2, 260, 8)
        seen_at = torch.cat([torch.randperm(200)[:50], torch.arange(200, 260)])
        query[..., 0], key[..., 0] = 100.0, -100.0
        key[:, :, :, seen_at, 0] = 0.0
        others = sorted({*range(260)} - {*(question or range(260))})
        query[..., 1], key[..., 1], key[:, :, :, 0, 1] = 0.0, 0.0, 100.0
        query[:, :, :, others, 0], query[:, :, :, others, 1] = 0.0, 100.0  # who does not ask looks at the first token
        rule = config.replace(tau=0.25 + 0.05 * (seed % 6)).resolve(9)
        want = flexasl.replay(query, key, rule, question=asked)[0]
        recording = Recording(
            prompt=prompt_of(((1, 2, 3),)), scores=full_read(query, key, config, asked), question=tuple(question or ())
        )
        told = replay_scores(recording.scores, rule, question=question)
        assert told.selections == want.selections and torch.equal(told.selected, want.selected)
        assert told.lookup == pytest.approx(want.lookup, abs=1e-5)
        assert told.scored_layers == want.scored_layers[-len(told.scored_layers) :]
        outcome = Table(recording, layer_costs(tiny("llama"))[:1] * 9).outcome(rule)
        assert outcome.layers == tuple(layer for layer, _ in want.selections)
        seen.add(outcome.layers)
    assert len(seen) > 3, "decided in different ways"


@pytest.mark.parametrize("ranking_layers", [None, [0, 2, 3, 5, 6, 8, 9, 11]])
@pytest.mark.parametrize("asking", [(), range(120, 130)])
def test_the_table_is_what_the_rule_decides(ranking_layers: list[int] | None, asking) -> None:
    """As the selector does it layer by layer, with the costs of layers that slide, which depend on what is kept."""
    costs = layer_costs(tiny("mistral_sliding")) * 2
    config, choose_one = CONFIG.replace(select_tokens=40).scored(flexasl.config.LOOKUP_SCORES), Random(0)
    seen, costs_of = set(), {}
    for seed in range(4):
        recording = recorded(len(costs), 150, seed, asking)
        recording.scores.mul_(1 if seed % 2 else 0.3)  # with few look-ups in every other one
        rules = candidates(config, len(costs), ranking_layers)
        table = Table(recording, costs, ranking_layers)
        for rule in choose_one.sample(rules, 25):
            rule = rule.replace(if_never=choose_one.choice(["select", "keep"]), tau=choose_one.choice([rule.tau, 0.95]))
            made, weights = selected(recording, rule, ranking_layers)
            outcome = table.outcome(rule)
            if not made:
                assert outcome == (None, True, 1.0, (), False)
                continue
            layers, kept = [layer for layer, _ in made], made[-1][1]
            assert outcome.layers == tuple(layers) and outcome.layer == layers[-1]
            assert outcome.held == holds_answers(recording.prompt, kept)
            counts = [158] * (layers[0] + 1)
            for place, (layer, positions) in enumerate(made):
                counts += [len(positions)] * ([*layers, len(costs) - 1][place + 1] - layer)
            spent = sum(
                cost.of(kept if count == len(kept) else [place * 158 // count for place in range(count)])
                for cost, count in zip(costs, counts, strict=True)
            )
            assert outcome.cost == spent / sum(cost.of(range(158)) for cost in costs)
            first = rule.min_layer if asking else rule.min_layer_unasked
            falling = rule.tau * 0.85 ** (layers[-1] - first)
            assert outcome.waited == (layers[-1] == rule.max_layer and weights[layers[-1]] < falling)
            seen.add((len(layers), layers[-1], outcome.waited))
            costs_of.setdefault((seed, outcome.layers, tuple(counts)), set()).add(outcome.cost)
    assert (
        len(seen) > 6
        and {count for count, _, _ in seen} == {1, 2}
        and {waited for _, _, waited in seen} == {True, False}
    )
    assert asking or any(len(found) > 1 for found in costs_of.values()), "the same counts, other positions"


def selected(recording, rule, ranking_layers):
    """Layer and positions of every selection from the scores, and the highest look-up by layer, by a selector of a
    batch of two, the other of which is shorter."""
    scores, tokens, budget = recording.scores, recording.scores.shape[1] + rule.window, rule.select_tokens
    known = [bool(recording.question)] * 2
    selector = StagedSelector(rule, [tokens, tokens - 40], rows=[0, 1], ranking_layers=ranking_layers, asked=known)
    left, made = torch.arange(tokens), []
    for layer in range(len(scores)):
        if 0 not in selector.rows:
            break
        if not selector.needs(layer):
            continue
        own = scores[layer][left[: -rule.window]]
        if recording.question:
            count = selector.budgets[0][int(selector.stages_left[0])]
            another = int(selector.stages_left[0]) < len(rule.stages)
            asked = Asked(recording.question, tokens, budget, rule.window, contrast=rule.contrast)
            always = asked.kept(count if len(left) == tokens else min(count, budget), another)
            own = own.masked_fill(torch.isin(left[: -rule.window], torch.tensor(always)), float("inf"))
        both = torch.zeros(len(selector.rows), tokens - rule.window)
        both[0, -len(own) :] = own
        selector.observe(layer, both)
        for one in selector.select(layer):
            if one.row == 0:
                left = left[one.keep[-len(left) :]]
                made.append((layer, left.tolist()))
    trace = selector.traces[0]
    return made, dict(zip(trace.eval_layers, trace.lookup, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_cost_is_that_of_the_real_run(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 199, (1, 100))
    config = CONFIG.replace(select_tokens=40, tau=0.9, stages=())
    prompt = Prompt(task="needle", index=0, ids=ids[0].tolist(), answers=())
    (recording,), ranking_layers = record(model, [prompt], config, None, lambda done: None)
    with flexasl.patch(model, config) as patch, torch.no_grad():
        model(ids)
    outcome = Table(recording, layer_costs(model), ranking_layers).outcome(patch.config)
    assert outcome.layer == patch.report.rows[0].selected_layer
    assert outcome.cost == prefill_share(layer_costs(model), patch.report) < 1


# What is chosen.


@pytest.mark.parametrize("layers", [2, 3, 6, 12, 30, 80])
def test_candidates_fit_the_model_and_begin_with_the_default(layers: int) -> None:
    for ranking_layers in (None, list(range(1, layers, 2))):
        rules = candidates(CONFIG, layers, ranking_layers)
        assert rules[0] == default_of(CONFIG).resolve(layers, ranking_layers)
        assert len({tuple(settings_of(rule).items()) for rule in rules}) == len(rules) <= 1800
        for rule in rules:
            assert rule.resolve(layers, ranking_layers) == rule
            anew = rule.replace(min_layer_unasked=None, **settings_of(flexasl.ASLConfig()))
            assert anew.resolve(layers, ranking_layers) == rules[0]
    if layers >= 12:
        assert {len(rule.stages) for rule in rules} == {0, 1}
        assert all(rule.stages[0].min_layer <= rule.min_layer < rule.max_layer for rule in rules if rule.stages)


def test_what_is_given_beside_the_settings_stays() -> None:
    config = CONFIG.replace(kv_budget=50, tau=0.7, max_layer=4, if_never="keep")
    assert default_of(config) == CONFIG.replace(kv_budget=50, if_never="keep", settled_by="lookup")
    assert all(rule.kv_budget == 50 and rule.select_tokens == 100 for rule in candidates(config, 12))


def judged(held: str, cost: float, waited: int = 0, **settings) -> Judged:
    given = {"min_layer": 10, "max_layer": 21, "tau": 0.4, "stages": "0.33@5-9", "score_from": 5} | settings
    outcomes = (Outcome(3, letter == "y", cost, (3,), place < waited) for place, letter in enumerate(held))
    return Judged(name="", rule=flexasl.ASLConfig(**given), outcomes=tuple(outcomes))


def test_the_cheapest_of_those_that_hold_most() -> None:
    default, cheap = judged("yyy", 0.8), judged("yyy", 0.6, tau=0.5, max_layer=20)
    cheaper = judged("yyn", 0.3, tau=0.6, max_layer=19)
    assert choose([default, cheap, cheaper], default) is cheap
    assert choose([default, cheaper], default) is default
    none, cheap_none = judged("nnn", 0.8), judged("nnn", 0.3, tau=0.6)
    assert choose([none, cheap_none], none) is none, "nothing speaks for it"


def test_one_that_holds_more_than_all_around_it_is_not_taken() -> None:
    default, lucky = judged("yyynn", 0.6, tau=0.1), judged("yyyyy", 0.5, tau=0.3)
    unlucky = [judged("ynnnn", 0.5, tau=tau) for tau in (0.2, 0.4)]
    steady = [judged("yyyyn", 0.55, tau=tau, max_layer=20) for tau in (0.5, 0.6)]
    assert choose([default, lucky, *unlucky, *steady], default) is steady[0], "those beside it hold as much"
    assert choose([default, lucky, *steady], default) is lucky, "nothing stands beside it"


def test_what_costs_more_than_the_default_is_taken_where_the_default_is_poor() -> None:
    default, dear = judged("yynn", 0.5), judged("yyyy", 0.6, tau=0.5, max_layer=20)
    assert choose([default, dear], default) is default and choose([default, dear]) is dear
    poor = judged("ynnn", 0.5)
    assert choose([poor, dear], poor) is dear


def test_none_that_max_layer_decides_for_where_another_is_there() -> None:
    own, waits = judged("y" * 7 + "n", 0.8, waited=2), judged("y" * 8, 0.5, waited=3, tau=0.6, max_layer=20)
    assert choose([own, waits], own) is own, "a quarter of the prompts at most"
    assert choose([waits, judged("y" * 8, 0.6, waited=8)], own) is waits, "where all wait, the usual rule"
    assert choose([own, judged("y" * 8, 0.7, waited=1, tau=0.7, max_layer=20)], own).cost == 0.7


def test_ties_go_towards_the_defaults() -> None:
    default = judged("yyyy", 0.8)
    far, near, nearer = (
        judged("yyyy", 0.6, **own) for own in ({"tau": 0.3, "min_layer": 9}, {"tau": 0.7}, {"tau": 0.5})
    )
    assert choose([far, near], default) is near, "fewer changes"
    assert choose([far, near, nearer], default) is nearer, "smaller ones"
    assert choose([far, near, judged("yyyy", 0.6, stages="0.5@5-9")], default).rule.stages != default.rule.stages
    assert choose([far, near, judged("yyyy", 0.6)], default).rule == default.rule


def test_the_choice_sees_other_prompts_than_the_check(made) -> None:
    seen = {(prompt.task, prompt.index) for prompt in made.prompts}
    assert seen == {(task, index) for task in ("needle", "number_string") for index in (0, 1)}
    other = {(prompt.task, prompt.index) for prompt in made.checked}
    assert other == {("needle", 2), ("number_string", 2), ("niah_single_2", 0)}
    for side in (made.prompts, made.checked):
        assert {prompt.behind for prompt in side} == {"", "rules"}, "half of them with text behind the question"
        assert all(230 < prompt.tokens <= 330 for prompt in side)
    assert sum(prompt.behind == "rules" for prompt in made.prompts) == 2


def prompts_of(side):
    """The prompts of a calibration, made again, as tokens."""
    tokenizer = tiny_tokenizer()
    for used in side:
        wording = Wording(after_question=used.behind or None, answer_prefix=not used.behind)
        yield locate(tokenizer, build(used.task, tokenizer, 330, 0, used.index, wording=wording), sentences=True)


def test_what_is_chosen_does_in_the_model_what_was_foretold(model, made) -> None:
    assert settings_of(made.config) == made.chosen.settings and made.chosen in made.candidates
    whole = CONFIG.replace(**made.chosen.settings, settled_by="lookup")
    assert made.config == whole.scored(flexasl.config.LOOKUP_SCORES)
    at_once = next(one for one in made.candidates if not one.rule.stages and one.rule.min_layer < one.rule.max_layer)
    prompts = list(prompts_of(made.prompts))
    assert [len(prompt.ids) for prompt in prompts] == [used.tokens for used in made.prompts]
    for one in (made.chosen, made.default, at_once):
        for prompt, outcome in zip(prompts, one.outcomes, strict=True):
            with flexasl.patch(model, one.rule, tokenizer=tiny_tokenizer()) as patch, torch.no_grad():
                model(torch.tensor([prompt.ids]))
            row = patch.report.rows[0]
            # Up to the first selection the model's own scores are those of the full read.
            assert row.selections[0].layer == outcome.layers[0]
            if len(row.selections) == 1:
                assert (row.selected_layer, holds_answers(prompt, row.kept_positions)) == (outcome.layer, outcome.held)
                assert prefill_share(layer_costs(model), patch.report) == outcome.cost


def test_what_is_said_of_answers_is_what_the_model_does(model, made) -> None:
    tokenizer = tiny_tokenizer()
    assert list(made.answers) == ["full", "default", "chosen"]
    for place, prompt in enumerate(prompts_of(made.checked)):
        for name, rule in (("full", None), ("default", made.default.rule), ("chosen", made.chosen.rule)):
            said = made.answers[name][place]
            patching = {} if rule is None else {"config": rule, "policy": "asl", "find_question": True}
            alone = run.answer(model, tokenizer, prompt.ids, max_new_tokens=40, **patching)
            assert said.text == alone.text
            assert said.score == sum(word in alone.text for word in prompt.references) / len(prompt.references)
            if rule is None:
                assert said.outcome == Outcome(None, True, 1.0)
                continue
            row = alone.report.rows[0]
            assert said.outcome.layers == tuple(one.layer for one in row.selections)
            assert said.outcome.held == holds_answers(prompt, row.kept_positions)
            assert said.outcome.cost == prefill_share(layer_costs(model), alone.report)
            if "is set to layer" not in row.reason:
                assert said.outcome.waited == ("by max_layer" in row.reason)


def test_what_a_better_answer_counts(model) -> None:
    """A model's own answer as the reference: right with the full cache, and wherever pruning changes nothing."""
    tokenizer, ids = tiny_tokenizer(), torch.randint(3, 999, (1, 200)).tolist()[0]
    text = run.answer(model, tokenizer, ids, max_new_tokens=40).text
    prompt = Prompt(task="needle", index=0, ids=ids, answers=(((1, 2),),), references=(text,))
    keeps = CONFIG.replace(stages=(), tau=1.0, if_never="keep").resolve(6)
    drops = CONFIG.replace(stages=(), min_layer=0, max_layer=0, select_tokens=9).resolve(6)
    (said,) = answered(model, tokenizer, [prompt], {"keeps": keeps, "drops": drops}, layer_costs(model))
    assert [said[name].score for name in ("full", "keeps", "drops")] == [1, 1, 0]
    assert said["keeps"].outcome == Outcome(None, True, 1.0) and said["drops"].outcome.layers == (0,)


def test_the_default_is_kept_where_it_answers_more() -> None:
    def scores(*values):
        return [Answered(value, Outcome(None, True, 1.0), "") for value in values]

    full = scores(1, 1, 1, 0)
    assert falls_short(full, scores(1, 1, 0, 0), scores(1, 1, 1, 0))
    assert not falls_short(full, scores(1, 1, 0, 0), scores(1, 1, 0, 0)), "the default does no better"
    assert not falls_short(full, scores(1, 1, 1, 0), scores(1, 1, 1, 1)), "as good as the full cache"
    assert not falls_short(scores(*[1] * 50), scores(*[1] * 49, 0), scores(*[1] * 50)), "within .02"


def test_a_choice_that_loses_answers_is_not_taken(model, monkeypatch: pytest.MonkeyPatch) -> None:
    few = FEW | {"unseen": None, "samples": 1, "tasks": ["needle"]}
    monkeypatch.setattr(calibrating, "choose", lambda judged, default=None: judged[-1])
    taken = flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **few)
    monkeypatch.setattr(calibrating, "falls_short", lambda full, chosen, default: True)
    kept = flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **few)
    assert not taken.kept_default and settings_of(taken.config) == taken.chosen.settings != taken.default.settings
    assert kept.kept_default and settings_of(kept.config) == kept.default.settings
    assert "by the default, which is therefore kept." in str(kept) and "therefore" not in str(taken)
    assert kept.profile().settings.tau == kept.default.settings["tau"] and kept.profile().evidence.kept_default


def test_the_same_arguments_give_the_same(model, made) -> None:
    stages = []
    again = flexasl.calibrate(
        model,
        tiny_tokenizer(),
        CONFIG,
        **FEW,
        on_progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert again == made
    ends = {stage: total for stage, done, total in stages if done == total}
    assert ends == {"prompts": 7, "reads": 4, "candidates": len(made.candidates), "answers": 3}
    assert {stage for stage, done, _ in stages if done == 0} == set(ends)


def test_without_an_unseen_task(model) -> None:
    few = FEW | {"unseen": None, "samples": 1, "tasks": ["needle"]}
    one = flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **few)
    assert [len(side) for side in (one.prompts, one.checked)] == [1, 1]


def test_a_profile_on_this_machine_changes_nothing(model, made, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(tmp_path))
    found = made.profile()
    other = dataclasses.replace(found, settings=dataclasses.replace(found.settings, min_layer=1, max_layer=1, tau=0.9))
    profiles.store(other)
    with flexasl.patch(model) as patch:
        assert patch.config.max_layer == 1
    assert flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **FEW) == made


# What is written.


def test_files_and_what_is_in_them(made, tmp_path: Path) -> None:
    paths = made.save(tmp_path / "own.json")
    names = ["own.json", "own.evidence.json", "own.md", "own.png", "own.profile.json"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert flexasl.ASLConfig.load(paths[0]) == made.config
    data = json.loads(paths[1].read_text())
    assert flexasl.ASLConfig.from_dict(data["config"]) == made.config
    assert len(data["candidates"]) == len(made.candidates) and len(data["fixed_layers"]) == 6
    told = made.default.settings
    told |= {"stages": [dataclasses.asdict(stage) for stage in told["stages"]]}
    assert data["candidates"][0]["settings"] == told
    assert (data["chosen"]["held"], data["chosen"]["waited"]) == (made.chosen.held, made.chosen.waited)
    assert [prompt["task"] for prompt in data["checked"]] == [prompt.task for prompt in made.checked]
    assert [one["text"] for one in data["answers"]["full"]] == [one.text for one in made.answers["full"]]
    text = paths[2].read_text()
    assert made.verdict in text and "own.png" in text and "fixed layer" in text
    for name in SETTINGS:
        chosen, default = (
            (" + ".join(map(str, one.settings[name])) or "none") if name == "stages" else one.settings[name]
            for one in (made.chosen, made.default)
        )
        assert f"| `{name}` | {chosen} | {default} |" in text
    assert paths[3].read_bytes().startswith(b"\x89PNG")
    profile = profiles.Profile.load(paths[4])
    assert profile.settings == made.profile().settings and profile.evidence == made.profile().evidence


def test_the_picture_shows_every_candidate_and_the_answers(made) -> None:
    left, right = made.plot().axes
    assert len(left.collections[0].get_offsets()) == len(made.candidates)
    assert len(left.lines[0].get_xdata()) == 6
    chosen = left.collections[-1].get_offsets()[0].tolist()
    assert chosen == pytest.approx([made.chosen.cost, made.chosen.held / 4])
    costs = [one.outcome.cost for one in made.answers["chosen"]]
    scores = [one.score for one in made.answers["chosen"]]
    assert right.collections[-1].get_offsets()[0].tolist() == pytest.approx([sum(costs) / 3, sum(scores) / 3])


# Which model it is for.


def other_model(kind: str) -> Any:
    """A copy of the tiny model of another shape or with other weights."""
    torch.manual_seed(9)
    config = tiny("llama").config if kind == "weights" else None
    if kind == "depth":
        config = type(tiny("llama").config)(**(tiny("llama").config.to_dict() | {"num_hidden_layers": 8}))
    if kind == "type":
        config = tiny("qwen2").config
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.mark.parametrize("way", ["object", "file"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "weights",
            r"this model is LlamaForCausalLM \(llama, 6 layers, hidden size 64\), of the same shape but with oth",
        ),
        ("depth", r"this model is LlamaForCausalLM \(llama, 8 layers, hidden size 64\); calibrate this one"),
        ("type", r"this model is Qwen2ForCausalLM \(qwen2, 6 layers, hidden size 64\); calibrate this one, or drop"),
    ],
)
def test_settings_are_refused_by_another_model(made, model, tmp_path: Path, kind: str, words: str, way: str) -> None:
    config = made.config
    if way == "file":
        made.save(tmp_path / "own.json")
        config = flexasl.ASLConfig.load(tmp_path / "own.json")
    assert config.calibrated_for == made.config.calibrated_for is not None
    flexasl.patch(model, config.replace(select_tokens=50)).remove()
    other = other_model(kind)
    with pytest.raises(flexasl.ConfigError, match=rf"calibrated for {config.calibrated_for.model} \(llama, 6.*{words}"):
        flexasl.patch(other, config.replace(select_tokens=50))
    assert not hasattr(other, "flexasl_patch")
    if kind != "depth":
        flexasl.patch(other, config.replace(calibrated_for=None)).remove()


def test_weights_of_another_dtype_or_out_of_reach_are_known_by_their_shape(made, model) -> None:
    flexasl.patch(copy.deepcopy(model).to(torch.bfloat16), made.config).remove()
    unknown = made.config.replace(calibrated_for=dataclasses.replace(made.config.calibrated_for, weights=None))
    flexasl.patch(other_model("weights"), unknown).remove()
    with pytest.raises(flexasl.ConfigError, match="this model is"):
        flexasl.patch(other_model("depth"), unknown)


def test_states_of_another_depth_are_refused(made) -> None:
    states = torch.randn(7, 1, 4, 60, 8)
    with pytest.raises(flexasl.ConfigError, match=r"calibrated for .*, and this model has 7 layers"):
        flexasl.replay(states, states, made.config.replace(select_tokens=20))


def test_a_model_is_no_setting(made) -> None:
    plain = made.config.replace(calibrated_for=None)
    assert plain == made.config and hash(plain) == hash(made.config)
    assert "calibrated_for" not in plain.to_dict() and "calibrated_for" in made.config.to_dict()
    assert flexasl.ASLConfig.from_dict(made.config.to_dict()).calibrated_for == made.config.calibrated_for
    for wrong, words in (
        ("tiny", "does not name a model; it holds dtype, hidden_size, model,"),
        ({"model": "tiny"}, "does not name a model"),
        (made.config.to_dict()["calibrated_for"] | {"num_layers": "6"}, "num_layers='6' is not a whole number"),
        (made.config.to_dict()["calibrated_for"] | {"weights": 3}, "weights=3 is an int; give a text or None"),
    ):
        with pytest.raises(flexasl.ConfigError, match=words):
            flexasl.ASLConfig.from_dict({"calibrated_for": wrong})


def test_settings_of_another_model_can_be_calibrated_anew(made, model) -> None:
    other = copy.deepcopy(model)
    other.lm_head.weight.data *= 1.1
    few = FEW | {"unseen": None, "samples": 1, "tasks": ["needle"]}
    again = flexasl.calibrate(other, tiny_tokenizer(), made.config, **few)
    assert again.config.calibrated_for.weights != made.config.calibrated_for.weights


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "samples=0 is too small; give at least 1"),
        ({"tasks": ()}, r"tasks=\(\) is empty"),
        ({"tasks": ("needles",)}, "task='needles' is not known"),
        ({"unseen": "needle"}, "unseen='needle' is among the tasks"),
        ({"tasks": ("qa_1",)}, "task='qa_1' needs questions"),
        ({"length": 2000}, "longer than the model's context of 1024 tokens"),
        ({"length": 60}, "length=60 is too short"),
        (
            {"config": flexasl.ASLConfig()},
            "select_tokens=2048 is not smaller than a prompt of task 'needle', which has",
        ),
        ({"config": CONFIG.replace(select_tokens=1.0)}, "select_tokens=1.0 is not smaller"),
    ],
)
def test_refuses_before_the_model_runs(model, monkeypatch: pytest.MonkeyPatch, changes, words: str) -> None:
    monkeypatch.setattr(calibrating, "record", None)
    with pytest.raises(flexasl.FlexASLError, match=words):
        flexasl.calibrate(model, tiny_tokenizer(), **({"config": CONFIG} | FEW | changes))


def test_refuses_models_and_tokenizers_that_it_cannot_use(model) -> None:
    with pytest.raises(flexasl.UnsupportedError, match="model is a Linear; calibration takes a transformers causal"):
        flexasl.calibrate(torch.nn.Linear(2, 2), tiny_tokenizer(), CONFIG, **FEW)
    with flexasl.patch(model), pytest.raises(flexasl.UnsupportedError, match="patched already"):
        flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **FEW)
    sample = build("needle", tiny_tokenizer(), 300)
    with pytest.raises(flexasl.FlexASLError, match="SimpleNamespace does not say where in a text its tokens are"):
        locate(SimpleNamespace(is_fast=False), sample)


def test_refuses_answers_that_do_not_stand_in_the_prompt() -> None:
    about = {"task": "longbook_choice_eng", "length": 9, "index": 0, "prompt_tokens": 5, "max_new_tokens": 1}
    sample = Sample(prompt="A text.", references=("Yes",), **about)
    with pytest.raises(flexasl.FlexASLError, match="task='longbook_choice_eng' has an answer, 'Yes', that does not"):
        locate(tiny_tokenizer(), sample)


def test_refuses_names_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    for name, words in (("a.txt", "does not end in .json"), ("a.json", "is a folder"), ("b/c.json", "does not exist")):
        with pytest.raises(flexasl.FlexASLError, match=words):
            files_of(tmp_path / name)


@pytest.mark.slow
def test_the_embedded_model_keeps_most_answers() -> None:
    model, tokenizer = run.load_model(None)
    config = flexasl.ASLConfig(select_tokens=192)
    few = {"tasks": ["needle", "by_meaning"], "unseen": None, "samples": 2, "length": 1536}
    made = flexasl.calibrate(model, tokenizer, config, **few)
    assert made.chosen.held >= max(3, made.default.held) and made.chosen.waited <= 1
    assert made.chosen.cost <= made.default.cost < 0.8
    assert made.fixed_layers[1].held < 4, "the first layers do not know yet"
    assert made.fixed_layers[17].held >= 3
    needle = {name: side[0] for name, side in made.answers.items()}
    assert needle["chosen"].outcome.held and needle["chosen"].outcome.cost < 0.8
    assert {one.score for one in needle.values()} == {1}, "the number in prose is answered each way"
