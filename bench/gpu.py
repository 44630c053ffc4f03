"""What a patched model takes on a GPU beside the unpatched one: prefill, new tokens, memory and waits of the host.

Models have the shapes of Llama 3.1 8B and Qwen2.5 7B and random weights, on which times do not depend; the layers that
select are given. Runs alternate, and shares are medians of pairs. The limit is what the floating-point operations of
the layers leave, and for a new token the time in which the GPU reads weights and cache once. A wait is an operation for
which the host stops until the device has caught up; where they happen is in the JSON. Scoring and decision are timed in
a run of their own.

Results are written after each round. The same command continues where it stopped, on the same card, versions and
commit, and no round begins after `--seconds`. `--tests` runs the tests of a GPU first. Without a GPU nothing is done.

New tokens run eagerly, compiled, and as a CUDA graph of the compiled step, which is replayed at one length. cuDNN's
attention is left out there, which torch prefers on some GPUs: it plans anew for every length, which takes 45 ms of an
unpatched token on an H100 with torch 2.11. `--cudnn` leaves it in.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_page import EARLY, LATE, write_page
from setting import setting
from timing import bandwidth, seconds
from transformers import AutoConfig, AutoModelForCausalLM

import flexasl
from flexasl.prefill import Prefill

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 999,
    },
}
TESTS = ["test_devices.py", "test_device_ops.py", "test_golden.py", "test_varlen.py", "test_waits.py"]
Results = dict[str, Any]


def main() -> None:
    args = _arguments()
    stop, results = time.monotonic() + args.seconds, _begun(args.out)
    if args.tests and not results.get("tests", {}).get("passed"):
        results["tests"] = _run_tests(0.5 * args.seconds)
        write_page(args.out, results, quiet=True)
    results["left_out"], held, model = [], "", None
    for case, kind, pairs in _parts(args):
        too_large = case | {"part": kind, "why": "out of memory"}
        if too_large in results["left_out"] or _is_done(results[kind], case, kind, pairs):
            continue
        if time.monotonic() > stop:
            results["left_out"].append(
                case
                | {"part": kind, "why": "no time was left for " + ("one round" if pairs == 1 else f"{pairs} rounds")}
            )
            continue
        if case["model"] != held:
            model = None  # before the next one is made
            _free(args.device)
            held = case["model"]
            model = _model(held, getattr(torch, args.dtype), args.device, max(args.tokens) + 1024)
            _prefill(model, _prompt(model, 1, min(args.tokens)))
        try:
            if kind == "prefill":
                _prefills(model, case, results, args, pairs, stop)
            else:
                _decodes(model, case, results, args, stop)
        except torch.OutOfMemoryError:
            results["left_out"].append(too_large)
        _free(args.device)
        write_page(args.out, results, quiet=True)
    write_page(args.out, results)
    sys.exit(0 if results.get("tests", {"passed": True})["passed"] else 1)


def _parts(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Cases in order, what to measure of each, and how many rounds: one of everything first, long prompts before
    short ones."""
    for pairs in dict.fromkeys((1, args.pairs)):
        for batch in args.batches:
            for name in args.models:
                for kind in ("prefill", "decode"):
                    for tokens in sorted(args.tokens, reverse=True):
                        yield {"model": name, "batch": batch, "tokens": tokens}, kind, pairs


def _begun(out: Path | None) -> Results:
    """What was measured before on this card, with these versions and this commit."""
    fresh: Results = {"prefill": [], "decode": []}
    path = None if out is None else out.with_suffix(".json")
    if path is None or not path.exists():
        return fresh
    held = json.loads(path.read_text())
    known, now = held.pop("setting"), setting()
    same = all(known.get(name) == now[name] for name in ("hardware", "versions", "commit"))
    return held if same and "left_out" in held else fresh


def _run_tests(limit: float) -> dict[str, Any]:
    tests = Path(__file__).parents[1] / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *(tests / name for name in TESTS)], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"the tests did not end within {limit:.0f} s"}
    said = done.stdout.strip().splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "said": said[-1] if said else done.stderr[-500:], "failed": failed}


