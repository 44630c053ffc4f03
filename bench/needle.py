"""How often a pruned model still finds one sentence in a long text, and at which prefill cost, for several settings.

Cost is counted: the tokens that every layer runs on, over those of a full prefill. It leaves out attention's own
saving; `bench/prefill.py` measures time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.progress import track
from setting import arguments, setting, table, write

from flexasl import ASLConfig, embedded
from flexasl.policies import FixedLayer, Policy
from flexasl.run import answer
from flexasl.text import magic_number, needle_prompt, prompt_ids

ANSWER_TOKENS = 12


def main() -> None:
    args = _arguments()
    setting()
    model, tokenizer = embedded.load(getattr(torch, args.dtype), args.device)
    settings = _settings(args.select_tokens)
    results: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for tokens in args.tokens:
        results[tokens] = {name: [] for name in settings}
        for seed in track(range(args.prompts), f"{tokens} tokens", disable=None):
            fact = magic_number(seed)
            depth = (seed + 0.5) / args.prompts
            message = needle_prompt(
                tokenizer, tokens, depth, fact.needle, fact.question, seed, answer_prefix=fact.answer_prefix
            )
            ids = prompt_ids(tokenizer, message, fact.answer_prefix)
            for name, (config, policy) in settings.items():
                said = answer(model, tokenizer, ids, max_new_tokens=ANSWER_TOKENS, config=config, policy=policy)
                results[tokens][name].append(_result(said, fact.answer))
    rows = [[tokens, name, *_summary(found)] for tokens, by_name in results.items() for name, found in by_name.items()]
    heads = ["tokens", "setting", "found", "layers chosen", "cost"]
    write(args.out, f"Needles at a budget of {args.select_tokens} tokens", table(heads, rows), {"results": results})


def _settings(budget: int) -> dict[str, tuple[ASLConfig | None, str | Policy | None]]:
    default = ASLConfig(select_tokens=budget)
    return {
        "unpatched": (None, None),
        "default": (default, "asl"),
        "tau 0.3": (default.replace(tau=0.3), "asl"),
        "tau 0.5": (default.replace(tau=0.5), "asl"),
        "select_on last": (default.replace(select_on="last"), "asl"),
        "paper": (ASLConfig.paper(select_tokens=budget), "asl"),
        "fixed layer 14 (the middle)": (default, "fixed_layer"),
        "fixed layer 21 (in hindsight)": (default, FixedLayer(21)),
    }


def _result(said: Any, fact: str) -> dict[str, Any]:
    layer, cost = None, 1.0
    if said.report is not None:
        row, layers = said.report.rows[0], said.report.num_layers
        layer = row.selected_layer
        if layer is not None:
            cost = (layer + 1 + (layers - 1 - layer) * row.kept_tokens / row.prompt_tokens) / layers
    return {"found": fact in said.text, "layer": layer, "cost": cost}


def _summary(found: list[dict[str, Any]]) -> list[str]:
    layers = sorted(one["layer"] for one in found if one["layer"] is not None)
    chosen = ", ".join(f"{layer} × {layers.count(layer)}" for layer in dict.fromkeys(layers)) or "none"
    cost = sum(one["cost"] for one in found) / len(found)
    return [f"{sum(one['found'] for one in found)}/{len(found)}", chosen, f"{cost:.2f}"]


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
