"""Nothing pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flexasl.policies.base import Policy


class Full(Policy):
    """Keeps every token and every cache entry: the row that others are compared with, on the same engine."""

    name = "full"
    prunes_tokens = False
    takes = frozenset({"kv_dtype"})
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("kv_budget", "kv_top_p"),
        f"would have no effect under policy {name!r}, which keeps every cache entry: give policy='snapkv'",
    )
