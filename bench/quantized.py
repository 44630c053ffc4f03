"""Eight bits: what a smaller cache and smaller weights cost and save.

Caches: every prompt is read and pruned once, as it is whatever the cache, then kept as the model makes it, in int8 and
in fp8, and answered from each. Decode takes turns over one long prompt, a few tokens of each kind. Weights: torchao's
`quantize_` on the whole model, which is then timed unpatched and patched, in turns. Needs torchao.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from typing import Any

import torch
import torchao
from decode import STEPS, TURNS, _read, _stepper, _take_turns
from prefill import _prefill, _prompt
from rich.progress import track
from setting import arguments, setting, table, write
from torchao import quantization

import flexasl
from flexasl import embedded
from flexasl.quantizing import quantize
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids

ANSWER_TOKENS = 12
KINDS = (None, "int8", "fp8")
WEIGHTS = (None, "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")
SHORT = 64
"""Tokens that quantised weights read before their decode is timed."""
SLOW = 10.0
"""Seconds of a prefill that is timed once."""
PARTS = ("needles", "decode", "weights")
HEADS_OF_CACHES = ["model", "cache", "MiB", "of bfloat16", "ms a token", "× as long"]
HEADS_OF_WEIGHTS = ["model", "weights", "", "prefill, s", "× as long", "ms a token", "× as long"]


def main() -> None:
    args = _arguments()
    setting()
    config = flexasl.ASLConfig(select_tokens=args.select_tokens)
    caches: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        model, tokenizer = embedded.load(getattr(torch, dtype), args.device)
        with flexasl.patch(model, config):
            found = _needles(model, tokenizer, args) if "needles" in args.parts and dtype in args.needle_dtypes else {}
            timed = _decode(model, tokenizer, args) if "decode" in args.parts else {}
        caches += [{"dtype": dtype, "cache": kind, **timed.get(kind, {}), **found.get(kind, {})} for kind in KINDS]
        if "weights" in args.parts:
            weights += [{"dtype": dtype, **row} for row in _weights(model, tokenizer, args)]
    parts = [f"torchao {torchao.__version__}"]
    if "needles" in args.parts or "decode" in args.parts:
        heads = HEADS_OF_CACHES + [f"found at {tokens:,}" for tokens in args.needle_tokens]
        parts += [
            f"Caches, with select_tokens={args.select_tokens}. Bytes and time after a prompt of {args.tokens[0]:,} "
            f"tokens; × is against the same model's own cache. Sentences found, of {args.prompts}, in prompts of so "
            f"many tokens; in brackets, answers of {ANSWER_TOKENS} tokens of which none differs from those by that "
            "cache.",
            table(heads, [_cache_row(row, args) for row in caches]),
        ]
    if weights:
        parts += [
            f"Weights. A prompt of {args.weight_tokens:,} tokens, of which patched models select a quarter; × is "
            "against unquantised weights, both patched or both not.",
            table(HEADS_OF_WEIGHTS, _weight_rows(weights)),
        ]
    write(args.out, "Eight bits", "\n\n".join(parts), {"caches": caches, "weights": weights})


def _needles(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str | None, dict[str, Any]]:
    """By kind of cache, for each length, in which prompts the sentence was found, and in which the answer was, token
    for token, that of the model's own cache."""
    found: dict[str | None, dict[str, Any]] = {kind: {"found": {}, "same": {}} for kind in KINDS}
    for tokens in args.needle_tokens:
        for seed in track(range(args.prompts), f"{tokens} tokens", disable=None):
            fact, depth = magic_number(seed), (seed + 0.5) / args.prompts
            message = needle_prompt(
                tokenizer, tokens, depth, fact.needle, fact.question, seed, answer_prefix=fact.answer_prefix
            )
            ids = torch.tensor([prompt_ids(tokenizer, message, fact.answer_prefix)], device=args.device)
            with torch.no_grad():
                out = model(ids, logits_to_keep=1)
            said = {kind: _say(model, out.logits, kept_in(out.past_key_values, kind)) for kind in KINDS}
            for kind, answer in said.items():
                found[kind]["found"].setdefault(tokens, []).append(fact.answer in tokenizer.decode(answer))
                found[kind]["same"].setdefault(tokens, []).append(answer == said[None])
    return found


@torch.no_grad()
def _say(model: Any, logits: torch.Tensor, cache: Any) -> list[int]:
    """The greedy answer."""
    tokens = []
    for _ in range(ANSWER_TOKENS):
        token = logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        logits = model(token, past_key_values=cache).logits
    return tokens


