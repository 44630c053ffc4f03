"""Prefill time of a patched model as a share of the unpatched one's, beside the limit that arithmetic sets.

A prompt of N tokens pruned to K after layer s cannot take less than (s + 1 + (L - 1 - s) c) / L of the full time, where
c is what a layer costs on K tokens as a share of one on N, measured here. Runs alternate, and shares are medians of
pairs, because machines are shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from setting import arguments, setting, table, write

import flexasl
from flexasl import embedded
from flexasl.prefill import Prefill
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids


def main() -> None:
    args = _arguments()
    setting()
    model, tokenizer = embedded.load(getattr(torch, args.dtype), args.device)
    layers = model.config.num_hidden_layers
    rows, data = [], []
    for tokens in args.tokens:
        ids = _prompt(tokenizer, tokens, args.device)
        keep_all = _pairs(model, ids, flexasl.ASLConfig(select_tokens=1.0), "asl", args.pairs)
        rows.append(
            [ids.shape[1], "all", "", _seconds(keep_all, 0), _seconds(keep_all, 1), _share(keep_all), "1.000", ""]
        )
        data.append({"tokens": ids.shape[1], "keep": "all", "pairs": keep_all})
        cost = _layer_share(model, ids.shape[1], args.select_tokens, args.pairs)
        config = flexasl.ASLConfig(select_tokens=args.select_tokens)
        for name, policy in [("asl", "asl")] + [(f"layer {s}", flexasl.policies.FixedLayer(s)) for s in args.layers]:
            pairs = _pairs(model, ids, config, policy, args.pairs)
            selected, scoring = _decision(model, ids, config, policy)
            limit = (selected + 1 + (layers - 1 - selected) * cost) / layers
            median = statistics.median(b / a for a, b in pairs)
            rows.append(
                [ids.shape[1], f"{args.select_tokens}, {name}", selected, _seconds(pairs, 0), _seconds(pairs, 1)]
                + [_share(pairs), f"{limit:.3f} ({median / limit - 1:+.1%})", f"{scoring:.2%}"]
            )
            data.append(
                {"tokens": ids.shape[1], "keep": args.select_tokens, "policy": name, "selected_layer": selected}
                | {"pairs": pairs, "limit": limit, "layer_share": cost, "scoring_share": scoring}
            )
    heads = [
        "tokens",
        "kept",
        "layer",
        "unpatched, s",
        "patched, s",
        "share",
        "limit (above it)",
        "scoring and decision",
    ]
    write(args.out, "Prefill", table(heads, rows), {"rows": data})


def _pairs(model: Any, ids: torch.Tensor, config: Any, policy: Any, count: int) -> list[tuple[float, float]]:
    """Seconds of one prefill unpatched and patched, turn by turn; who goes first alternates."""
    pairs = []
    for turn in range(count):
        seconds = {}
        for patched in (turn % 2 == 0, turn % 2 == 1):
            if patched:
                with flexasl.patch(model, config, policy):
                    seconds[patched] = _prefill(model, ids)
            else:
                seconds[patched] = _prefill(model, ids)
        pairs.append((seconds[False], seconds[True]))
    return pairs


@torch.no_grad()
def _prefill(model: Any, input_ids: torch.Tensor, **inputs: torch.Tensor) -> float:
    _wait(input_ids)
    start = time.perf_counter()
    model(input_ids, logits_to_keep=1, **inputs)
    _wait(input_ids)
    return time.perf_counter() - start


def _decision(model: Any, ids: torch.Tensor, config: Any, policy: Any) -> tuple[int, float]:
    """The layer selected, and the share of prefill that scoring, ranking, variance and selection take."""
    spent, observe, advance = 0.0, Prefill.observe, Prefill.advance

    def timed(inner: Any) -> Any:
        def run(*args: Any, **settings: Any) -> Any:
            nonlocal spent
            _wait(ids)
            start = time.perf_counter()
            result = inner(*args, **settings)
            _wait(ids)
            spent += time.perf_counter() - start
            return result

        return run

    Prefill.observe, Prefill.advance = timed(observe), timed(advance)  # type: ignore[method-assign]
    try:
        with flexasl.patch(model, config, policy) as patch:
            total = _prefill(model, ids)
    finally:
        Prefill.observe, Prefill.advance = observe, advance  # type: ignore[method-assign]
    assert patch.report is not None
    selected = patch.report.rows[0].selected_layer
    return (patch.report.num_layers - 1 if selected is None else selected), spent / total


@torch.no_grad()
def _layer_share(model: Any, tokens: int, kept: int, count: int) -> float:
    """Time of one decoder layer on `kept` tokens as a share of the same on `tokens`."""
    decoder = model.get_decoder()
    layer = decoder.layers[len(decoder.layers) // 2]
    times: dict[int, list[float]] = {tokens: [], kept: []}
    for _ in range(2 * count + 1):
        for length, seconds in times.items():
            hidden = torch.randn(1, length, model.config.hidden_size, dtype=model.dtype, device=model.device)
            at = torch.arange(length, device=model.device)[None]
            rotary = decoder.rotary_emb(hidden, position_ids=at)
            _wait(hidden)
            start = time.perf_counter()
            layer(hidden, position_embeddings=rotary, position_ids=at)
            _wait(hidden)
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[kept]) / statistics.median(times[tokens])


def _prompt(tokenizer: Any, tokens: int, device: str) -> torch.Tensor:
    fact = magic_number(1)
    message = needle_prompt(tokenizer, tokens, 0.5, fact.needle, fact.question, 1, answer_prefix=fact.answer_prefix)
    return torch.tensor([prompt_ids(tokenizer, message, fact.answer_prefix)], device=device)


def _wait(states: torch.Tensor) -> None:
    if states.is_cuda:
        torch.cuda.synchronize()


def _seconds(pairs: list[tuple[float, float]], side: int) -> str:
    return f"{statistics.median(pair[side] for pair in pairs):.2f}"


def _share(pairs: list[tuple[float, float]]) -> str:
    return f"{statistics.median(b / a for a, b in pairs):.3f}"


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[15, 18], help="fixed layers to compare with")
    parser.add_argument("--pairs", type=int, default=5, help="paired runs of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    main()
