"""Nothing pruned."""

from __future__ import annotations

from collections.abc import Sequence

from flexasl.config import ASLConfig
from flexasl.policies.base import Policy


class Full(Policy):
    """Keeps every token and every cache entry: the row that others are compared with, on the same engine."""

    name = "full"
    prunes_tokens = False

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        return config.replace(kv_budget=None, kv_top_p=None).resolve(num_layers, voters)
