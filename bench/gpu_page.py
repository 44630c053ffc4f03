"""The page of what was measured on a GPU: goals, prefill, new tokens."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from setting import table, write

EARLY = "⅛ to a half, ⅓"
LATE = "¼ to a half, ½"
"""Two cuts: how much of the depth comes before each, and what the first keeps."""
GOALS = [("prefill", LATE, 1 / 2.2), ("prefill", EARLY, 1 / 3.5), ("prefill", "keep all", 1.01)]
"""What time as a share of the unpatched model's is to be at most, for the longest prompt."""
SCORING, DECODE = 0.01, 1.3
"""At most: scoring and decision as a share of the prefill; a new token as a CUDA graph as a multiple of its limit."""
PREFILL_HEADS = ["model", "batch", "tokens", "cuts", "ms", "time ÷ unpatched", "limit", "scoring", "runs", "peak, GB"]
PREFILL_HEADS += ["waits"]
DECODE_HEADS = ["model", "batch", "prompt", "cuts", "how", "ms a token", "limit, ms", "time ÷ limit", "waits"]


def write_page(out: Path | None, results: dict[str, Any], *, quiet: bool = False) -> None:
    """Writes it as Markdown and JSON to `out`, where given, and prints it, unless quiet."""
    prefill = [
        [row["model"], row["batch"], row["tokens"], row["what"]]
        + [f"{statistics.median(row['seconds']) * 1e3:.1f}", f"{row['share']:.3f}"]
        + [f"{row[name]:.3f}" if name in row else "" for name in ("limit", "scoring")]
        + [len(row["seconds"]), "" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}", _shown(row["waits"])]
        for row in results["prefill"]
        if row["seconds"]
    ]
    decode = [
        [row["model"], row["batch"], row["tokens"], row["what"], row["how"]]
        + [f"{_median(row) * 1e3:.2f}", f"{row['limit'] * 1e3:.2f}", f"{_median(row) / row['limit']:.2f}"]
        + [_shown(row["waits"])]
        for row in results["decode"]
    ]
    parts = []
    if "tests" in results:
        parts += ["## Tests", "\n".join([results["tests"]["said"], *results["tests"].get("failed", [])])]
    parts += ["## Goals", table(["for", "at most", "measured"], _goals(results))]
    parts += ["## Prefill", table(PREFILL_HEADS, prefill), "## A new token", table(DECODE_HEADS, decode)]
    if results.get("left_out"):
        heads = ["model", "batch", "tokens", "part", "why"]
        parts += ["## Left out", table(heads, [[row[head] for head in heads] for row in results["left_out"]])]
    write(out, "GPU", "\n\n".join(parts), {"left_out": []} | results, quiet=quiet)


def _goals(results: dict[str, Any]) -> list[list[str]]:
    """What is to be reached with the longest prompt, and what was."""
    longest = max((row["tokens"] for row in results["prefill"] if "share" in row), default=0)
    rows = [row for row in results["prefill"] if row["tokens"] == longest and row["batch"] == 1 and "share" in row]
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["what"]: row for row in rows if row["model"] == name}
        where = f"{name}, {longest} tokens"
        found += [
            [f"{where}: {what}, time ÷ unpatched", f"{most:.3f}", f"{own[what]['share']:.3f}"]
            for _, what, most in GOALS
            if what in own
        ]
        found += [
            [f"{where}: {what}, scoring", f"{SCORING:.3f}", f"{row['scoring']:.3f}"]
            for what, row in own.items()
            if "scoring" in row
        ]
    found += [
        [
            f"{row['model']}, {row['batch']} × {row['tokens']}: {row['what']}, a new token ÷ its limit",
            f"{DECODE:.2f}",
            f"{_median(row) / row['limit']:.2f}",
        ]
        for row in results["decode"]
        if row["how"] == "CUDA graph"
    ]
    return found


def _median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def _shown(count: int | None) -> int | str:
    return "" if count is None else count
