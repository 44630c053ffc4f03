"""Peak memory of one prefill, unpatched and pruned, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from setting import setting, table, write
from transformers import LlamaConfig, LlamaForCausalLM

import flexasl
from flexasl import embedded

MIB = 2**20
LEAN = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment: one allocation arena, which gives large blocks back at once, so that resident memory is live memory."""
CASES: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "select_tokens=512": {"select_tokens": 512},
    "select_tokens=512, kv_budget=512": {"select_tokens": 512, "kv_budget": 512},
}


def main() -> None:
    args = _arguments()
    setting()
    if args.child:
        print(json.dumps(_measure(args)))
        return
    found = {}
    for case in CASES:
        child = [sys.executable, __file__, "--child", case, "--tokens", str(args.tokens), "--model", args.model]
        lean = os.environ | LEAN
        found[case] = json.loads(subprocess.run(child, capture_output=True, text=True, check=True, env=lean).stdout)
    full = found["unpatched"]
    rows = [
        [case, f"{one['prefill'] / MIB:.0f}", f"{one['prefill'] / full['prefill']:.2f}", f"{one['cache'] / MIB:.0f}"]
        + [f"{one['cache'] / full['cache']:.2f}"]
        for case, one in found.items()
    ]
    heads = ["case", "peak above the model, MiB", "share", "KV cache after, MiB", "share"]
    title = f"Peak memory of a prefill of {args.tokens} tokens, {args.model} model, float32"
    write(args.out, title, table(heads, rows), {"cases": found})


@torch.no_grad()
def _measure(args: argparse.Namespace) -> dict[str, int]:
    """Bytes by which resident memory peaks above its level before the prefill, and bytes of the cache after it."""
    model = embedded.load()[0] if args.model == "embedded" else _random_model()
    ids = torch.randint(3, 100, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    model(ids[:, :256])
    before = reset_peak()
    settings = CASES[args.child]
    if settings is None:
        cache = model(ids, logits_to_keep=1).past_key_values
    else:
        with flexasl.patch(model, flexasl.ASLConfig(**settings)):
            cache = model(ids, logits_to_keep=1).past_key_values
    held = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    return {"prefill": peak() - before, "cache": held}


def _random_model() -> LlamaForCausalLM:
    """A small Llama whose cache outweighs what a layer needs in passing."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=16, max_position_embeddings=16384, **shape)
    return LlamaForCausalLM(config).eval()


def reset_peak() -> int:
    """Bytes resident now, from where the peak is counted anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--model", choices=["embedded", "random"], default="embedded")
    parser.add_argument("--out", type=Path, help="where to write the table, without ending")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
