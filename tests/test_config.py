"""Every setting: what it takes, what it refuses, and what it becomes on a model."""

import json

import numpy as np
import pytest
import torch

from flexasl import ASLConfig, ConfigError, Stage, policies


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_tokens": 16}, "select_tokens=16 does not exceed window=32"),
        ({"select_tokens": 32}, "give at least 33"),
        ({"select_tokens": 0.0}, "select_tokens=0.0 is not a share of the prompt"),
        ({"select_tokens": 1.5}, "select_tokens=1.5 is not a share of the prompt"),
        ({"select_tokens": "many"}, "select_tokens='many' is not an amount"),
        ({"select_tokens": True}, "select_tokens=True is not an amount"),
        ({"select_tokens": None}, "select_tokens=None is not an amount"),
        ({"kv_budget": 8}, "kv_budget=8 does not exceed window=32"),
        ({"kv_budget": -0.5}, "kv_budget=-0.5 is not a share"),
        ({"kv_top_p": 0}, r"kv_top_p=0 is out of range; give a number in \(0, 1\]"),
        ({"kv_top_p": 0.9, "kv_budget": 64}, "kv_budget=64 and kv_top_p=0.9 exclude each other"),
        ({"tau": 0}, "tau=0 is out of range"),
        ({"tau": 1.1}, "tau=1.1 is out of range"),
        ({"tau": float("nan")}, "tau=nan is out of range"),
        ({"min_layer": 4, "observe_layers": 6}, "min_layer=4 leaves fewer than observe_layers=6"),
        ({"min_layer": -1}, "min_layer=-1 is too small"),
        ({"min_layer": 2.0}, "min_layer=2.0 is not a whole number"),
        ({"max_layer": 3, "min_layer": 5}, "max_layer=3 comes before min_layer=5"),
        ({"max_layer": 3, "observe_layers": 8}, "max_layer=3 leaves fewer than observe_layers=8"),
        ({"observe_layers": 0}, "observe_layers=0 is too small"),
        ({"window": 0}, "window=0 is too small"),
        ({"window": None}, "window=None is not a whole number"),
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"kernel_size": -1}, "kernel_size=-1 is too small"),
        ({"pooling": "mean"}, "pooling='mean' is not known; give 'avgpool' or 'maxpool' or 'phrase'"),
        ({"score_power": 0.5}, "score_power=0.5 is too small; give a number of at least 1, or 'max'"),
        ({"score_power": float("inf")}, "score_power=inf is out of range; give a number of at least 1, or 'max'"),
        ({"score_power": "sum"}, "score_power='sum' is out of range"),
        ({"variance_reference": "first"}, "variance_reference='first' is not known"),
        ({"select_on": "mean"}, "select_on='mean' is not known"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4' is not known; give 'int8' or 'fp8' or None"),
        ({"settled_by": "tau"}, "settled_by='tau' is not known; give 'lookup' or 'variance' or None"),
        ({"contrast": 1}, "contrast=1 is not known; give True or False or None"),
        (
            {"settled_by": "lookup", "observe_layers": 2},
            "observe_layers=2 has no effect with settled_by='lookup'; give one of the two",
        ),
        (
            {"settled_by": "lookup", "variance_reference": "peak"},
            "variance_reference='peak' has no effect with settled_by='lookup'",
        ),
        ({"settled_by": "variance", "stages": "0.5@2"}, "stages='0.5@2' does not go with settled_by='variance'"),
        ({"observe_layers": 2, "stages": "0.5+99"}, r"stages='0.5\+99' does not go with settled_by='variance'"),
        ({"stages": 0.5}, "stages=0.5 is not a list; give a list of texts such as '0.5@5-9'"),
        ({"stages": [0.5]}, "stages holds 0.5; give texts such as"),
        ({"stages": "half"}, "stages holds 'half'; give texts such as"),
        ({"stages": "0.5+"}, "stages holds ''; give texts such as"),
        ({"stages": "0.5@9-5"}, "stages: max_layer=5 comes before min_layer=9; give at least 9"),
        ({"stages": "1.5"}, "stages: tokens=1.5 is not a share of the prompt"),
        ({"stages": "1"}, "stages: tokens=1 is too small; give at least 2"),
        ({"stages": {"layers": 3}}, "stages holds {'layers': 3}; give tokens, and of tau, min_layer, max_layer some"),
        ({"stages": {"tokens": 0.5, "tau": 2}}, r"stages: tau=2 is out of range; give a number in \(0, 1\]"),
        ({"stages": {"tokens": 0.5, "min_layer": -1}}, "stages: min_layer=-1 is too small; give at least 0"),
        ({"if_never": "raise"}, "if_never='raise' is not known; give 'select' or 'keep' or None"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ASLConfig(**settings)
    assert "\n" not in str(error.value) and ". " not in str(error.value), "one sentence"


@pytest.mark.parametrize(
    "given",
    [
        "0.5@5-9+300@7+.25",
        ["0.5@5-9", "300@7", "0.25"],
        (Stage(tokens=0.5, min_layer=5, max_layer=9), {"tokens": 300, "min_layer": 7, "max_layer": 7}, "0.25"),
        [
            Stage(tokens=np.float32(0.5), min_layer=np.int64(5), max_layer=torch.tensor(9)),
            Stage(tokens=np.int32(300), min_layer=7, max_layer=7),
            Stage(tokens=np.float64(0.25)),
        ],
    ],
)
def test_stages_in_every_form(given):
    config = ASLConfig(stages=given)
    first, second = Stage(tokens=0.5, min_layer=5, max_layer=9), Stage(tokens=300, min_layer=7, max_layer=7)
    assert config.stages == (first, second, Stage(tokens=0.25))
    assert "+".join(map(str, config.stages)) == "0.5@5-9+300@7+0.25"
    assert ASLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for one in config.stages:
        assert {type(value) for value in vars(one).values()} <= {int, float, type(None)}


def test_one_stage_needs_no_list_and_none_has_a_text():
    one = ASLConfig(stages=Stage(tokens=0.5))
    assert ASLConfig(stages={"tokens": 0.5}) == ASLConfig(stages="0.5") == one
    assert ASLConfig(stages="none") == ASLConfig(stages="") == ASLConfig(stages=[]) == ASLConfig(stages=())
    assert ASLConfig(stages=()) != ASLConfig(), "the default is a third of the tokens"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, "lookup"),
        ({"tau": 0.1, "stages": "0.3"}, "lookup"),
        ({"observe_layers": 2}, "variance"),
        ({"variance_reference": "peak"}, "variance"),
        ({"settled_by": "variance", "stages": ()}, "variance"),
    ],
)
def test_the_rule_that_settings_imply(settings, rule):
    config = ASLConfig(**settings)
    assert config.rule == rule == config.resolve(12).settled_by
    assert config.resolve(12).resolve(12) == config.resolve(12)
    assert (config.resolve(12).observe_layers is None) == (rule == "lookup")
    assert ASLConfig.from_dict(json.loads(json.dumps(config.resolve(12).to_dict()))) == config.resolve(12)


