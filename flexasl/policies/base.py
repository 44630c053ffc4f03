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

    @abstractmethod
    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        """The settings that this policy runs with on `num_layers` layers, of which voters can select (None: all);
        raises `ConfigError` where they cannot work."""
