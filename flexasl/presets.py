"""Settings found by calibration, for models that are known, in place of those that a depth alone would give."""

from __future__ import annotations

from typing import Any, NamedTuple

from flexasl.config import ASLConfig
from flexasl.errors import ConfigError


class ModelKind(NamedTuple):
    """By what a model is known."""

    model_type: str
    num_layers: int
    hidden_size: int


class Preset(NamedTuple):
    """What calibration found for a model, with the default `variance_reference` and `select_on`."""

    name: str
    """As reports call it."""
    settings: dict[str, Any]
    """Some of `min_layer`, `max_layer`, `tau` and `observe_layers`, which are None unless the user gives them."""


PRESETS: dict[ModelKind, Preset] = {
    # docs/defaults.md: the model that the defaults were found on, but for the last layer.
    ModelKind("llama", 30, 576): Preset(
        "SmolLM2-135M", {"min_layer": 11, "max_layer": 17, "tau": 0.05, "observe_layers": 4}
    ),
}


def fill(config: ASLConfig, kind: ModelKind) -> tuple[ASLConfig, str | None]:
    """The config with settings that are None filled in from the model's preset, and the preset's name.

    A setting that is given stays. The config comes back as it is, with None, where no preset is known, where it
    fills in nothing, where the config has another rule than presets are found for (`variance_reference` or `select_on`
    are not the defaults, as in `ASLConfig.paper()`), and where the layers that are given leave no room for it.
    """
    preset, plain = PRESETS.get(kind), ASLConfig()
    if preset is None or (config.variance_reference, config.select_on) != (plain.variance_reference, plain.select_on):
        return config, None
    missing = {name: value for name, value in preset.settings.items() if getattr(config, name) is None}
    if not missing:
        return config, None
    try:
        return config.replace(**missing), preset.name
    except ConfigError:
        return config, None