def test_look_ups_are_sought_in_layers_that_see_the_whole_prompt():
    every_fourth = [3, 7, 11, 15, 19, 23]
    config = ASLConfig().resolve(24, every_fourth)
    assert (config.score_from, config.min_layer, config.max_layer) == (3, 11, 15)
    assert config.stages == (Stage(tokens=0.5, tau=0.4, min_layer=3, max_layer=3),), "half at a range's only layer"
    assert config.tau == 0.123 == pytest.approx(0.2 * 0.85**3, abs=1e-3), "a third of the depth is layer 8"
    config = ASLConfig(stages="0.5@2-12+0.3@8-23", min_layer=12, max_layer=22, score_from=2).resolve(24, every_fourth)
    assert (config.score_from, config.min_layer, config.max_layer) == (3, 15, 19)
    assert [(one.min_layer, one.max_layer) for one in config.stages] == [(3, 11), (11, 23)]
    for settings, message in (
        ({"max_layer": 2}, "max_layer=2 leaves no layer to select at; layers with full attention are 3, 7, 11"),
        ({"stages": "0.5@1-2"}, "stages: max_layer=2 leaves no layer to select at"),
        ({"min_layer": 12, "max_layer": 14}, "min_layer=12 leaves no layer to select at"),
        ({"score_from": 8, "min_layer": 7}, "score_from=8 comes behind layer 7, .*; give at most 7"),
        ({"score_from": 8, "max_layer": 7}, "score_from=8 comes behind layer 7, .*; give at most 7"),
        ({"score_from": 4, "stages": "0.5@3"}, "score_from=4 comes behind layer 3, .*; give at most 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            ASLConfig(**settings).resolve(24, every_fourth)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor])
def test_integers_of_other_libraries_become_pythons(kind):
    given = {"select_tokens": 40, "kv_budget": 40, "window": 8, "kernel_size": 3, "observe_layers": 2}
    given |= {"min_layer": 1, "max_layer": 3}
    config = ASLConfig(**{name: kind(value) for name, value in given.items()})
    assert config == ASLConfig(**given) and json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert all(type(getattr(config, name)) is int for name in given)


@pytest.mark.parametrize("wrong", [np.arange(2), np.bool_(True), torch.ones(2), np.array([40, 41])])
def test_refuses_arrays_where_an_integer_belongs(wrong):
    for name in ("select_tokens", "kv_budget", "window", "max_layer"):
        with pytest.raises(ConfigError, match=f"{name}="):
            ASLConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_layer": 12, "observe_layers": 2},
            "min_layer=12 is beyond the model, which has 12 layers; give at most 11",
        ),
        ({"observe_layers": 13}, "observe_layers=13 is beyond the model"),
        ({"max_layer": 40}, "max_layer=40 is beyond the model"),
        (
            {"stages": "0.5@9-10"},
            "stages: min_layer=9 comes after max_layer=7, where the final selection is",
        ),
        ({"stages": "0.5@5", "max_layer": 4}, "stages: min_layer=5 comes after max_layer=4"),
        ({"stages": "0.5@3-40"}, "stages: max_layer=40 is beyond the model, which has 12 layers; give at most 11"),
    ],
)
def test_refuses_layers_that_the_model_lacks(settings, message):
    with pytest.raises(ConfigError, match=message):
        ASLConfig(**settings).resolve(12)


