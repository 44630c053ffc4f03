"""Adaptive layer selection, then a second prefill."""

from __future__ import annotations

from collections.abc import Sequence

from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.base import Policy


class ASLTwoPass(Policy):
    """Finds layer and tokens as `ASL` does, then reads the selected tokens again from the first layer on, alone: the
    two-pass variant of arXiv 2601.07667.

    All layers then cache the selected tokens only, at their positions in the prompt. A prompt that does not settle by
    `max_layer` is selected from there.
    """

    name = "asl_two_pass"
    takes_presets = True
    second_pass = True

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        return one_selection(self.name, config).resolve(num_layers, voters)


def one_selection(name: str, config: ASLConfig) -> ASLConfig:
    """The settings of a policy that needs tokens to be dropped, and selects them in any case, once a sequence."""
    if config.later_turns == "prune":
        raise ConfigError(f"later_turns='prune' does not go with policy {name!r}; give later_turns='keep'")
    if config.propagate == "mask":
        raise ConfigError(f"propagate='mask' drops no tokens, which policy {name!r} needs; give propagate='gather'")
    return config.replace(if_never="select")
