"""Ops of the decision against the published formulation, and against the time that reading their input takes.

`pytest bench/ops.py --out docs/benchmarks`. The published formulation (arXiv 2601.07667, written anew from a
description of its code): KV heads expanded and all logits at once; ranks as two argsorts; the union as one top-k per
layer and `unique`; selection as top-k and sort; gathers with an expanded index.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from setting import table
from timing import DEVICE, bandwidth, timed
from torch.nn import functional as F

from flexasl import ops
from flexasl.selectors.adaptive import variance_ratio

TITLE = "Ops of the decision"
HEADS, GROUPS, DIM, WINDOW, LAYERS, BUDGET, WIDTH = 32, 8, 128, 32, 8, 2048, 4096
TOKENS = [1024, 8192, 32768, 131072]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def speed() -> float:
    return bandwidth()


def compare(benchmark: Any, which: str, ours: Any, published: Any, speed: float, read: int, **names: Any) -> None:
    """One side of a comparison; read is what the op cannot help reading and writing, in bytes."""
    rounds = 3 if names["tokens"] > 50_000 else 9
    run = ours if which == "ours" else published
    timed(benchmark, run, rounds, file=__name__, side=which, limit=read / speed, **names)


sides = pytest.mark.parametrize("which", ["ours", "published"])
lengths = pytest.mark.parametrize("tokens", TOKENS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def keys(tokens: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"dtype": getattr(torch, dtype), "device": DEVICE}
    return torch.randn(1, HEADS, WINDOW, DIM, **settings), torch.randn(1, GROUPS, tokens, DIM, **settings)


def history(tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Scores [1, P] of the observed layers, their ranks, and the budget."""
    scores = [torch.rand(1, tokens - WINDOW, device=DEVICE) for _ in range(LAYERS)]
    budget = torch.tensor([min(BUDGET, tokens // 2) - WINDOW], device=DEVICE)
    return scores, [ops.token_ranks(layer) for layer in scores], budget


def published_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    key = key.repeat_interleave(HEADS // GROUPS, 1)
    logits = query @ key.transpose(-1, -2) * DIM**-0.5
    future = torch.full((WINDOW, WINDOW), torch.finfo(logits.dtype).min, device=logits.device, dtype=logits.dtype).triu(
        1
    )
    logits[..., -WINDOW:] += future
    weights = logits.softmax(-1, dtype=torch.float32)
    mass = weights[..., :-WINDOW].sum(2)
    return F.avg_pool1d(mass, 7, stride=1, padding=3)


def published_ranks(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort(dim=-1, descending=True).argsort(dim=-1) + 1


def published_variance(scores: list[torch.Tensor], ranks: list[torch.Tensor], budget: int) -> torch.Tensor:
    union = torch.cat([layer[0].topk(budget).indices for layer in scores]).unique()
    seen = torch.stack([layer[0, union] for layer in ranks]).float()
    return seen.var(0, unbiased=False).mean()


def published_selection(scores: torch.Tensor, budget: int, tokens: int) -> torch.Tensor:
    best = scores[0].topk(budget).indices
    return torch.cat([best, torch.arange(tokens - WINDOW, tokens, device=best.device)]).sort().values


@sides
@dtypes
@lengths
def test_window_scores(benchmark: Any, which: str, tokens: int, dtype: str, speed: float) -> None:
    query, key = keys(tokens, dtype)
    read = key.numel() * key.element_size()
    names = {"op": "window_scores", "tokens": tokens, "dtype": dtype}
    run = (lambda: ops.window_scores(query, key, 7, "avgpool"), lambda: published_scores(query, key))
    compare(benchmark, which, *run, speed, read, **names)


@dtypes
@lengths
def test_products_of_window_scores(benchmark: Any, tokens: int, dtype: str, speed: float) -> None:
    """The matrix products alone, in float32: what scoring cannot go below on a CPU."""
    query, key = (states.float() for states in keys(tokens, dtype))
    grouped = query.view(GROUPS, -1, DIM)
    out = torch.empty(HEADS // GROUPS * WINDOW, tokens, device=DEVICE)

    def run() -> None:
        for group in range(GROUPS):
            torch.matmul(grouped[group], key[0, group].T, out=out)

    names = {"op": "window_scores", "tokens": tokens, "dtype": dtype}
    timed(benchmark, run, 3, file=__name__, side="products", limit=0.0, **names)


@sides
@lengths
def test_token_ranks(benchmark: Any, which: str, tokens: int, speed: float) -> None:
    scores, _, _ = history(tokens)
    run = (lambda: ops.token_ranks(scores[-1]), lambda: published_ranks(scores[-1]))
    compare(benchmark, which, *run, speed, 8 * tokens, op="token_ranks", tokens=tokens, dtype="float32")


@sides
@lengths
def test_rank_variance(benchmark: Any, which: str, tokens: int, speed: float) -> None:
    scores, ranks, budget = history(tokens)
    count = int(budget)
    stacked = torch.stack(ranks)
    run = (lambda: ops.rank_variance(stacked, budget), lambda: published_variance(scores, ranks, count))
    compare(benchmark, which, *run, speed, 4 * LAYERS * tokens, op="rank_variance", tokens=tokens, dtype="int32")


@sides
@lengths
def test_select_tokens(benchmark: Any, which: str, tokens: int, speed: float) -> None:
    scores, ranks, budget = history(tokens)
    count = int(budget)

    def ours() -> torch.Tensor:
        return ops.kept_indices(ops.select_tokens(ranks[-1], budget, WINDOW), count + WINDOW)[0]

    run = (ours, lambda: published_selection(scores[-1], count, tokens))
    compare(benchmark, which, *run, speed, 5 * tokens, op="select_tokens", tokens=tokens, dtype="int32")


@sides
@dtypes
@lengths
def test_gather_tokens(benchmark: Any, which: str, tokens: int, dtype: str, speed: float) -> None:
    states = torch.randn(1, tokens, WIDTH, dtype=getattr(torch, dtype), device=DEVICE)
    slots = torch.randperm(tokens, device=DEVICE)[: min(BUDGET, tokens // 2)].sort().values[None]

    def published() -> torch.Tensor:
        return states.gather(1, slots[..., None].expand(-1, -1, WIDTH))

    read = 2 * slots.numel() * WIDTH * states.element_size()
    names = {"op": "gather_tokens", "tokens": tokens, "dtype": dtype}
    compare(benchmark, which, lambda: ops.gather_tokens(states, slots), published, speed, read, **names)


@sides
@dtypes
@lengths
def test_compact_kv(benchmark: Any, which: str, tokens: int, dtype: str, speed: float) -> None:
    _, key = keys(tokens, dtype)
    value, count = torch.randn_like(key), min(BUDGET, tokens // 2)
    slots = torch.stack([torch.randperm(tokens, device=DEVICE)[:count].sort().values for _ in range(GROUPS)])[None]

    def published() -> tuple[torch.Tensor, torch.Tensor]:
        index = slots[..., None].expand(-1, -1, -1, DIM)
        return key.gather(2, index), value.gather(2, index)

    read = 4 * slots.numel() * DIM * key.element_size()
    names = {"op": "compact_kv", "tokens": tokens, "dtype": dtype}
    compare(benchmark, which, lambda: ops.compact_kv(key, value, slots), published, speed, read, **names)


@sides
@lengths
def test_decision(benchmark: Any, which: str, tokens: int, speed: float) -> None:
    """What one observed layer costs after its scores: ranks, variance over the observed layers, the tokens that stay.
    The limit is one read of that layer's keys in float32."""
    scores, ranks, budget = history(tokens)
    count, reference = int(budget), torch.ones(1, dtype=torch.float64, device=DEVICE)

    def ours() -> torch.Tensor:
        seen = [*ranks[:-1], ops.token_ranks(scores[-1])]
        variance = ops.rank_variance(torch.stack(seen), budget)[0]
        variance_ratio(torch.stack([reference, variance]), "peak")
        return ops.kept_indices(ops.select_tokens(seen[-1], budget, WINDOW), count + WINDOW)[0]

    def published() -> torch.Tensor:
        seen = [*ranks[:-1], published_ranks(scores[-1])]
        published_variance(scores, seen, count)
        return published_selection(scores[-1], count, tokens)

    read = GROUPS * tokens * DIM * 4
    compare(benchmark, which, ours, published, speed, read, op="decision", tokens=tokens, dtype="float32")


def tables(rows: list[dict[str, Any]]) -> str:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        case = found.setdefault((row["op"], row["dtype"], row["tokens"]), {})
        case[row["side"]] = row["seconds"]
        case["limit"] = max(row["limit"], case.get("limit", 0.0))
    lines = []
    for (op, dtype, tokens), case in found.items():
        if "ours" not in case:
            continue
        products = f"{case['products'] * 1e3:.2f}" if "products" in case else ""
        lines.append(
            [op, dtype, f"{tokens:,}", f"{case['ours'] * 1e3:.2f}", f"{case['published'] * 1e3:.2f}"]
            + [f"{case['published'] / case['ours']:.1f}", f"{case['limit'] * 1e3:.2f}"]
            + [f"{case['ours'] / case['limit']:.1f}", products]
        )
    heads = ["op", "dtype", "tokens", "ours, ms", "published, ms", "times faster", "memory limit, ms", "ours / limit"]
    note = (
        f"B 1, H {HEADS}, G {GROUPS}, D {DIM}, W {WINDOW}, {LAYERS} observed layers, budget {BUDGET}. The memory limit "
        "is what an op must read and write, at the bandwidth measured in the same run; for `decision`, which is ranks, "
        "variance and selection at one layer, one read of the layer's keys."
    )
    return f"{note}\n\n{table([*heads, 'products alone, ms'], lines)}"
