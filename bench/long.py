"""What a decision takes for long prompts, with small heads: peak memory beside its inputs, and time.

One layer of 8 query heads and 2 KV heads of 16 numbers, and the ranks of 8 layers. Each line has a process of its own
for memory, which gives every block back at once, and another for time. Time is the processor's in the quickest of the
runs, which depends little on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import LEAN, MIB, peak, reset_peak
from setting import setting, table, write

import flexasl
from flexasl import ops
from flexasl.selectors import StagedSelector

HEADS, GROUPS, DIM, WINDOW, CONTROLS, LAYERS, KEPT = 8, 2, 16, 32, 32, 8, 2048
HEADS_OF_TABLE = ["what", "tokens", "peak, MiB", "bytes a token", "ms", "µs a 1,000 tokens"]


def main() -> None:
    args = _arguments()
    setting()
    if args.child:
        print(json.dumps(_measure(args.child, args.tokens[0], args.runs)))
        return
    found = []
    for part in PARTS:
        for tokens in args.tokens:
            one: dict[str, Any] = {"part": part, "tokens": tokens}
            for runs, settings in ((0, LEAN), (args.runs, {})):
                child = [sys.executable, __file__, "--child", part, "--tokens", str(tokens), "--runs", str(runs)]
                done = subprocess.run(child, capture_output=True, text=True, check=True, env=os.environ | settings)
                one |= json.loads(done.stdout)
            found.append(one)
    rows = []
    for one in found:
        least, tokens = min(one["seconds"]), one["tokens"]
        rows.append([one["part"], tokens, f"{one['peak'] / MIB:.1f}", f"{one['peak'] / tokens:.0f}"])
        rows[-1] += [f"{least * 1e3:.1f}", f"{least * 1e9 / tokens:.2f}"]
    write(args.out, "Long prompts", table(HEADS_OF_TABLE, rows), {"cases": found})


@torch.no_grad()
def _measure(part: str, tokens: int, runs: int) -> dict[str, Any]:
    """Bytes by which resident memory peaks above its level before; of some runs, the processor's seconds of each."""
    torch.manual_seed(0)
    PARTS[part](4 * WINDOW + 2 * KEPT)()  # what is loaded on first use
    run = PARTS[part](tokens)
    before, seconds = reset_peak(), []
    run()
    if not runs:
        return {"peak": peak() - before}
    for _ in range(runs):
        begun = time.process_time()
        run()
        seconds.append(time.process_time() - begun)
    return {"seconds": seconds}


def _scoring(tokens: int) -> Callable[[], Any]:
    query, key = torch.randn(1, HEADS, CONTROLS + WINDOW, DIM), torch.randn(1, GROUPS, tokens, DIM)
    at = torch.arange(tokens - CONTROLS - WINDOW, tokens)[None]
    how = {"query_at": at, "power": math.inf, "controls": CONTROLS}
    return lambda: ops.window_scores(query, key, 17, "phrase", **how)


def _ranking(tokens: int) -> Callable[[], Any]:
    scores = torch.rand(1, tokens)
    return lambda: ops.token_ranks(scores)


def _variance(tokens: int) -> Callable[[], Any]:
    ranks = torch.stack([torch.randperm(tokens, dtype=torch.int32)[None] + 1 for _ in range(LAYERS)])
    return lambda: ops.rank_variance(ranks, torch.tensor([KEPT]))


def _selection(tokens: int) -> Callable[[], Any]:
    ranks, states = torch.randperm(tokens - WINDOW, dtype=torch.int32)[None] + 1, torch.randn(1, tokens, DIM)

    def run() -> torch.Tensor:
        keep = ops.select_tokens(ranks, torch.tensor([KEPT - WINDOW]), WINDOW)
        return ops.gather_tokens(states, ops.kept_indices(keep, KEPT)[0])

    return run


def _rule(tokens: int) -> Callable[[], Any]:
    config = flexasl.ASLConfig(
        select_tokens=KEPT, window=WINDOW, min_layer=1, min_layer_unasked=1, max_layer=2, tau=1.0
    )
    config, scores = config.replace(stages=()).resolve(4), torch.rand(1, tokens - WINDOW)

    def run() -> None:
        selector = StagedSelector(config, [tokens])
        for layer in range(3):
            if selector.needs(layer):
                selector.observe(layer, scores)
                selector.select(layer)

    return run


PARTS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "scoring": _scoring,
    "ranking": _ranking,
    "rank variance": _variance,
    "selection and dropping": _selection,
    "the rule of look-ups, three layers": _rule,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the table, without ending")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
