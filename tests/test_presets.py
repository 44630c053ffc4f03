"""Presets: what they fill in, and where they keep out."""

import json

import pytest
import torch
from models import LAYERS, tiny

import flexasl
from flexasl import presets
from flexasl.presets import ModelKind, Preset, fill
from flexasl.report import Report

FOUND = {"min_layer": 3, "max_layer": 4, "tau": 0.55, "observe_layers": 3}
KIND = ModelKind("llama", LAYERS, 64)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, KIND, Preset("Tiny", FOUND))


def settings_on(model, config=None, policy="asl"):
    with flexasl.patch(model, config, policy=policy) as patch:
        return {name: getattr(patch.config, name) for name in FOUND}, patch.preset


@pytest.mark.usefixtures("known")
def test_a_preset_fills_in_what_is_open() -> None:
    assert settings_on(tiny("llama")) == (FOUND, "Tiny")
    assert settings_on(tiny("llama"), policy="asl_two_pass") == (FOUND, "Tiny")
    assert settings_on(tiny("qwen2"))[1] is None, "another model"
    assert fill(flexasl.ASLConfig(), KIND._replace(hidden_size=65)) == (flexasl.ASLConfig(), None)


@pytest.mark.usefixtures("known")
def test_what_the_user_gives_wins() -> None:
    assert settings_on(tiny("llama"), flexasl.ASLConfig(tau=0.2)) == (FOUND | {"tau": 0.2}, "Tiny")
    every = {"min_layer": 2, "max_layer": 5, "tau": 0.1, "observe_layers": 2}
    assert settings_on(tiny("llama"), flexasl.ASLConfig(**every)) == (every, None)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    "config",
    [
        flexasl.ASLConfig.paper(),
        flexasl.ASLConfig(variance_reference="initial"),
        flexasl.ASLConfig(select_on="last"),
        flexasl.ASLConfig(select_on="max"),
        flexasl.ASLConfig(max_layer=2),
        flexasl.ASLConfig(observe_layers=5),
    ],
)
def test_where_a_preset_keeps_out(config) -> None:
    found, name = settings_on(tiny("llama"), config)
    plain = config.resolve(LAYERS)
    assert (found, name) == ({setting: getattr(plain, setting) for setting in FOUND}, None)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("policy", ["fixed_layer", "gemfilter", "snapkv", "full"])
def test_other_policies_take_none(policy: str) -> None:
    assert settings_on(tiny("llama"), policy=policy)[1] is None


@pytest.mark.usefixtures("known")
def test_the_report_names_it() -> None:
    config = flexasl.ASLConfig(select_tokens=24, window=8)
    reports = []
    for chosen in (config, config.replace(select_on="last")):
        with flexasl.patch(tiny("llama"), chosen) as patch, torch.no_grad():
            tiny("llama")(torch.arange(3, 63)[None])
        reports.append(patch.report)
    with_one, without = reports
    assert with_one.preset == "Tiny" and "preset Tiny" in str(with_one)
    assert without.preset is None and "preset" not in str(without)
    data = json.loads(json.dumps(with_one.to_dict()))
    assert Report.from_dict(data) == with_one
    del data["preset"]
    assert Report.from_dict(data).preset is None, "a report of before"


def test_every_preset_is_one_that_its_model_can_run() -> None:
    for kind, preset in presets.PRESETS.items():
        filled, name = fill(flexasl.ASLConfig(), kind)
        assert name == preset.name
        filled.resolve(kind.num_layers)
