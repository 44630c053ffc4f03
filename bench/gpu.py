"""What a patched model takes on a GPU beside the unpatched one: prefill, decode, memory and waits of the host.

Models have the shapes of Llama 3 8B and SmolLM2 135M and random weights, on which times do not depend; the default
policy therefore selects where chance has it. Runs alternate, and shares are medians of pairs. The limit is what the
floating-point operations of the layers leave: all tokens up to the selection, the kept ones after it. A wait is an
operation for which the host stops until the device has caught up; where they happen is in the JSON. Results are written
after each case, and no case begins after `--seconds`.

Attention is what torch chooses for prompts. For new tokens cuDNN's is left out, which torch prefers on some GPUs: it
plans anew for every length, which takes 45 ms of an unpatched token on an H100 with torch 2.11. `--cudnn` leaves it in.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import math
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from setting import setting, table, write
from timing import bandwidth, seconds
from transformers import AutoModelForCausalLM, LlamaConfig

import flexasl

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 999,
    },
}
PREFILL_HEADS = ["model", "batch", "tokens", "what", "layer", "ms", "time ÷ unpatched", "limit", "runs", "peak, GB"]
PREFILL_HEADS += ["waits"]
DECODE_HEADS = ["model", "batch", "prompt", "what", "ms a token", "time ÷ unpatched", "limit, ms", "waits"]


def main() -> None:
    args = _arguments()
    setting()
    stop = time.monotonic() + args.seconds
    results: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": [], "left_out": []}
    sizes = sorted(((batch, tokens) for batch in args.batches for tokens in args.tokens), key=math.prod)
    for name in args.models:
        model = _model(name, getattr(torch, args.dtype), args.device, max(args.tokens) + 1024)
        _prefill(model, _prompt(model, 1, min(args.tokens)))
        speed = bandwidth()
        for (batch, tokens), kind in itertools.product(sizes, ("prefill", "decode")):
            case = {"model": name, "batch": batch, "tokens": tokens}
            if time.monotonic() > stop:
                results["left_out"].append(case | {"part": kind, "why": "no time was left"})
                continue
            try:
                if kind == "prefill":
                    results[kind] += [case | row for row in _prefills(model, batch, tokens, args, stop)]
                else:
                    torch.backends.cuda.enable_cudnn_sdp(args.cudnn)
                    results[kind] += [case | row for row in _decodes(model, batch, tokens, args, speed)]
            except torch.OutOfMemoryError:
                results["left_out"].append(case | {"part": kind, "why": "out of memory"})
            torch.backends.cuda.enable_cudnn_sdp(True)
            _free(args.device)
            _write(args.out, results, quiet=True)
        del model
        _free(args.device)
    _write(args.out, results)


def _prefills(model: Any, batch: int, tokens: int, args: argparse.Namespace, stop: float) -> list[dict[str, Any]]:
    """Times of a prefill unpatched and under each policy, in rounds in which each has a turn; its peak, its waits."""
    ids, layers, found = _prompt(model, batch, tokens), model.config.num_hidden_layers, []
    runs: list[tuple[str, Any]] = [("unpatched", None)]
    for what, policy, kept in _policies(layers, args):
        if kept == 1.0 or kept < tokens:
            runs.append((what, lambda policy=policy, kept=kept: flexasl.patch(model, _settings(kept), policy)))
    for what, patched in runs:
        with patched() if patched else contextlib.nullcontext() as patch:
            _prefill(model, ids)
            row = {"what": what, "seconds": []} | _peak_and_waits(model, ids)
            if patch is not None:
                told = patch.report.rows[0]
                limit = _limit(model.config, tokens, told.layer_tokens)
                row |= {"layer": told.selected_layer, "kept": told.kept_tokens, "limit": limit}
        found.append(row)
    for turn in range(args.pairs):
        if turn > 0 and time.monotonic() > stop:
            break
        for row, (_, patched) in list(zip(found, runs, strict=True))[:: -1 if turn % 2 else 1]:
            with patched() if patched else contextlib.nullcontext():
                row["seconds"].append(seconds(lambda: _prefill(model, ids)))
    for row in found:
        row["share"] = statistics.median(a / b for a, b in zip(row["seconds"], found[0]["seconds"], strict=True))
    return found


def _settings(kept: int | float) -> flexasl.ASLConfig:
    return flexasl.ASLConfig(select_tokens=kept)


def _policies(layers: int, args: argparse.Namespace) -> list[tuple[str, Any, int | float]]:
    """Name, policy and tokens kept."""
    quarter, middle = layers // 4 - 1, layers // 2 - 1
    return [
        ("keep all", "asl", 1.0),
        ("asl", "asl", args.select_tokens),
        (f"fixed_layer {middle}", flexasl.policies.FixedLayer(middle), args.select_tokens),
        (f"fixed_layer {quarter}", flexasl.policies.FixedLayer(quarter), args.select_tokens),
    ]


def _decodes(model: Any, batch: int, tokens: int, args: argparse.Namespace, speed: float) -> list[dict[str, Any]]:
    """Times of a new token after the prompt: unpatched, patched, and patched with fewer entries in shallow layers."""
    ids, found, weights = _prompt(model, 1, tokens), [], _bytes(model.parameters())
    budget, middle = args.select_tokens, flexasl.policies.FixedLayer(model.config.num_hidden_layers // 2 - 1)
    whats: list[tuple[str, Any]] = [("unpatched", None)]
    if tokens > budget:
        whats += [("fixed_layer", flexasl.ASLConfig(select_tokens=budget))]
        whats += [("fixed_layer, kv_budget", flexasl.ASLConfig(select_tokens=budget, kv_budget=budget))]
    for what, config in whats:
        patch = None if config is None else flexasl.patch(model, config, middle)
        try:
            cache = _prefill(model, ids)
            cache.batch_repeat_interleave(batch)
            token = ids[:, :1].repeat(batch, 1)

            def step(cache: Any = cache, token: torch.Tensor = token) -> None:
                with torch.no_grad():
                    model(token, past_key_values=cache)

            for _ in range(3):
                step()
            times = [seconds(step) for _ in range(args.steps)]
            waits, places = _counted(step, ids)
        finally:
            if patch is not None:
                patch.remove()
        held = _bytes(states for layer in cache.layers for states in (layer.keys, layer.values))
        found.append({"what": what, "seconds": times, "limit": (weights + held) / speed, "bandwidth": speed})
        found[-1] |= {"cache": held, "waits": waits, "waits_at": places}
        del cache
    return found


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> Any:
    """The cache of a prompt."""
    return model(ids, logits_to_keep=1).past_key_values


def _peak_and_waits(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Bytes at the peak of a prefill, weights included, and the waits in it."""
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    waits, places = _counted(lambda: _prefill(model, ids), ids)
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else None
    return {"peak": peak, "waits": waits, "waits_at": places}


