"""Time on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Clock:
    """Runs from when it is made. On a GPU it measures the GPU's time, and nobody waits before the seconds are asked
    for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = _now(device)

    def stop(self) -> float | Callable[[], float]:
        """The seconds, or what gives them once the GPU has come this far."""
        start, end = self._start, _now(self._device)
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)  # type: ignore[arg-type]

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
