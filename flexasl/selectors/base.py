"""What a selector is, and what it gives.

Shapes: R rows that a selector decides, P scored tokens, N tokens of the longest row (P + window), K selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexasl.checks import ascending, integer, renamed
from flexasl.config import ASLConfig
from flexasl.masks import Visibility


@dataclass(frozen=True)
class Selection:
    """The tokens of one row that pass to the layers after `layer`."""

    row: int
    layer: int
    keep: Tensor
    """[N] bool over the tokens that the row has at this layer, which are at the right end; the window is True."""
    count: int
    """How many are kept."""

    @property
    def indices(self) -> Tensor:
        """[K] int64, ascending: what to gather, for a run in which the other tokens are dropped."""
        return self.keep.nonzero()[:, 0]

    @property
    def slots(self) -> Tensor:
        """Deprecated name of `indices`."""
        renamed("Selection.slots", "Selection.indices")
        return self.indices

    def block_mask(self, sliding_window: int | None = None, heads: int = 1) -> BlockMask:
        """[1, 1, N, N] for `flex_attention`, for a run in which all tokens stay and the others are masked out. A token
        that is not selected attends to itself only."""
        at = torch.arange(self.keep.shape[0], dtype=torch.int64, device=self.keep.device)[None]
        return Visibility(at, at, self.keep[None]).block_mask(sliding_window, heads)


class Prompts(NamedTuple):
    """A batch of prompts that is padded on the left."""

    lengths: Sequence[int]
    """Real tokens of each row."""
    rows: Sequence[int]
    """Those that have more tokens than the budget, ascending: the ones to select from."""
    tokens: int
    """Tokens of a row with its padding."""
    num_layers: int
    ranking_layers: Sequence[int] | None
    """Layers that attend to the whole prompt, ascending; None for all."""
    device: torch.device
    asked: Sequence[bool] | None = None
    """Of each row, whether it is known which tokens ask, so that these rank; None: of all."""


@dataclass
class Trace:
    """What a rule recorded of one row, layer by layer: its rank variance, or its look-ups."""

    eval_layers: list[int] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    variance_ratio: list[float] = field(default_factory=list)
    union_size: list[int] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)
    """Under the rule of look-ups, the highest score of a far token."""

    def cut(self, layer: int) -> None:
        """Forgets what came after this layer."""
        count = sum(seen <= layer for seen in self.eval_layers)
        for values in (self.eval_layers, self.variance, self.variance_ratio, self.union_size, self.lookup):
            del values[count:]


class Selector:
    """Decides which tokens of a batch of prompts pass to deeper layers; this one keeps all.

    A prefill asks at every layer whether it `needs` the scores; where it does, the scores go to `observe`, and `select`
    gives the selections. A row may be selected from several times, each time from the tokens that it has left.
    """

    _why = "nothing is pruned"

    def __init__(self, why: str = _why) -> None:
        """why: the reason for every row."""
        self._why = why

    rows: Sequence[int] = ()
    """Rows that may still lose tokens, ascending."""
    first_layer: int | None = None
    """The earliest layer after which a row may lose tokens; None: none will."""
    once: bool = False
    """Whether a row is selected from once at most."""
    masks: bool = False
    """Whether `mask` is there, which `propagate="mask"` needs."""
    budgets: Sequence[Sequence[int]] | None = None
    """For every row of the batch, tokens that each of its selections keeps; None: the budget, once."""
    look: Callable[[Tensor], list[int]] = staticmethod(Tensor.tolist)
    """How `select` reads bools or whole numbers [R] of the device; a prefill sets it, to read with them what else it
    needs to know at this layer."""

    @property
    def stages_left(self) -> Tensor | None:
        """Of each row in `rows`, which of its `budgets` the next selection has: [R] int64; None for the only one."""
        return None

    @property
    def traces(self) -> Mapping[int, Trace]:
        """By row, what an adaptive rule recorded; empty where there is none."""
        return {}

    def needs(self, layer: int) -> bool:
        """Whether `observe` needs the scores of this layer."""
        return False

    def observe(self, layer: int, scores: Tensor) -> None:
        """Takes scores [R, P] float32 of the rows in `rows`: of the tokens that each has left, without the window, at
        the right end."""

    def select(self, layer: int) -> list[Selection]:
        """What is selected after this layer, by the scores that were observed at it."""
        return []

    def mask(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """`select` without a look at the numbers: which rows in `rows` select [R] bool, and what they would keep [R, N]
        bool, of the tokens that are left, at the right end; None where it is too early."""
        raise NotImplementedError

    def reason(self, row: int, selection: Selection | None) -> str:
        """Why the row was pruned where it was, by its last selection, or was not pruned: one sentence."""
        return self._why


FADE = 0.8
"""What a score counts one layer later, for `select_on="recent"` and `"sum"`."""


def combined(before: Tensor | None, scores: Tensor, select_on: str) -> Tensor:
    """Scores of the layers before and of one more as those of all of them, see `ASLConfig.select_on`."""
    if before is None or select_on == "last":
        return scores
    if select_on == "max":
        return torch.maximum(before, scores)
    return before * FADE + scores if select_on == "sum" else torch.maximum(before * FADE, scores)


def batch_of(
    lengths: Sequence[int], tokens: int | None, rows: Sequence[int] | None
) -> tuple[list[int], int, list[int]]:
    """The real tokens of every row, the places of a row (None: those of the longest) and the rows to decide (None:
    all), checked."""
    counts = [integer("lengths", length, 0) for length in lengths]
    most = max(counts, default=0)
    last = len(counts) - 1
    decided = list(range(len(counts))) if rows is None else ascending("rows: row", rows, 0, last)
    return counts, most if tokens is None else integer("tokens", tokens, most), decided


def budget_of(config: ASLConfig, prompt_tokens: int) -> int:
    """Tokens that are kept of a prompt that is selected from."""
    return min(config.token_budget(prompt_tokens), prompt_tokens)


def within_budget(config: ASLConfig, prompt_tokens: int) -> str:
    """The reason of a row that is too short to lose a token."""
    budget = config.token_budget(prompt_tokens)
    told = f"the prompt's {prompt_tokens} tokens are within the budget of {budget}"
    return told if prompt_tokens <= config.window + 1 else f"{told}; a select_tokens below {prompt_tokens} prunes it"
