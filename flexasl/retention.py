"""Which cache entries a layer keeps of its rows.

Shapes: B rows, G KV heads, M tokens of the longest row, P = M - W scored tokens, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexasl.checks import article, one_of, shown
from flexasl.errors import ConfigError
from flexasl.ops import top_k_entries, top_p_entries
from flexasl.rows import Rows

Limit = Callable[[int, int], int | None]
"""Of a layer and a number of prompt tokens: entries per KV head, window included, up to which the layer keeps all of
such a row; None: it keeps all."""


@dataclass(frozen=True)
class Retention:
    """Which cache entries a layer keeps. By default it keeps all."""

    limit: Limit = lambda layer, prompt_tokens: None
    keep: Callable[[Any, Tensor, int, Rows], Tensor] | None = None
    """keep(seen, limits, window, rows): which entries stay of rows that are over their limits [B] int64, as
    [B, G or 1, M] bool, each row at the right end. What it says of other rows does not count."""
    goes_by: Literal["nothing", "scores", "attention"] = "nothing"
    """What seen is: the policy's scores [B, G, P], each entry's share of the attention [B, G, M], or not there."""
    exact: bool = True
    """Whether a row that is over its limit keeps exactly so many entries; where not, each head keeps its own number."""

    def __post_init__(self) -> None:
        one_of("goes_by", self.goes_by, ("nothing", "scores", "attention"), error=ConfigError)
        for name, value in (("limit", self.limit), ("keep", self.keep or self.limit)):
            if not callable(value):
                raise ConfigError(f"{name}={shown(value)} is {article(value)}; give a function")


def top_k(limit: Limit) -> Retention:
    """Keeps the entries of the highest scores in each KV head, and the window (SnapKV, arXiv 2404.14469)."""

    def keep(seen: Tensor, limits: Tensor, window: int, rows: Rows) -> Tensor:
        real = rows.as_batch()[1]
        return top_k_entries(seen, limits - window, window, None if real is None else real[:, : seen.shape[2]])

    return Retention(limit, keep, "scores")


def top_p(share: float, limit: Limit) -> Retention:
    """Keeps the fewest entries of each KV head that get this share of its attention, the first and the window."""

    def keep(seen: Tensor, limits: Tensor, window: int, rows: Rows) -> Tensor:
        return top_p_entries(seen, share, window, rows.as_batch()[1])

    return Retention(limit, keep, "attention", exact=False)


def first_and_last(keep_first: int, limit: Limit) -> Retention:
    """Keeps the first entries and the last, independent of attention (StreamingLLM, arXiv 2309.17453)."""

    def keep(seen: Tensor, limits: Tensor, window: int, rows: Rows) -> Tensor:
        lengths = rows.lengths_on_device[:, None]
        place = torch.arange(rows.width, dtype=torch.int64, device=lengths.device) - (rows.width - lengths)
        first = (limits[:, None] - window).clamp(max=keep_first)
        return ((place < first) | (place >= lengths - limits[:, None] + first))[:, None]

    return Retention(limit, keep)
