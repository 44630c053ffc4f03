"""Adaptive layer selection."""

from __future__ import annotations

from collections.abc import Sequence

from flexasl.config import ASLConfig
from flexasl.policies.base import Policy


class ASL(Policy):
    """Selects tokens once, at the first layer at which their ranking has settled (ASL, arXiv 2601.07667)."""

    name = "asl"
    takes_presets = True

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        return config.resolve(num_layers, voters)
