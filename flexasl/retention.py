"""Which cache entries a layer keeps of its rows.

Shapes: B rows, G KV heads, M tokens of the longest row, P = M - W scored tokens, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flexasl.ops import top_k_entries, top_p_entries

if TYPE_CHECKING:
    from flexasl.rows import Rows

Limit = Callable[[int, int], int | None]
"""Of a layer and a number of prompt tokens."""


class Retention:
    """Keeps every entry. Methods of other kinds say how many, and which."""

    goes_by: Literal["nothing", "scores", "attention"] = "nothing"
    """What `keep` takes: the policy's scores [B, G, P], or each entry's share of the attention [B, G, M]."""
    counts = True
    """Whether a row that is over its limit keeps exactly so many entries; where not, each head keeps its own number."""

    def limit(self, layer: int, prompt_tokens: int) -> int | None:
        """Entries per KV head, window included, up to which this layer keeps all of a row whose prompt has so many
        tokens; None: it keeps all."""
        return None

    def keep(self, seen: Tensor | None, limits: Tensor, window: int, rows: Rows) -> Tensor:
        """Which entries stay of rows that are over their limits [B] int64: [B, G or 1, M] bool, each row at the right
        end. What it says of other rows does not count."""
        raise NotImplementedError


class TopK(Retention):
    """Keeps the entries of the highest scores in each KV head, and the window (SnapKV, arXiv 2404.14469)."""

    goes_by = "scores"

    def __init__(self, limit: Limit) -> None:
        self.limit = limit  # type: ignore[method-assign, assignment]

    def keep(self, seen: Tensor | None, limits: Tensor, window: int, rows: Rows) -> Tensor:
        assert seen is not None
        real = rows.as_batch()[1]
        return top_k_entries(seen, limits - window, window, None if real is None else real[:, : seen.shape[2]])


class TopP(Retention):
    """Keeps the fewest entries of each KV head that get this share of its attention, the first and the window."""

    goes_by = "attention"
    counts = False

    def __init__(self, top_p: float, limit: Limit) -> None:
        self.top_p = top_p
        self.limit = limit  # type: ignore[method-assign, assignment]

    def keep(self, seen: Tensor | None, limits: Tensor, window: int, rows: Rows) -> Tensor:
        assert seen is not None
        return top_p_entries(seen, self.top_p, window, rows.as_batch()[1])


class FirstAndLast(Retention):
    """Keeps the first entries and the last, whatever was attended to (StreamingLLM, arXiv 2309.17453)."""

    def __init__(self, keep_first: int, limit: Limit) -> None:
        self.keep_first = keep_first
        self.limit = limit  # type: ignore[method-assign, assignment]

    def keep(self, seen: Tensor | None, limits: Tensor, window: int, rows: Rows) -> Tensor:
        lengths = rows.lengths_on_device[:, None]
        place = torch.arange(rows.width, dtype=torch.int64, device=lengths.device) - (rows.width - lengths)
        first = (limits[:, None] - window).clamp(max=self.keep_first)
        return ((place < first) | (place >= lengths - limits[:, None] + first))[:, None]
