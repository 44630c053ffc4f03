"""The first entries and the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from flexasl.checks import integer, renamed
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from flexasl.retention import Retention


class Streaming(SnapKV):
    """Every layer reads the whole prompt, and its cache keeps the first `keep_first` entries and the last ones,
    independent of attention (StreamingLLM, arXiv 2309.17453, which keeps four).

    The budget is `kv_budget`; where it is not given, `select_tokens` entries per KV head. Entries keep their positions
    in the prompt, where the paper counts positions within the cache.
    """

    name = "streaming"
    takes = SnapKV.takes - {"kv_top_p", "kernel_size", "pooling", "score_power", "contrast"}
    refusals: ClassVar[Mapping[str, str]] = {
        **SnapKV.refusals,
        "kv_top_p": f"goes by attention, policy {name!r} by position; give kv_budget",
        "kernel_size": f"would have no effect under policy {name!r}, which selects by position",
        "score_power": f"would have no effect under policy {name!r}, which selects by position",
        "contrast": f"would have no effect under policy {name!r}, which selects by position",
        "pooling": f"would have no effect under policy {name!r}, which selects by position",
    }

    def __init__(self, keep_first: int = 4, *, sinks: int | None = None) -> None:
        """sinks: deprecated name of keep_first."""
        name = "keep_first" if sinks is None else "sinks"
        if sinks is not None:
            renamed("sinks", "keep_first")
            keep_first = sinks
        self.keep_first = integer(name, keep_first, error=ConfigError)
        if keep_first < 0:
            raise ConfigError(f"{name}={keep_first} is negative; give a number of entries")

    def retention(self, config: ASLConfig, num_layers: int) -> Retention:
        from flexasl.retention import first_and_last

        return first_and_last(self.keep_first, lambda layer, tokens: config.cache_budget(tokens))
