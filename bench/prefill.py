"""Prefill time of a patched model as a share of the unpatched one's, beside the limit that arithmetic sets.

A prompt cannot take less of the full time than the mean over layers of what a layer costs on the tokens that are left,
as a share of its cost on all of them, measured here; `counted` is the same in operations. `asl` ranks by the question,
fixed layers by the window. Runs alternate, and shares are medians of pairs, because machines are shared; where others
work beside it, `--clock processor` counts this process's own seconds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from setting import arguments, setting, table, write

import flexasl
from flexasl.prefill import Prefill
from flexasl.tools.evaluation.costs import layer_costs, row_share
from flexasl.tools.evaluation.tasks import build
from flexasl.tools.loading import load_model
from flexasl.tools.text import encode, magic_number, needle_prompt, prompt_ids

FACT = magic_number(1)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SEED = 180
"""Of the evaluation's prompts; no setting was chosen on them."""
_now = time.perf_counter
"""The clock that is read."""


def main() -> None:
    global _now
    args = _arguments()
    _now = CLOCKS[args.clock]
    setting()
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    rows, data, costs = [], [], layer_costs(model)
    for tokens, task in itertools.product(args.tokens, args.tasks or [None]):
        ids, asking = _prompt(tokenizer, tokens, task, args.device)
        if args.keep_all:
            pairs = _pairs(model, ids, args.pairs, config=flexasl.ASLConfig(select_tokens=1.0), **asking)
            rows.append(
                [
                    *_named(ids, task),
                    "all",
                    "",
                    _seconds(pairs, 0),
                    _seconds(pairs, 1),
                    _share(pairs),
                    "1.000",
                    "1.000",
                    "",
                ]
            )
            data.append({"tokens": ids.shape[1], "task": task, "keep": "all", "pairs": pairs})
        config = flexasl.ASLConfig(select_tokens=args.select_tokens)
        known = {ids.shape[1]: 1.0}
        for name in ["asl", *(f"fixed_layer:layer={layer}" for layer in args.layers)]:
            patching = {"config": config, "policy": name} | (asking if name == "asl" else {})
            pairs = _pairs(model, ids, args.pairs, **patching)
            row, scoring = _decision(model, ids, **patching)
            for left in {*row.layer_tokens} - {*known}:
                known[left] = _layer_share(model, ids.shape[1], left, args.pairs)
            limit = statistics.fmean(known[left] for left in row.layer_tokens)
            selected = ", ".join(str(selection.layer) for selection in row.selections)
            median = statistics.median(b / a for a, b in pairs)
            rows.append(
                [*_named(ids, task), f"{args.select_tokens}, {name}", selected, _seconds(pairs, 0), _seconds(pairs, 1)]
                + [_share(pairs), f"{row_share(costs, row):.3f}", f"{limit:.3f} ({median / limit - 1:+.1%})"]
                + [f"{scoring:.2%}"]
            )
            data.append(
                {"tokens": ids.shape[1], "task": task, "keep": args.select_tokens, "policy": name}
                | {"selected_layers": [selection.layer for selection in row.selections], "pairs": pairs}
                | {
                    "counted": row_share(costs, row),
                    "limit": limit,
                    "layer_shares": dict(known),
                    "scoring_share": scoring,
                }
            )
    heads = [
        "tokens",
        *(["prompt"] if args.tasks else []),
        "kept",
        "layers",
        "unpatched, s",
        "patched, s",
        "share",
        "counted",
        "limit (above it)",
        "scoring and decision",
    ]
    write(args.out, "Prefill", table(heads, rows), {"rows": data})


def _pairs(model: Any, ids: torch.Tensor, count: int, **patching: Any) -> list[tuple[float, float]]:
    """Seconds of one prefill unpatched and patched, turn by turn; who goes first alternates."""
    pairs = []
    for turn in range(count):
        seconds = {}
        for patched in (turn % 2 == 0, turn % 2 == 1):
            if patched:
                with flexasl.patch(model, **patching):
                    seconds[patched] = _prefill(model, ids)
            else:
                seconds[patched] = _prefill(model, ids)
        pairs.append((seconds[False], seconds[True]))
    return pairs


@torch.no_grad()
def _prefill(model: Any, input_ids: torch.Tensor, **inputs: torch.Tensor) -> float:
    _wait(input_ids)
    start = _now()
    model(input_ids, logits_to_keep=1, **inputs)
    _wait(input_ids)
    return _now() - start


def _decision(model: Any, ids: torch.Tensor, **patching: Any) -> tuple[Any, float]:
    """The report of the prompt, and the share of prefill that scoring and decision take."""
    spent, observe, advance = 0.0, Prefill.observe, Prefill.advance

    def timed(inner: Any) -> Any:
        def run(*args: Any, **settings: Any) -> Any:
            nonlocal spent
            _wait(ids)
            start = _now()
            result = inner(*args, **settings)
            _wait(ids)
            spent += _now() - start
            return result

        return run

    Prefill.observe, Prefill.advance = timed(observe), timed(advance)  # type: ignore[method-assign]
    try:
        with flexasl.patch(model, **patching) as patch:
            total = _prefill(model, ids)
    finally:
        Prefill.observe, Prefill.advance = observe, advance  # type: ignore[method-assign]
    assert patch.report is not None
    return patch.report.rows[0], spent / total


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
            start = _now()
            layer(hidden, position_embeddings=rotary, position_ids=at)
            _wait(hidden)
            seconds.append(_now() - start)
    return statistics.median(times[kept]) / statistics.median(times[tokens])


def _prompt(tokenizer: Any, tokens: int, task: str | None, device: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """The tokens of an evaluation's prompt, or where no task is named of one needle, and what a patch that ranks by its
    question is given."""
    if task is not None:
        sample = build(task, tokenizer, tokens, SEED, 0)
        ids = encode(tokenizer, sample.prompt)
        return torch.tensor([ids], device=device), {"tokenizer": tokenizer}
    needle, question, begin, _ = FACT
    message = needle_prompt(tokenizer, tokens, 0.5, needle, question, 1, answer_prefix=begin)
    ids = prompt_ids(tokenizer, message, begin)
    return torch.tensor([ids], device=device), {"tokenizer": tokenizer, "question": question}


def _named(ids: torch.Tensor, task: str | None) -> list[Any]:
    return [ids.shape[1], *([] if task is None else [task])]


def _wait(states: torch.Tensor) -> None:
    if states.is_cuda:
        torch.cuda.synchronize()


def _seconds(pairs: list[tuple[float, float]], side: int) -> str:
    return f"{statistics.median(pair[side] for pair in pairs):.2f}"


def _share(pairs: list[tuple[float, float]]) -> str:
    return f"{statistics.median(b / a for a, b in pairs):.3f}"


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: the embedded one")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--layers", type=int, nargs="*", default=[15, 18], help="fixed layers to compare with")
    parser.add_argument(
        "--tasks", nargs="*", help="prompts of these tasks of `flexasl eval`, one each; default: a needle"
    )
    parser.add_argument("--keep-all", action=argparse.BooleanOptionalAction, default=True, help="nothing dropped, too")
    parser.add_argument("--pairs", type=int, default=5, help="paired runs of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    main()