def kept_in(cache: Any, kind: str | None) -> Any:
    """What a patch with this `kv_dtype` would have made of the prompt."""
    cache = copy.deepcopy(cache)
    for layer in cache.layers if kind is not None else ():
        keys, values = layer.stored
        (small, scales), (other, others) = quantize(keys, kind), quantize(values, kind)
        marks = {"seen": layer.seen, "uncroppable": layer.uncroppable}
        layer.restore([small, other, scales, others], layer.positions, layer.valid, dtype=keys.dtype, **marks)
    return cache


def _decode(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str | None, dict[str, Any]]:
    """By kind of cache: its bytes after a prompt, and seconds of tokens after it."""
    cache = _read(model, _prompt(tokenizer, args.tokens[0], args.device))
    caches = {str(kind): kept_in(cache, kind) for kind in KINDS}
    sizes = {kind: sum(layer.nbytes for layer in one.layers) for kind, one in caches.items()}
    whole = sum(layer.nbytes_unquantized for layer in cache.layers) // model.dtype.itemsize * 2
    times = _take_turns({kind: _stepper(model, one, 1) for kind, one in caches.items()})
    return {
        kind: {"bytes": sizes[str(kind)], "bytes_bfloat16": whole}
        | {"seconds": times[str(kind)][1], "own_seconds": times["None"][1]}
        for kind in KINDS
    }


def _weights(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of prefills and of tokens, by weights, unpatched and patched."""
    config = flexasl.ASLConfig(select_tokens=0.25)
    ids = _prompt(tokenizer, args.weight_tokens, args.device)
    models, rows = {}, []
    for name in WEIGHTS:
        models[name] = copy.deepcopy(model)
        if name is not None:
            quantization.quantize_(models[name], getattr(quantization, name)())
        rows += [{"weights": name, "patched": patched, "prefill": [], "token": []} for patched in (False, True)]

    def patching(row: dict[str, Any]) -> Any:
        return flexasl.patch(models[row["weights"]], config) if row["patched"] else contextlib.nullcontext()

    steps = []
    for row in track(rows, "weights", disable=None):
        one = models[row["weights"]]
        with patching(row):
            if row["weights"] is None:
                _prefill(one, ids)
            row["prefill"].append(_prefill(one, ids))
            steps.append(_stepper(one, _read(one, ids[:, :SHORT]), 1))
            steps[-1]()
    for _ in range(args.pairs - 1):
        for row in rows:
            if row["prefill"][0] < SLOW:
                with patching(row):
                    row["prefill"].append(_prefill(models[row["weights"]], ids))
    for _ in range(TURNS // 2):
        for row, step in zip(rows, steps, strict=True):
            with patching(row):
                step()
                row["token"] += [step() for _ in range(STEPS)]
    return rows


def _cache_row(row: dict[str, Any], args: argparse.Namespace) -> list[Any]:
    cells = [row["dtype"], row["cache"] or row["dtype"], "", "", "", ""]
    if "bytes" in row:
        size, median, own = row["bytes"], statistics.median(row["seconds"]), statistics.median(row["own_seconds"])
        cells[2:5] = [f"{size / 2**20:.1f}", f"{size / row['bytes_bfloat16']:.3f}", f"{median * 1e3:.1f}"]
        cells[5] = f"{median / own:.2f}"
    found, same = row.get("found", {}), row.get("same", {})
    return cells + [f"{sum(found[n])} ({sum(same[n])})" if n in found else "" for n in args.needle_tokens]


def _weight_rows(rows: list[dict[str, Any]]) -> list[list[Any]]:
    made = []
    for row in rows:
        (own,) = (
            one
            for one in rows
            if (one["dtype"], one["patched"], one["weights"]) == (row["dtype"], row["patched"], None)
        )
        cells = [row["dtype"], row["weights"] or row["dtype"], "patched" if row["patched"] else "unpatched"]
        for name, scale, spec in (("prefill", 1, ".2f"), ("token", 1e3, ".1f")):
            median, base = statistics.median(row[name]), statistics.median(own[name])
            cells += [f"{median * scale:{spec}}", f"{median / base:.2f}"]
        made.append(cells)
    return made


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--needle-dtypes", nargs="+", default=["float32"], help="a CPU reads long in bfloat16")
    parser.add_argument("--prompts", type=int, default=10, help="needles of each length")
    parser.add_argument("--needle-tokens", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--weight-tokens", type=int, default=256, help="the prompt that quantised weights read")
    parser.add_argument("--pairs", type=int, default=3, help="prefills of each kind")
    parser.set_defaults(tokens=[4000])
    return parser.parse_args()


if __name__ == "__main__":
    main()
