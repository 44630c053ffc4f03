"""The first entries and the last ones."""

from __future__ import annotations

from collections.abc import Sequence

from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.base import Policy
from flexasl.policies.snapkv import SnapKV


class Streaming(Policy):
    """Every layer reads the whole prompt, and its cache keeps the first `sinks` entries and the last ones, whatever was
    attended to (StreamingLLM, arXiv 2309.17453, whose sinks are four).

    The budget is `kv_budget`; where it is not given, `select_tokens` entries per KV head. Entries keep their positions
    in the prompt, where the paper counts positions within the cache.
    """

    name = "streaming"
    prunes_tokens = False

    def __init__(self, sinks: int = 4) -> None:
        if sinks < 0:
            raise ConfigError(f"sinks={sinks} is negative; give a number of entries")
        self.sinks = sinks

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        if config.kv_top_p is not None:
            raise ConfigError(f"kv_top_p={config.kv_top_p} goes by attention, policy {self.name!r} by position")
        return SnapKV().resolve(config, num_layers, voters)