def _counted(run: Any, ids: torch.Tensor) -> tuple[int | None, dict[str, int]]:
    """How often the host waits for the device in it, and at which lines."""
    if not ids.is_cuda:
        return None, {}
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [one for one in caught if "synchroniz" in str(one.message) and "prototype" not in str(one.message)]
    places = collections.Counter(f"{os.sep.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in waits)
    return len(waits), dict(places.most_common(20))


def _limit(config: Any, tokens: int, ran: tuple[int, ...]) -> float:
    """The share of the layers' floating-point operations that is left."""
    width = config.hidden_size
    dim = width // config.num_attention_heads
    weights = 2 * width * width + 2 * width * config.num_key_value_heads * dim + 3 * width * config.intermediate_size

    def cost(count: int) -> int:
        return 2 * weights * count + 2 * width * count * count

    return statistics.fmean(cost(count) for count in ran) / cost(tokens)


def _model(name: str, dtype: torch.dtype, device: str, positions: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=positions, eos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def _prompt(model: Any, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def _bytes(tensors: Any) -> int:
    return sum(part.numel() * part.element_size() for part in tensors)


def _free(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _write(out: Path | None, results: dict[str, list[dict[str, Any]]], *, quiet: bool = False) -> None:
    prefill = [
        [row["model"], row["batch"], row["tokens"], row["what"], "" if row.get("layer") is None else row["layer"]]
        + [f"{statistics.median(row['seconds']) * 1e3:.1f}", f"{row['share']:.3f}"]
        + [f"{row['limit']:.3f}" if "limit" in row else "", len(row["seconds"])]
        + ["" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}", "" if row["waits"] is None else row["waits"]]
        for row in results["prefill"]
    ]
    plain = {
        (row["model"], row["batch"], row["tokens"]): statistics.median(row["seconds"])
        for row in results["decode"]
        if row["what"] == "unpatched"
    }
    decode = []
    for row in results["decode"]:
        median = statistics.median(row["seconds"])
        base = plain[row["model"], row["batch"], row["tokens"]]
        decode.append(
            [row["model"], row["batch"], row["tokens"], row["what"], f"{median * 1e3:.2f}", f"{median / base:.3f}"]
            + [f"{row['limit'] * 1e3:.2f}", "" if row["waits"] is None else row["waits"]]
        )
    parts = ["## Prefill", table(PREFILL_HEADS, prefill), "## A new token", table(DECODE_HEADS, decode)]
    if results["left_out"]:
        heads = ["model", "batch", "tokens", "part", "why"]
        parts += ["## Left out", table(heads, [[row[head] for head in heads] for row in results["left_out"]])]
    write(out, "GPU", "\n\n".join(parts), results, quiet=quiet)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3-8b", "smollm2-135m"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768], help="prompt lengths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--select-tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5, help="paired prefills of each kind, one at least")
    parser.add_argument("--steps", type=int, default=20, help="new tokens of each kind")
    parser.add_argument("--seconds", type=float, default=600, help="begin no case after so many")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cudnn", action="store_true", help="leave cuDNN's attention in for new tokens")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too: whether it runs at all")
    parser.add_argument("--out", type=Path, help="where to write the table, without ending")
    args = parser.parse_args()
    if args.quick:
        args.models, args.tokens, args.batches, args.select_tokens = ["tiny"], [256, 512], [1, 2], 128
        args.pairs, args.steps = 2, 3
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif not torch.cuda.is_available():
        parser.exit(0, "no GPU to measure on; --quick runs tiny shapes on the CPU\n")
    return args


if __name__ == "__main__":
    main()
