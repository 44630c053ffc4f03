"""Which pooling keeps answers: on how many prompts the selection holds the answer's tokens, by layer and by the rule.

Every prompt is read with its full cache, once for each pooling; what is decided is replayed on the scores of that run.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from setting import arguments, setting, table, write

import flexasl
from flexasl import embedded
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.tools.calibration.recording import locate, record
from flexasl.tools.calibration.tables import Table
from flexasl.tools.evaluation.costs import layer_costs
from flexasl.tools.evaluation.memo import Memo, costly_modules
from flexasl.tools.evaluation.tasks import build

TASKS = ["needle", "passkey", "number_string", "niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery"]
POOLINGS = [("avgpool", 7), ("avgpool", 15), ("avgpool", 31), ("maxpool", 15), ("maxpool", 25), ("maxpool", 31)]
LAYERS = range(12, 23)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=[2048], select_tokens=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    setting()
    model, tokenizer = embedded.load(getattr(torch, args.dtype), args.device)
    costs = layer_costs(model)
    asked = [(task, tokens, index) for index in range(args.samples) for tokens in args.tokens for task in TASKS]
    kept: dict[str, dict[int, list[bool]]] = {}
    ruled: dict[str, list[Any]] = {}
    for task, tokens, index in asked:
        prompt = locate(tokenizer, build(task, tokenizer, tokens, args.seed, index))
        with Memo(len(prompt.ids)).over(costly_modules(decoder_layers(model))):
            for pooling, width in POOLINGS:
                config = flexasl.ASLConfig(select_tokens=args.select_tokens, kernel_size=width, pooling=pooling)
                rule = config.resolve(len(costs))
                (recording,), ranking_layers = record(model, [prompt], rule, tokenizer, lambda done: None)
                known = Table(recording, costs, ranking_layers)
                for select_on in ("last", "recent"):
                    name = f"{pooling} {width}, {'one layer' if select_on == 'last' else 'best of all'}"
                    for layer in LAYERS:
                        at = rule.replace(stages=(), min_layer=layer, max_layer=layer, select_on=select_on)
                        kept.setdefault(name, {}).setdefault(layer, []).append(known.outcome(at).held)
                ruled.setdefault(f"{pooling} {width}", []).append((task, known.outcome(rule)))
    rows = [[name, *(f"{fmean(by[layer]):.2f}" for layer in LAYERS)] for name, by in kept.items()]
    chosen = [
        [name, f"{fmean(o.held for _, o in seen):.2f}", f"{fmean(o.cost for _, o in seen):.3f}", *_layers(seen)]
        for name, seen in ruled.items()
    ]
    body = "\n\n".join(
        [
            f"{len(asked)} prompts, {args.samples} of each of {', '.join(TASKS)}, of {args.tokens[0]:,} tokens; "
            f"select_tokens={args.select_tokens}. Share of prompts of which the selection holds 90 % of the tokens of "
            "every answer.",
            "Selection at a fixed layer, by what is pooled over how many tokens, on one layer's scores or each token's "
            "best of all so far:",
            table(["", *map(str, LAYERS)], rows),
            "The default rule with each pooling: share kept, cost of the prefill, and the mean layer by task:",
            table(["pooling", "kept", "cost", *TASKS], chosen),
        ]
    )
    write(args.out, "Pooling", body, {"kept": kept, "rule": ruled})


def _layers(seen: list[Any]) -> list[str]:
    """The mean selection layer of each task."""
    return [f"{fmean(outcome.layer for task, outcome in seen if task == name):.1f}" for name in TASKS]


if __name__ == "__main__":
    main()
