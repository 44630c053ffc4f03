"""The first entries and the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flexasl.checks import integer
from flexasl.errors import ConfigError
from flexasl.policies.snapkv import SnapKV


class Streaming(SnapKV):
    """Every layer reads the whole prompt, and its cache keeps the first `sinks` entries and the last ones, whatever was
    attended to (StreamingLLM, arXiv 2309.17453, whose sinks are four).

    The budget is `kv_budget`; where it is not given, `select_tokens` entries per KV head. Entries keep their positions
    in the prompt, where the paper counts positions within the cache.
    """

    name = "streaming"
    takes = SnapKV.takes - {"kv_top_p", "kernel_size", "pooling"}
    refusals: ClassVar[Mapping[str, str]] = {
        **SnapKV.refusals,
        "kv_top_p": f"goes by attention, policy {name!r} by position; give kv_budget",
        "kernel_size": f"would have no effect under policy {name!r}, which goes by position",
        "pooling": f"would have no effect under policy {name!r}, which goes by position",
    }

    def __init__(self, sinks: int = 4) -> None:
        self.sinks = integer("sinks", sinks, error=ConfigError)
        if sinks < 0:
            raise ConfigError(f"sinks={sinks} is negative; give a number of entries")