@pytest.mark.parametrize("layer", [-1, 12, 3.0])
def test_fixed_layer_refuses_layers_that_the_model_lacks(layer):
    with pytest.raises(ConfigError, match=f"layer={layer} is not a layer of this model; give an int from 0 to 11"):
        policies.FixedLayer(layer).resolve(ASLConfig(), 12)


def test_defaults_of_look_ups_fit_every_depth():
    for layers in range(1, 130):
        for among in (None, range(layers)[::2], range(layers)[-1:]):
            config = ASLConfig().resolve(layers, among)
            assert config.score_from <= config.min_layer <= config.max_layer < layers
            assert config.resolve(layers, among) == config
            for stage in config.stages:
                assert config.score_from <= stage.min_layer <= stage.max_layer <= config.min_layer


@pytest.mark.parametrize("reference", ["initial", "peak"])
def test_defaults_fit_every_depth(reference):
    for layers in range(1, 130):
        config = ASLConfig(variance_reference=reference).resolve(layers)
        assert 0 <= config.observe_layers - 1 <= config.min_layer <= config.max_layer < layers
        assert config.resolve(layers) == config


def test_papers_defaults_for_a_deep_stack():
    config = ASLConfig.paper().resolve(32)
    assert (config.min_layer, config.observe_layers, config.max_layer, config.if_never) == (10, 8, 31, "keep")
    assert (config.tau, config.window, config.kernel_size, config.select_tokens) == (0.3, 32, 7, 2048)
    assert config.pooling == "avgpool"


