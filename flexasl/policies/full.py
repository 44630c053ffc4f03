"""Nothing pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flexasl.config import ASLConfig
from flexasl.policies.base import Policy
from flexasl.selectors import Selector
from flexasl.selectors.base import Prompts


class Full(Policy):
    """Keeps every token and every cache entry: the row that others are compared with, on the same engine."""

    name = "full"
    takes = frozenset({"kv_dtype"})
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("kv_budget", "kv_top_p"),
        f"would have no effect under policy {name!r}, which keeps every cache entry: give policy='snapkv'",
    )

    def selector(self, config: ASLConfig, prompts: Prompts) -> Selector:
        return Selector(f"policy {self.name!r} lets every token through every layer")
