"""A picture of what each policy keeps of one prompt: which tokens every layer's cache holds after prefill."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import flexasl
from flexasl import embedded
from flexasl.policies import POLICIES
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids

SHOWN = [name for name in POLICIES if name not in ("full", "fastkv")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/policies.png"))
    args = parser.parse_args()
    model, tokenizer = embedded.load()
    fact = magic_number(1)
    needle, question, prefix = fact.needle, fact.question, fact.answer_prefix
    message = needle_prompt(tokenizer, args.tokens, 0.4, needle, question, 1, answer_prefix=prefix)
    ids = prompt_ids(tokenizer, message, prefix)
    end = next(end for end in range(len(ids)) if needle in tokenizer.decode(ids[:end]))
    start = end - len(tokenizer(needle)["input_ids"])
    figure = Figure(figsize=(11, 9), layout="constrained")
    config = flexasl.ASLConfig(select_tokens=args.budget)
    axes = figure.subplots((len(SHOWN) + 1) // 2, 2, sharex=True, sharey=True).flatten()
    for axis, name in zip(axes, SHOWN, strict=False):
        asking = {"tokenizer": tokenizer, "question": question} if name.startswith("asl") else {}
        held, report = kept(model, torch.tensor([ids]), config, name, **asking)
        axis.imshow(held, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.axvspan(start, end, color="#dd6b20", alpha=0.35, linewidth=0)
        axis.set_title(f"{name}: {report.kv_share:.0%} of the full cache", fontsize=10, loc="left")
        axis.set_ylabel("layer")
    for axis in axes[len(SHOWN) :]:
        axis.axis("off")
    for axis in axes[-2:]:
        axis.set_xlabel("prompt position (tokens)")
    figure.suptitle(
        f"Cache entries after {len(ids):,} tokens, budget {args.budget}; shade: share of KV heads; the fact"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


@torch.no_grad()
def kept(
    model: Any, ids: torch.Tensor, config: flexasl.ASLConfig, policy: str, **asking: Any
) -> tuple[torch.Tensor, Any]:
    """Share of KV heads that hold a token, [layers, tokens], and the report."""
    with flexasl.patch(model, config, policy, **asking) as patch:
        layers = model(ids, use_cache=True, logits_to_keep=1).past_key_values.layers
    held = torch.zeros(len(layers), ids.shape[1])
    for row, layer in zip(held, layers, strict=True):
        heads = layer.positions[0].expand(layer.keys.shape[1], -1)
        row.index_add_(0, heads.flatten(), torch.full((heads.numel(),), 1 / len(heads)))
    return held, patch.report


if __name__ == "__main__":
    main()
