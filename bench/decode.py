"""Time per output token after a long prompt: unpatched, compiled with a static cache, and patched. And after short
prompts, within the budget, which a patch leaves alone: what it costs there.

All read the same prompt once; for a batch its cache is repeated. Then they take turns, a few tokens each, and medians
are compared. The limit is the bytes of weights and cache that a token must read, at the bandwidth measured in the same
run. Compile time is reported apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from prefill import _prompt
from setting import arguments, setting, table, write
from timing import bandwidth
from transformers import DynamicCache, StaticCache

import flexasl
from flexasl import embedded

TURNS, STEPS = 6, 5


def main() -> None:
    args = _arguments()
    setting()
    rows, data, short_rows, short_data = [], [], [], []
    for dtype in args.dtypes:
        models = [embedded.load(getattr(torch, dtype), args.device) for _ in range(4)]
        prompt = _prompt(models[0][1], args.tokens[0], args.device)
        plain, small, whole, eager = (model for model, _ in models)
        budget = {"select_tokens": args.select_tokens}
        flexasl.patch(small, flexasl.ASLConfig(**budget, kv_budget=args.select_tokens), compile=True)
        flexasl.patch(whole, flexasl.ASLConfig(**budget), compile=True)
        flexasl.patch(eager, flexasl.ASLConfig(**budget, kv_budget=args.select_tokens))
        for count in args.short:
            short = {"unpatched": plain, "patched": eager, "patched, compiled": whole}
            for row in _within_budget(short, models[0][1], count, args):
                short_rows.append([dtype, count, row["name"], f"{row['median'] * 1e3:.1f}", f"{row['cost']:.3f}"])
                short_data.append({"dtype": dtype, "prompt": count} | row)
        print(table([""] * 5, short_rows), flush=True)
        caches = [_read(model, prompt) for model in (plain, small, whole, eager)] if args.batches else []
        for batch in args.batches:
            for cache in caches:
                cache.batch_repeat_interleave(batch // _rows(cache))
            speed = bandwidth()
            steps = {
                "unpatched": _stepper(plain, caches[0], batch),
                "unpatched, compiled, static cache": _static(plain, caches[0], batch),
                "patched, kv_budget": _stepper(eager, caches[3], batch),
                "patched, kv_budget, compiled": _stepper(small, caches[1], batch),
                "patched, compiled": _stepper(whole, caches[2], batch),
            }
            times = _take_turns(steps)
            held = [caches[0], caches[0], caches[3], caches[1], caches[2]]
            weights = sum(part.numel() * part.element_size() for part in plain.parameters())
            for (name, (first, seconds)), cache in zip(times.items(), held, strict=True):
                limit = (weights + _bytes(cache)) / speed
                median = statistics.median(seconds)
                base = [statistics.median(times[other][1]) / median for other in list(times)[:2]]
                rows.append(
                    [dtype, batch, name, f"{median * 1e3:.1f}", f"{base[0]:.2f}", f"{base[1]:.2f}"]
                    + [f"{limit * 1e3:.1f}", f"{first:.1f}"]
                )
                data.append(
                    {"dtype": dtype, "batch": batch, "name": name, "seconds": seconds, "first_seconds": first}
                    | {"limit": limit, "bandwidth": speed, "prompt": prompt.shape[1]}
                )
            print(table([""] * 8, rows[-5:]), flush=True)
    heads = ["dtype", "batch", "what", "ms a token", "× unpatched", "× static", "limit, ms", "first token, s"]
    note = (
        f"A prompt of {prompt.shape[1]:,} tokens, select_tokens={args.select_tokens}; `kv_budget` is the same where "
        "named. `×` says how many times faster a row is. The first token includes compiling."
    )
    short_heads = ["dtype", "prompt tokens", "what", "ms a token", "time ÷ unpatched"]
    short_note = "After prompts within the budget, batch 1, from which nothing is dropped:"
    tables = f"{short_note}\n\n{table(short_heads, short_rows)}"
    if rows:
        tables = f"{note}\n\n{table(heads, rows)}\n\n{tables}"
    write(args.out, "Decode", tables, {"rows": data, "within_budget": short_data})


def _within_budget(
    models: dict[str, Any], tokenizer: Any, count: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each of the models, times of a token after one prompt of so many tokens."""
    prompt = _prompt(tokenizer, count + 100, args.device)[:, -count:]
    times = _take_turns({name: _stepper(model, _read(model, prompt), 1) for name, model in models.items()})
    medians = {name: statistics.median(seconds) for name, (_, seconds) in times.items()}
    base = medians["unpatched"]
    return [
        {"name": name, "seconds": times[name][1], "median": median, "cost": median / base}
        for name, median in medians.items()
    ]


def _take_turns(steps: dict[str, Callable[[], float]]) -> dict[str, tuple[float, list[float]]]:
    """Seconds of the first token, and of all later ones that were timed."""
    first = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            step()
            seconds[name] += [step() for _ in range(STEPS)]
    return {name: (first[name], seconds[name]) for name in steps}


@torch.no_grad()
def _read(model: Any, prompt: torch.Tensor) -> DynamicCache:
    return model(prompt, logits_to_keep=1).past_key_values


def _stepper(model: Any, cache: Any, batch: int) -> Callable[[], float]:
    token = torch.full((batch, 1), 5, device=model.device)
    return lambda: _timed(lambda: model(token, past_key_values=cache), token)


def _static(model: Any, cache: DynamicCache, batch: int) -> Callable[[], float]:
    """The unpatched model, compiled as a whole over a static cache that is filled from another."""
    read = cache.get_seq_length()
    static = StaticCache(config=model.config, max_cache_len=read + (STEPS + 1) * TURNS + 8)
    for index, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, index)
    torch._dynamo.reset_code(type(model).forward.__code__)
    compiled = torch.compile(model.forward, fullgraph=True)
    token, at = torch.full((batch, 1), 5, device=model.device), torch.full((batch, 1), read, device=model.device)

    def step() -> float:
        at.add_(1)
        return _timed(lambda: compiled(token, past_key_values=static, position_ids=at - 1), token)

    return step


@torch.no_grad()
def _timed(run: Callable[[], Any], states: torch.Tensor) -> float:
    if states.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if states.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _rows(cache: Any) -> int:
    return cache.layers[0].keys.shape[0]


def _bytes(cache: Any) -> int:
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    several = "each a multiple of the one before; none: short prompts alone"
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help=several)
    parser.add_argument("--short", type=int, nargs="+", default=[52, 500], help="prompt lengths within the budget")
    parser.set_defaults(tokens=[4000])
    args = parser.parse_args()
    if max(args.short) > args.select_tokens:
        parser.error(
            f"--short {max(args.short)} is beyond --select-tokens {args.select_tokens}; give prompts within it"
        )
    return args


if __name__ == "__main__":
    main()
