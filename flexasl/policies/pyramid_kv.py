"""A smaller cache after a full prefill, and the smaller the deeper the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from flexasl.checks import real
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError
from flexasl.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from flexasl.retention import Retention


class PyramidKV(SnapKV):
    """SnapKV with a budget that falls with depth (PyramidKV, arXiv 2406.02069).

    With a mean budget of k entries beside the window, the last layer keeps k / beta and the first 2 k - k / beta, and
    those between lie on a line, so that the sum is that of SnapKV. `beta` is 20 in the paper's code. Where the prompt
    is shorter than the budget of the first layers, the sum is smaller.
    """

    name = "pyramid_kv"
    takes = SnapKV.takes - {"kv_top_p"}
    refusals: ClassVar[Mapping[str, str]] = {
        **SnapKV.refusals,
        "kv_top_p": "sets no budget that could fall with depth; give kv_budget",
    }

    def __init__(self, beta: float = 20.0) -> None:
        self.beta = real("beta", beta, "a number of at least 1", error=ConfigError)
        if beta < 1:
            raise ConfigError(f"beta={beta} would give the last layer more than the mean; give at least 1")

    def retention(self, config: ASLConfig, num_layers: int) -> Retention:
        from flexasl.retention import top_k

        def limit(layer: int, prompt_tokens: int) -> int:
            budget = config.cache_budget(prompt_tokens)
            assert budget is not None
            mean = budget - config.window
            least = mean / self.beta
            depth = layer / max(1, num_layers - 1)
            return config.window + max(1, round(2 * mean - least - depth * 2 * (mean - least)))

        return top_k(limit)
