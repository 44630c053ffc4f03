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
from flexasl.replaying import replay_scores
from flexasl.tools.calibration import calibrating
from flexasl.tools.calibration.choosing import SETTINGS, Judged, candidates, choose, default_of, paper_of, settings_of
from flexasl.tools.calibration.evidence import files_of
from flexasl.tools.calibration.recording import Prompt, Recording, locate, record
from flexasl.tools.calibration.tables import Outcome, Table, holds_answers
from flexasl.tools.evaluation import build
from flexasl.tools.evaluation.costs import layer_costs, prefill_share
from flexasl.tools.evaluation.samples import Sample
from flexasl.tools.text import encode

CONFIG = flexasl.ASLConfig(select_tokens=100, window=8, kernel_size=3, pooling="avgpool", score_power=1, contrast=False)
FEW = {"tasks": ("needle", "number_string"), "unseen": "niah_single_2", "samples": 3, "length": 300}


@pytest.fixture(scope="module")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def made(model):
    return flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **FEW)


def prompt_of(*answers, tokens=0, task="needle", index=0):
    return Prompt(task=task, index=index, ids=[0] * tokens, answers=answers)


def recorded(layers, prefix, seed, noise=0.6):
    """Scores of which some tokens stay high from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    steady = torch.rand(prefix, generator=generator)
    scores = steady + noise * torch.rand(layers, prefix, generator=generator)
    scores[0, :3] = scores[0, 3]  # ties
    answer = tuple(scores[-1].topk(6).indices.tolist())
    return Recording(prompt=prompt_of((answer,), ((1, 2, 3), (prefix + 1,))), scores=scores)


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


def test_an_answer_stays_with_nine_tenths_of_one_whole_statement() -> None:
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
        recordings, ranking_layers = record(model, prompts, CONFIG, counted.append)
    finally:
        handle.remove()
    assert (len(runs), counted) == (2, [1, 2])
    assert not hasattr(model, "flexasl_patch")
    config = CONFIG.replace(select_tokens=40, tau=0.9)
    for recording in recordings:
        with flexasl.patch(model, config) as patch, torch.no_grad():
            model(torch.tensor([recording.prompt.ids]))
        row, voting = patch.report.rows[0], patch.ranking_layers
        assert ranking_layers == voting
        replayed = replay_scores(recording.scores, config, ranking_layers=ranking_layers)
        assert replayed.selected_layer == row.selected_layer is not None
        assert tuple(replayed.selected.tolist()) == row.kept_positions
        assert (tuple(replayed.eval_layers), tuple(replayed.variance)) == (row.eval_layers, row.variance)


# What is looked up.


def test_recorded_scores_are_replayed_as_states_are() -> None:
    query, key = torch.randn(7, 1, 4, 60, 8), torch.randn(7, 1, 2, 60, 8)
    for config in (CONFIG.replace(select_tokens=20, tau=0.9), flexasl.ASLConfig.paper(select_tokens=40, tau=1.0)):
        want = flexasl.replay(query, key, config)[0]
        full = flexasl.replay(query, key, config.replace(tau=1e-9, max_layer=6, if_never="keep"))[0]
        assert full.scored_layers == list(range(7))
        row = replay_scores(full.scores, config)
        assert row.selected_layer == want.selected_layer
        assert row.selected is want.selected or torch.equal(row.selected, want.selected)
        for name in ("eval_layers", "variance", "variance_ratio", "union_size"):
            assert row[name] == want[name]
        assert torch.equal(row.ranks, want.ranks[row.scored_layers])


@pytest.mark.parametrize("ranking_layers", [None, [0, 2, 3, 5, 6, 8, 9, 11]])
def test_the_table_is_what_the_rule_decides(ranking_layers: list[int] | None) -> None:
    costs = layer_costs(tiny("mistral_sliding")) * 2
    choose_one, tried, layers_seen = Random(0), 0, set()
    for seed in range(8):
        recording = recorded(len(costs), 150, seed)
        rules = candidates(CONFIG.replace(select_tokens=60), len(costs), ranking_layers)
        table = Table(recording, CONFIG.replace(select_tokens=60), costs, ranking_layers)
        for rule in choose_one.sample(rules, min(40, len(rules))):
            rule = rule.replace(if_never=choose_one.choice(["select", "keep"]), tau=choose_one.choice([rule.tau, 0.95]))
            told, outcome = replay_scores(recording.scores, rule, ranking_layers=ranking_layers), table.outcome(rule)
            assert outcome.layer == told.selected_layer
            layers_seen.add(outcome.layer)
            if told.selected is None:
                assert outcome == (None, True, 1.0)
                continue
            assert outcome.kept == holds_answers(recording.prompt, told.selected.tolist())
            assert 0 < outcome.cost < 1 or outcome == (len(costs) - 1, outcome.kept, 1.0)
            tried += 1
        for layer in table.ranking_layers:
            rule = flexasl.policies.FixedLayer(layer).resolve(
                CONFIG.replace(select_tokens=60), len(costs), ranking_layers
            )
            assert table.fixed(layer) == table.outcome(rule)
            assert (
                table.fixed(layer).layer
                == replay_scores(recording.scores, rule, ranking_layers=ranking_layers).selected_layer
            )
    assert tried > 100 and None in layers_seen and len(layers_seen) > 4


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_cost_is_that_of_the_real_run(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 199, (1, 100))
    config = CONFIG.replace(select_tokens=40, tau=0.9)
    prompt = Prompt(task="needle", index=0, ids=ids[0].tolist(), answers=())
    (recording,), ranking_layers = record(model, [prompt], config, lambda done: None)
    with flexasl.patch(model, config) as patch, torch.no_grad():
        model(ids)
    outcome = Table(recording, config, layer_costs(model), ranking_layers).outcome(patch.config)
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
            assert rule.replace(**settings_of(flexasl.ASLConfig())).resolve(layers, ranking_layers) == rules[0]
    assert layers < 6 or {rule.select_on for rule in rules} == {"last", "max", "recent"}


def test_what_is_given_beside_the_settings_stays() -> None:
    config = CONFIG.replace(kv_budget=50, tau=0.7, max_layer=4, if_never="keep")
    assert default_of(config) == CONFIG.replace(kv_budget=50, if_never="keep")
    paper = paper_of(config)
    assert paper == flexasl.ASLConfig.paper(select_tokens=100, window=8, kernel_size=3, kv_budget=50)
    assert all(rule.kv_budget == 50 and rule.select_tokens == 100 for rule in candidates(config, 12))


def judged(kept: str, cost: float, **settings) -> Judged:
    rule = flexasl.ASLConfig(**({"min_layer": 10, "max_layer": 21, "tau": 0.4, "observe_layers": 8} | settings))
    return Judged(name="", rule=rule, outcomes=tuple(Outcome(3, letter == "y", cost) for letter in kept))


def test_the_cheapest_within_one_prompt_of_the_best() -> None:
    default, every = judged("y" * 10, 0.8), range(10)
    cheap, cheaper = judged("y" * 9 + "n", 0.6, tau=0.5), judged("y" * 8 + "nn", 0.3, tau=0.6)
    assert choose([default, cheap, cheaper], every, default.rule) is cheap
    assert choose([default, cheaper], every, default.rule) is default
    assert choose([default, cheap], range(1, 10), default.rule) is default, "of nine prompts none may be lost"
    better = judged("y" * 10, 0.6, tau=0.2, max_layer=15)
    assert choose([default, cheap, better], every, default.rule) is better, "of equal cost the one that keeps more"
    assert choose([default, cheaper], range(8), default.rule) is cheaper, "only the prompts that it is given count"


def test_ties_go_towards_the_defaults() -> None:
    default, every = judged("yyyy", 0.8), range(4)
    far, near, nearer = (
        judged("yyyy", 0.6, **own) for own in ({"tau": 0.3, "min_layer": 9}, {"tau": 0.7}, {"tau": 0.5})
    )
    assert choose([far, near], every, default.rule) is near, "fewer changes"
    assert choose([far, near, nearer], every, default.rule) is nearer, "smaller ones"
    assert choose([far, near, judged("yyyy", 0.6)], every, default.rule).rule == default.rule


def test_the_choice_sees_half_of_the_prompts_of_the_seen_tasks(made) -> None:
    assert len(made.prompts) == 9
    used = {(made.prompts[at][0], made.prompts[at][1]) for at in made.choosing}
    assert used == {(task, index) for task in ("needle", "number_string") for index in (0, 2)}
    rest = {(made.prompts[at][0], made.prompts[at][1]) for at in made.checking}
    assert rest == {("needle", 1), ("number_string", 1), *(("niah_single_2", index) for index in range(3))}
    assert all(200 < tokens <= 300 for _, _, tokens in made.prompts)


def test_what_is_chosen_does_in_the_model_what_was_foretold(model, made) -> None:
    assert settings_of(made.config) == made.chosen.settings and made.chosen in made.candidates
    assert made.config == CONFIG.replace(**made.chosen.settings)
    tokenizer = tiny_tokenizer()
    for (task, index, tokens), outcome in zip(made.prompts, made.chosen.outcomes, strict=True):
        sample = build(task, tokenizer, 300, 0, index)
        with flexasl.patch(model, made.config) as patch, torch.no_grad():
            model(torch.tensor([encode(tokenizer, sample.prompt)]))
        row = patch.report.rows[0]
        assert (row.prompt_tokens, row.selected_layer) == (tokens, outcome.layer)
        assert holds_answers(locate(tokenizer, sample), row.kept_positions) == outcome.kept
        assert prefill_share(layer_costs(model), patch.report) == outcome.cost


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
    assert {stage for stage, done, total in stages if done == total} == {"prompts", "runs", "candidates"}
    assert max(done for stage, done, _ in stages if stage == "runs") == 9


def test_without_an_unseen_task(model) -> None:
    few = FEW | {"unseen": None, "samples": 2, "tasks": ["needle"]}
    one = flexasl.calibrate(model, tiny_tokenizer(), CONFIG, **few)
    assert [len(side) for side in (one.choosing, one.checking)] == [1, 1]


# What is written.


def test_files_and_what_is_in_them(made, tmp_path: Path) -> None:
    paths = made.save(tmp_path / "own.json")
    assert [path.name for path in paths] == ["own.json", "own.evidence.json", "own.md", "own.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert flexasl.ASLConfig.load(paths[0]) == made.config
    data = json.loads(paths[1].read_text())
    assert flexasl.ASLConfig.from_dict(data["config"]) == made.config
    assert len(data["candidates"]) == len(made.candidates) and len(data["fixed_layers"]) == 6
    assert data["candidates"][0]["settings"] == made.default.settings
    for side, prompts in (("choice", made.choosing), ("check", made.checking)):
        told = data["chosen"][side]
        assert (told["prompts"], told["kept"]) == (len(prompts), made.chosen.kept(prompts))
    assert [prompt["used_for"] for prompt in data["prompts"]].count("check") == 5
    text = paths[2].read_text()
    assert "**chosen**" in text and "own.png" in text and "the paper's rule" in text and "fixed layer" in text
    for name in SETTINGS:
        assert f"| `{name}` | {made.chosen.settings[name]} | {made.default.settings[name]} |" in text
    assert paths[3].read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_every_candidate(made) -> None:
    left, right = made.plot().axes
    assert len(left.collections[0].get_offsets()) == len(made.candidates)
    assert len(left.lines[0].get_xdata()) == 6
    chosen = right.collections[-1].get_offsets()[0].tolist()
    assert chosen == pytest.approx([made.chosen.cost(made.checking), made.chosen.kept(made.checking) / 5])


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
    few = FEW | {"unseen": None, "samples": 2, "tasks": ["needle"]}
    again = flexasl.calibrate(other, tiny_tokenizer(), made.config, **few)
    assert again.config.calibrated_for.weights != made.config.calibrated_for.weights


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 1}, "samples=1 is too few to choose on some and check on others; give at least 2"),
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
    from flexasl import run

    model, tokenizer = run.load_model(None)
    config = flexasl.ASLConfig(select_tokens=192, kernel_size=7, pooling="avgpool")
    made = flexasl.calibrate(
        model, tokenizer, config, tasks=["needle", "number_string"], unseen="passkey", samples=2, length=768
    )
    assert made.chosen.kept(made.choosing) == 2
    assert made.chosen.cost(made.choosing) < 0.95
    assert made.fixed_layers[4].kept(range(6)) == 0, "the first layers do not know yet"
    assert made.fixed_layers[21].kept(range(6)) >= 5
    assert made.paper.cost(made.choosing) > made.chosen.cost(made.choosing)
