"""A smaller cache after a full prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from flexasl.config import ASLConfig
from flexasl.policies.base import CACHE, SCORES, Policy


class SnapKV(Policy):
    """Every layer reads the whole prompt and keeps the cache entries that its window attends to (arXiv 2404.14469).

    The budget is `kv_budget` or `kv_top_p`; where neither is given, `select_tokens` entries per KV head.
    """

    name = "snapkv"
    prunes_tokens = False
    takes = CACHE | SCORES | {"select_tokens", "later_turns"}
    refusals: ClassVar[Mapping[str, str]] = {
        "propagate": f"would have no effect under policy {name!r}, which lets every token through every layer"
    }

    def rule(self, config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> ASLConfig:
        if not config.compresses_cache:
            config = config.replace(kv_budget=config.select_tokens)
        return config.scored().resolve(num_layers, ranking_layers)
