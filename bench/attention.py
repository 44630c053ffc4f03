"""Kernels of `FlexASLAttention` beside each other: what `choose` goes by.

`pytest bench/attention.py --out docs/benchmarks`. Heads as in SmolLM2-135M (9 and 3 of 64) up to 4k, as in Llama 3.1 8B
(32 and 8 of 128) for decode. Flex runs compiled for its shape; compile time is not counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from setting import table
from timing import DEVICE, timed

from flexasl import FlexASLAttention, UnsupportedError, Visibility

TITLE = "Kernels of attention"
SHAPES = [
    ("prompt", 512, 512),
    ("prompt", 2048, 2048),
    ("prompt", 4096, 4096),
    ("decode", 1, 4096),
    ("decode", 1, 32768),
]
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {},
    "sliding window 512": {"sliding_window": 512},
    "soft-cap": {"softcap": 30.0},
    "sinks": {},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "queries", "keys"), SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex", "eager"])
def test_attention(benchmark: Any, kernel: str, feature: str, kind: str, queries: int, keys: int, dtype: str) -> None:
    heads, groups, dim = (9, 3, 64) if keys <= 4096 else (32, 8, 128)
    batch = 2 if feature == "padding" else 1
    settings = {"dtype": getattr(torch, dtype), "device": DEVICE}
    query = torch.randn(batch, heads, queries, dim, **settings)
    key, value = (torch.randn(batch, groups, keys, dim, **settings) for _ in range(2))
    visible = None
    if feature == "padding":
        at = torch.arange(keys, device=DEVICE).expand(2, -1)
        valid = at >= torch.tensor([[0], [keys // 4]], device=DEVICE)
        visible = Visibility(at[:, keys - queries :], at, valid)
    sinks = torch.randn(heads, **settings) if feature == "sinks" else None
    try:
        module = FlexASLAttention(kernel=kernel, **FEATURES[feature])  # type: ignore[arg-type]
        module(query, key, value, visible, sinks=sinks)
    except UnsupportedError as error:
        pytest.skip(str(error))
    chosen = module.choose(query, key, visible, sinks)
    row = {"side": kernel, "feature": feature, "kind": kind, "keys": keys, "dtype": dtype, "chosen": chosen}
    timed(benchmark, lambda: module(query, key, value, visible, sinks=sinks), 7, file=__name__, **row)


def tables(rows: list[dict[str, Any]]) -> str:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        case = found.setdefault((row["feature"], row["kind"], row["keys"], row["dtype"]), {})
        case[row["side"]] = row["seconds"] * 1e3
        if row["side"] == "auto":
            case["chosen"] = row["chosen"]
    lines = []
    for (feature, kind, keys, dtype), case in found.items():
        kernels = [case.get(name) for name in ("sdpa", "flex", "eager")]
        best = min(value for value in kernels if value is not None)
        lines.append(
            [feature, f"{kind}, {keys:,} keys", dtype]
            + ["" if value is None else f"{value:.2f}" for value in kernels]
            + [case["chosen"], f"{case[case['chosen']] / best:.2f}", f"{case['auto'] / best:.2f}"]
        )
    heads = ["what", "shape", "dtype", "sdpa, ms", "flex, ms", "eager, ms", "auto takes", "that / best", "auto / best"]
    note = "`auto / best` times the chosen kernel once more, so it shows the machine's noise too."
    return f"{table(heads, lines)}\n\n{note}"
