"""Timed pairs: ours beside an alternative and a limit, in one run. Rows that benchmarks report are collected here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS: list[dict[str, Any]] = []


def timed(benchmark: Any, run: Callable[[], Any], rounds: int, **row: Any) -> float:
    """Median seconds of `run` by pytest-benchmark, remembered with the row's names.

    On a GPU the run is captured once as a CUDA graph where it can be, and replays are timed to their end.
    """
    run()
    if DEVICE == "cuda":
        run = _replayed(run)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    ROWS.append({**row, "seconds": seconds})
    return seconds


def bandwidth() -> float:
    """Bytes per second at which this machine reads memory now: the best of five sums over 256 MiB."""
    states = torch.zeros(2**26, device=DEVICE)
    best = float("inf")
    for _ in range(6):
        best = min(best, seconds(states.sum))
    return states.numel() * 4 / best


def seconds(run: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    import time

    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        launch: Callable[[], Any] = graph.replay
    except RuntimeError:  # it waits for the host somewhere, which a captured graph cannot
        torch.cuda.synchronize()
        launch = run

    def whole() -> None:
        launch()
        torch.cuda.synchronize()

    return whole
