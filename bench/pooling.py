"""Which pool keeps answers: on how many prompts the default rule holds the sentences that answer, by task.

Every prompt is read once with its full cache and its scores are recorded as they are; each pool, and what is decided on
what it makes of them, is replayed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

from setting import arguments, setting, table, write

import flexasl
from flexasl.config import LOOKUP_SCORES
from flexasl.ops.scoring import pool
from flexasl.tools.calibration.calibrating import WORDINGS
from flexasl.tools.calibration.recording import Recording, locate, record
from flexasl.tools.calibration.tables import Table
from flexasl.tools.evaluation.costs import LayerCost, layer_costs
from flexasl.tools.evaluation.tasks import build
from flexasl.tools.loading import load_model

TASKS = ["niah_single_2", "niah_multikey_1", "niah_single_3", "kv_retrieval", "niah_multivalue", "niah_multiquery"]
TASKS += ["by_meaning", "uniform"]
POOLS = [(width, kind) for kind in ("maxpool", "phrase") for width in (13, 17, 21, 25, 33, 49)]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=[2048], select_tokens=256)
    parser.add_argument("--model", type=Path, help="folder or GGUF file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=3, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    setting()
    model, tokenizer = load_model(args.model)
    costs, scored = layer_costs(model), flexasl.ASLConfig(kernel_size=1).scored(LOOKUP_SCORES)
    recordings: list[Recording] = []
    layers: list[int] | None = None
    for place, task in enumerate(TASKS):
        for index in range(args.samples):
            wording = WORDINGS[(place + index) % 2]
            sample = build(task, tokenizer, args.tokens[0], args.seed, index, None, wording)
            found, layers = record(
                model, [locate(tokenizer, sample, sentences=True)], scored, tokenizer, lambda _: None
            )
            recordings += found
    made = {pooled: outcomes(recordings, costs, layers, args.select_tokens, *pooled) for pooled in POOLS}
    rows = []
    for (width, kind), seen in made.items():
        held = [fmean(one.held for task, one in seen if task == name) for name in TASKS]
        figures = [*held, fmean(held), fmean(one.cost for _, one in seen)]
        rows.append([f"{width}, `{kind}`", *(f"{figure:.2f}" for figure in figures[:-1]), f"{figures[-1]:.3f}"])
    name = "SmolLM2-135M-Instruct" if args.model is None else args.model.name
    body = (
        f"{name}: {len(recordings)} prompts, {args.samples} of each task, of {args.tokens[0]:,} tokens, half of them "
        f"with rules after the question; seed {args.seed}, select_tokens={args.select_tokens}. Share of prompts of "
        "which the selection of the default rule holds nine tenths of the tokens of the sentences that answer, the "
        "mean over tasks, and the counted cost of the prefill.\n\n" + table(["pool", *TASKS, "mean", "cost"], rows)
    )
    write(args.out, "Pooling", body, {"outcomes": {f"{width} {kind}": seen for (width, kind), seen in made.items()}})


def outcomes(
    recordings: list[Recording],
    costs: list[LayerCost],
    layers: list[int] | None,
    budget: int,
    width: int,
    kind: Any,
) -> list[tuple[str, Any]]:
    """What the default rule with this pool makes of each prompt, with its task."""
    config = flexasl.ASLConfig(select_tokens=budget, kernel_size=width, pooling=kind).resolve(len(costs), layers)
    found = []
    for recording in recordings:
        pooled = dataclasses.replace(recording, scores=pool(recording.scores[None], width, kind)[0])
        found.append((recording.prompt.task, Table(pooled, costs, layers).outcome(config)))
    return found


if __name__ == "__main__":
    main()