def _is_done(rows: list[dict[str, Any]], case: dict[str, Any], kind: str, pairs: int) -> bool:
    own = [row for row in rows if case.items() <= row.items()]
    return bool(own) and (kind == "decode" or all(len(row["seconds"]) >= pairs for row in own))


# ---------------------------------------------------------------- prefill


def _prefills(
    model: Any, case: dict[str, Any], results: Results, args: argparse.Namespace, pairs: int, stop: float
) -> None:
    """Times of a prefill unpatched and with each choice of cuts, in rounds in which each has a turn."""
    ids, layers = _prompt(model, case["batch"], case["tokens"]), model.config.num_hidden_layers
    runs: dict[str, Any] = {"unpatched": None} | _cuts(layers, case["tokens"], args.select_tokens)
    found = {row["what"]: row for row in results["prefill"] if case.items() <= row.items()}
    for what, config in runs.items():
        if what not in found:
            with _patched(model, config) as patch:
                row = case | {"what": what, "seconds": []} | _peak_and_waits(model, ids)
                if patch is not None:
                    told = patch.report.rows[0]
                    row |= {"ran": told.layer_tokens, "limit": _limit(model.config, case["tokens"], told.layer_tokens)}
                    row["scoring"] = _share_of_scoring(model, ids)
            found[what] = row
            results["prefill"].append(row)
            write_page(args.out, results, quiet=True)
    while min(len(row["seconds"]) for row in found.values()) < pairs:
        turn = min(len(row["seconds"]) for row in found.values())
        if turn > 0 and time.monotonic() > stop:
            break
        for what, config in list(runs.items())[:: -1 if turn % 2 else 1]:
            with _patched(model, config):
                found[what]["seconds"] = found[what]["seconds"][:turn] + [seconds(lambda: _prefill(model, ids))]
        for row in found.values():
            both = zip(row["seconds"], found["unpatched"]["seconds"], strict=True)
            row["share"] = statistics.median(one / plain for one, plain in both)
        write_page(args.out, results, quiet=True)


def _cuts(layers: int, tokens: int, kept: int) -> dict[str, flexasl.ASLConfig]:
    """The settings of each choice of cuts, by how much of the depth comes before each."""

    def after(share: float) -> int:
        return max(1, round(share * layers)) - 1

    def config(loose: float | None, final: float, **settings: Any) -> flexasl.ASLConfig:
        at = after(final)
        stages = () if loose is None else flexasl.Stage(tokens=0.5, min_layer=after(loose), max_layer=after(loose))
        where = {"min_layer": at, "min_layer_unasked": at, "max_layer": at}
        return flexasl.ASLConfig(select_tokens=kept, stages=stages, if_never="select", **where, **settings)

    made = {"keep all": flexasl.ASLConfig(select_tokens=1.0)}
    if kept < tokens // 2:
        made |= {"½": config(None, 1 / 2), LATE: config(1 / 4, 1 / 2), EARLY: config(1 / 8, 1 / 3)}
        made[f"{EARLY}, kv_budget"] = config(1 / 8, 1 / 3, kv_budget=kept)
    return made


@contextlib.contextmanager
def _patched(model: Any, config: flexasl.ASLConfig | None, **how: Any) -> Iterator[Any]:
    if config is None:
        yield None
        return
    with flexasl.patch(model, config, profile=False, **how) as patch:
        yield patch


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> Any:
    """The cache of a prompt."""
    return model(ids, logits_to_keep=1).past_key_values


