"""What layers remember that keep states of one size in place of keys and values: convolutions, state spaces, linear
attention.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from flexasl.errors import FlexASLError
from flexasl.numbers import on_device


class LayerStates:
    """The states of one layer, [B, ...] each, whose size does not grow with what was read; none of a layer that
    remembers nothing. They are made of the tokens that the layer has run on, in order: a token that was dropped is not
    among them."""

    def __init__(self) -> None:
        self.clear()

    @property
    def states(self) -> Mapping[str, Tensor]:
        """By name."""
        return {}

    @property
    def needed(self) -> dict[str, Tensor]:
        """Those of them, or the part, that what comes next needs."""
        return dict(self.states)

    def hold(self, states: Mapping[str, Tensor]) -> None:
        """Remembers these states in place of its own."""
        if states:
            raise FlexASLError(f"this layer has no states, and was given {', '.join(states)}")

    def fresh(self) -> Self:
        """One of the same kind that has read nothing."""
        return type(self)()

    def clear(self) -> None:
        """Forgets everything."""
        self.unfinished = False
        """Whether the last pass has changed states, here or in deeper layers, and did not come to its end."""
        self.seen = 0
        """Positions of the sequence so far, dropped ones included."""
        self.uncroppable = 0
        """Positions that cannot be cropped, because tokens have been dropped among them."""

    def begin(self, kv_dtype: str | None) -> None:
        """Forgets everything; states stay in the model's dtype."""
        self.clear()

    @property
    def rows(self) -> int | None:
        """B; None where there are no states."""
        return next((states.shape[0] for states in self.states.values()), None)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: none."""
        return 0

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return sum(states.nbytes for states in self.states.values())

    def passed(self, count: int, dropped: bool = False) -> None:
        """Counts positions that were read, of which some may have been dropped before this layer."""
        self.seen += count
        if dropped:
            self.uncroppable = self.seen

    def row(self, row: int) -> Self:
        """That of one row of the batch, on tensors of its own."""
        made = self.fresh()
        made.hold({name: states[row : row + 1].clone() for name, states in self.states.items()})
        return made

    def join(self, rows: Sequence[LayerStates]) -> None:
        """Remembers the states of several batches, one after another."""
        parts = [own.states for own in rows]
        self.hold({name: _joined([part[name] for part in parts]) for name in parts[0]})

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the batch rows named, in that order; a row may be named more than once."""
        self.hold({name: states[rows.to(states.device)] for name, states in self.states.items()})

    def replace_rows(self, rows: Sequence[int], other: LayerStates, later: object = None) -> None:
        """Takes the states of `other` [len(rows), ...] in place of those of these rows."""
        held = {name: states.clone() for name, states in self.states.items()}
        for name, states in other.states.items():
            held[name].index_copy_(0, on_device(rows, states.device), states)
        self.hold(held)


def _joined(parts: list[Tensor]) -> Tensor:
    """States [B, ...] behind one another; those that record what they have read may differ in their last dimension, and
    are filled up with zeros before it."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (width - part.shape[-1], 0)) for part in parts])
