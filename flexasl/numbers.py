"""Numbers that the host knows as tensors of a device, and numbers of a device that the host reads, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 8
"""Runs of equal numbers, or of successive ones, that a device fills in by itself."""


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers [len(values)] on a device, for which the host does not wait.

    An ordinary copy to a GPU waits until the GPU has done all that it was given before. So few runs of numbers are
    filled in there, and more go through pinned memory.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device="cpu")
    if torch.compiler.is_compiling():  # of numbers that may be symbols nothing is to be asked
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
    runs = _runs(values, dtype == torch.int64)
    if len(runs) > FEW:
        pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        return pinned.to(device, non_blocking=True)
    parts = [
        torch.arange(first, first + count, dtype=dtype, device=device)
        if step
        else torch.full((count,), first, dtype=dtype, device=device)
        for first, count, step in runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0, dtype=dtype, device=device)])


def _runs(values: Sequence[float], whole: bool) -> list[tuple[float, int, int]]:
    """First number, count and step, 0 or, of whole numbers, 1, of each run."""
    runs: list[tuple[float, int, int]] = []
    for value in values:
        if runs:
            first, count, step = runs[-1]
            step = int(whole and value == first + 1) if count == 1 else step
            if value == first + step * count:
                runs[-1] = first, count + 1, step
                continue
        runs.append((value, 1, 0))
    return runs


def read_together(tensors: Sequence[Tensor]) -> list[list[int]]:
    """What whole numbers or bools [N] each hold, by one read of the device."""
    if not tensors:
        return []
    sizes = [len(one) for one in tensors]
    values = (tensors[0] if len(tensors) == 1 else torch.cat([one.to(torch.int64) for one in tensors])).tolist()
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes)]


class SharedReads:
    """Reads of a device that take along what else is wanted from it."""

    def __init__(self) -> None:
        self._waiting: Tensor | None = None
        self._found: list[int] | None = None

    def want(self, values: Tensor) -> None:
        """Lets the next read take these whole numbers along."""
        self._waiting = values

    def now(self, values: Tensor) -> list[int]:
        """What whole numbers or bools are."""
        if self._waiting is None:
            found: list[int] = values.tolist()
            return found
        found, self._found = read_together([values, self._waiting])
        self._waiting = None
        return found

    def wanted(self) -> list[int]:
        """What was wanted, by a read of its own where there was none since."""
        found, self._found = self._found, None
        if self._waiting is not None:
            found, self._waiting = self._waiting.tolist(), None
        assert found is not None
        return found