def test_initial_reference_alone_keeps_all_where_ranks_never_settle():
    assert ASLConfig(variance_reference="initial").resolve(30).if_never == "keep"
    assert ASLConfig(variance_reference="initial", max_layer=20).resolve(30).if_never == "select"
    assert ASLConfig().resolve(30).if_never == "select"


def test_own_defaults_for_the_embedded_depth():
    config = ASLConfig().resolve(30)
    assert (config.score_from, config.min_layer, config.max_layer, config.tau) == (3, 10, 20, 0.2)
    assert config.stages == (Stage(tokens=0.3, tau=0.4, min_layer=3, max_layer=7),)
    assert (config.kernel_size, config.pooling, config.score_power) == (17, "phrase", "max")
    assert (config.contrast, config.select_on, config.if_never) == (True, "recent", "select")
    config = ASLConfig(settled_by="variance").resolve(30)
    assert (config.min_layer, config.max_layer, config.observe_layers, config.tau) == (11, 20, 4, 0.05)
    assert (config.kernel_size, config.pooling, config.stages) == (25, "maxpool", ())


@pytest.mark.parametrize("policy", ["fixed_layer", "snapkv", "pyramid_kv", "pyramid_infer"])
def test_other_methods_pool_as_published(policy):
    config = policies.find_policy(policy).resolve(ASLConfig(), 30)
    assert (config.kernel_size, config.pooling) == (7, "avgpool")
    wider = policies.find_policy(policy).resolve(ASLConfig(kernel_size=15), 30)
    assert (wider.kernel_size, wider.pooling) == (15, "avgpool")


def test_one_bound_pulls_the_other_defaults_along():
    config = ASLConfig(max_layer=3).resolve(30)
    assert (config.score_from, config.min_layer, config.max_layer) == (3, 3, 3)
    assert ASLConfig(min_layer=2).resolve(30).score_from == 2
    config = ASLConfig(settled_by="variance", max_layer=3).resolve(30)
    assert (config.observe_layers, config.min_layer, config.max_layer) == (4, 3, 3)
    assert ASLConfig(settled_by="variance", min_layer=2).resolve(30).observe_layers == 3


def test_shares_of_the_prompt():
    config = ASLConfig(select_tokens=0.25, kv_budget=0.1, window=16)
    assert (config.token_budget(1001), config.cache_budget(1001)) == (250, 100)
    assert config.token_budget(20) == 17
    assert ASLConfig(select_tokens=512).token_budget(100) == 512
    assert ASLConfig().cache_budget(100) is None


def test_dict_round_trip():
    config = ASLConfig(select_tokens=0.5, tau=0.2, kv_budget=99)
    assert ASLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="'budget' is not a setting of ASLConfig"):
        ASLConfig.from_dict({"budget": 3})


def test_load(tmp_path):
    file = tmp_path / "settings.json"
    config = ASLConfig(select_tokens=0.5, tau=0.2, max_layer=9)
    file.write_text(json.dumps(config.to_dict()))
    assert ASLConfig.load(file) == ASLConfig.load(str(file)) == config
    file.write_text('{"select_tokens": 300}')
    assert ASLConfig.load(file) == ASLConfig(select_tokens=300), "what is not there is at its default"
    for text, reason in (
        ("{", "it is not JSON"),
        ("[1]", "settings are a list; give a dict"),
        ('{"budget": 3}', "'budget' is not a setting"),
        ('{"tau": 7}', "tau=7 is out of range"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"settings.json holds no settings of ASLConfig: {reason}"):
            ASLConfig.load(file)
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist; give a JSON file of settings"):
        ASLConfig.load(tmp_path / "none.json")


def test_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        ASLConfig().tau = 0.1
    with pytest.raises(TypeError):
        ASLConfig(512)
