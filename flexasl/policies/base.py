"""The protocol of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from flexasl.config import ASLConfig


class Policy(ABC):
    """Decides the rule by which a prompt is pruned, as settings of a stack of known depth."""

    name: ClassVar[str]
    prunes_tokens: ClassVar[bool] = True
    """Whether hidden states are dropped after some layer; where False only the cache shrinks, or nothing."""
    second_pass: ClassVar[bool] = False
    """Whether the layers up to the selection read the selected tokens again, alone, as if they were the prompt."""
    takes_presets: ClassVar[bool] = False
    """Whether `min_layer`, `max_layer`, `tau` and `observe_layers` are used as they are given, so that a preset may
    fill them in."""
    sinks: int | None = None
    """Cache entries by position: the first so many and the last; None where they go by attention."""

    @abstractmethod
    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        """The settings that this policy runs with on `num_layers` layers, of which voters can select (None: all);
        raises `ConfigError` where they cannot work."""

    def cache_budget(self, config: ASLConfig, layer: int, num_layers: int, prompt_tokens: int) -> int | None:
        """Cache entries per KV head that a layer keeps of a prompt, window included; None where there is no limit."""
        return config.cache_budget(prompt_tokens)

    def steps(self, config: ASLConfig, num_layers: int, prompt_tokens: int) -> dict[int, int] | None:
        """Where tokens are dropped step by step: by layer, how many go on from there, window included. None where they
        are selected once, at the layer that the settings name or find."""
        return None