def _share_of_scoring(model: Any, ids: torch.Tensor) -> float:
    """Time of scoring, ranking, selection and dropping as a share of a prefill."""
    marks: list[tuple[Any, Any]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start, end = _mark(ids), None
            made = function(*args, **kwargs)
            end = _mark(ids)
            marks.append((start, end))
            return made

        return run

    plain = {name: getattr(Prefill, name) for name in ("observe", "advance")}
    for name, function in plain.items():
        setattr(Prefill, name, timed(function))
    try:
        start = _mark(ids)
        _prefill(model, ids)
        whole = start, _mark(ids)
    finally:
        for name, function in plain.items():
            setattr(Prefill, name, function)
    return sum(_between(*pair) for pair in marks) / _between(*whole)


def _mark(ids: torch.Tensor) -> Any:
    if not ids.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    torch.cuda.synchronize()
    return float(start.elapsed_time(end) / 1e3)


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
        run()
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


# ---------------------------------------------------------------- new tokens


def _decodes(model: Any, case: dict[str, Any], results: Results, args: argparse.Namespace, stop: float) -> None:
    """Times of a new token after the prompt, of which each row of the batch is a copy."""
    cuts = _cuts(model.config.num_hidden_layers, case["tokens"], args.select_tokens)
    chosen = {name: config for name, config in cuts.items() if name.startswith(EARLY)}
    ids, speed, found = _prompt(model, 1, case["tokens"]), bandwidth(), []
    results["bandwidth"] = speed
    torch.backends.cuda.enable_cudnn_sdp(args.cudnn)
    try:
        for what, config in ({"unpatched": None} | chosen).items():
            with _patched(model, config):
                cache = _prefill(model, ids)
            cache.batch_repeat_interleave(case["batch"])
            token = ids[:, :1].repeat(case["batch"], 1)
            limit = (_bytes(model.parameters()) + _bytes(_held(cache))) / speed
            steps = _steps(model, config, cache, token, args, stop)
            found += [case | {"what": what, "how": how, "limit": limit} | took for how, took in steps]
            del cache
        results["decode"] += found
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _steps(
    model: Any, config: Any, cache: Any, token: torch.Tensor, args: argparse.Namespace, stop: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """How new tokens run, and the seconds of each and the waits in one."""

    @torch.no_grad()
    def step() -> None:
        model(token, past_key_values=cache)

    def told(run: Callable[[], Any]) -> dict[str, Any]:
        for _ in range(3):
            run()
        times = [seconds(run) for _ in range(args.steps)]
        waits, places = _counted(run, token)
        return {"seconds": times, "waits": waits, "waits_at": places}

    with _patched(model, config):
        yield "eager", told(step)
    if config is None or not args.compile or time.monotonic() > stop:
        return
    with _patched(model, config, compile=True):
        yield "compiled", told(step)
        if token.is_cuda:
            yield "CUDA graph", told(_graph(step).replay)


def _graph(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _held(cache: Any) -> Iterator[torch.Tensor]:
    return (states for layer in cache.layers for states in (layer.keys, layer.values))


# ---------------------------------------------------------------- models, tables


def _model(name: str, dtype: torch.dtype, device: str, positions: int) -> Any:
    torch.manual_seed(0)
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(
        shape.pop("model_type"), **shape, max_position_embeddings=positions, eos_token_id=None, use_sliding_window=False
    )
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3.1-8b", "qwen2.5-7b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="prompt lengths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--select-tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=3, help="paired prefills of each kind, one at least")
    parser.add_argument("--steps", type=int, default=20, help="new tokens of each kind")
    parser.add_argument("--seconds", type=float, default=540, help="begin no round after so many, tests included")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cudnn", action="store_true", help="leave cuDNN's attention in for new tokens")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager new tokens alone")
    parser.add_argument("--tests", action="store_true", help="run the tests of a GPU first")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too: whether it runs at all")
    parser.add_argument("--out", type=Path, help="where to write the table, without ending, and where to continue from")
    args = parser.parse_args()
    if args.quick:
        args.models, args.tokens, args.batches, args.select_tokens = ["tiny"], [256, 512], [1, 2], 64
        args.pairs, args.steps = 2, 3
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif not torch.cuda.is_available():
        print("no GPU to measure on; --quick runs tiny shapes on the CPU")
        parser.exit()
    return args


if __name__ == "__main__":
    main()
