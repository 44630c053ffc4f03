"""What ranks a prompt's tokens: on how many prompts the best ones hold the answer's, with each idea alone and left out.

Every prompt is read with its full cache, once for each way to score; questions have format rules behind them in half of
the prompts, and no answer is begun.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from setting import arguments, setting, table, write
from torch import Tensor

import flexasl
from flexasl import ASLConfig
from flexasl.asking import Asked
from flexasl.config import LOOKUP_SCORES, PUBLISHED_SCORES
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.ops import over_heads
from flexasl.policies.base import SCORES
from flexasl.policies.full import Full
from flexasl.question import find_question
from flexasl.selectors.base import combined
from flexasl.tools.calibration.recording import Prompt, locate
from flexasl.tools.calibration.tables import holds_answers
from flexasl.tools.evaluation.memo import Memo, costly_modules
from flexasl.tools.evaluation.samples import Wording
from flexasl.tools.evaluation.tasks import build
from flexasl.tools.loading import load_model

KINDS = {
    "literal": (
        *("niah_single_2", "niah_single_3", "niah_multikey_1"),
        *("niah_multiquery", "niah_multivalue", "kv_retrieval"),
    ),
    "by meaning": ("by_meaning",),
    "uniform": ("uniform",),
}
PAPER = {name: PUBLISHED_SCORES[name] for name in ("kernel_size", "pooling", "score_power", "contrast")}
OURS = {name: LOOKUP_SCORES[name] for name in PAPER}
PHRASE = {"kernel_size": 17, "pooling": "phrase"}
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "ASL, FastKV: last 32 tokens, sum, average of 7": (False, PAPER),
    "only the question added": (True, PAPER),
    "only the highest weight added": (False, PAPER | {"score_power": "max"}),
    "only the phrase added": (False, PAPER | PHRASE),
    "**ours**: question, highest weight, contrast, phrase": (True, OURS),
    "without the question": (False, OURS),
    "without the highest weight: sum": (True, OURS | {"score_power": 1}),
    "without the highest weight: squares": (True, OURS | {"score_power": 2}),
    "without contrast": (True, OURS | {"contrast": False}),
    "without the phrase: maximum of 25": (True, OURS | {"kernel_size": 25, "pooling": "maxpool"}),
    "without the phrase: average of 7": (True, OURS | {"kernel_size": 7, "pooling": "avgpool"}),
}
"""Whether the question ranks, and how."""


class _Scored(Full):
    """Nothing pruned, but every layer scored."""

    takes = Full.takes | SCORES


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=[2048], select_tokens=256)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: the embedded one")
    parser.add_argument("--samples", type=int, default=2, help="of each literal task; three times as many of others")
    parser.add_argument("--seed", type=int, default=50)
    args = parser.parse_args()
    setting()
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    length, layers = args.tokens[0], len(decoder_layers(model))
    held: dict[tuple[str, str, str], list[list[bool]]] = {}
    looked_up: dict[tuple[str, str], list[list[float]]] = {}
    for kind, tasks in KINDS.items():
        for index in range(args.samples * (1 if kind == "literal" else 3)):
            for task in tasks:
                prompt = made(task, tokenizer, length, args.seed, index)
                with Memo(len(prompt.ids)).over(costly_modules(decoder_layers(model))):
                    for way, (asks, settings) in WAYS.items():
                        scores = scored(model, tokenizer if asks else None, prompt, settings)
                        keeps = keeper(tokenizer if asks else None, prompt, args.select_tokens)
                        if asks:
                            looked_up.setdefault((kind, way), []).append(far(tokenizer, prompt, scores))
                        for on in ("last", "recent"):
                            found = holding(prompt, scores, keeps, on, layers // 6)
                            held.setdefault((kind, way, on), []).append(found)
                print(f"{task} {index}", flush=True)
    names = {"last": "one layer", "recent": "best so far, fading"}
    shown = [layer for layer in range(layers) if layer >= layers // 6][: layers * 2 // 3]
    rows = [
        [kind, way, names[on], *(f"{fmean(found[layer] for found in seen):.2f}" for layer in shown)]
        for (kind, way, on), seen in held.items()
    ]
    body = (
        f"{args.model or 'SmolLM2-135M-Instruct'}; prompts of {length:,} tokens: {args.samples} of each of "
        f"{', '.join(KINDS['literal'])}, {3 * args.samples} of by_meaning and of uniform (seed {args.seed}). Share of "
        f"prompts of which the {args.select_tokens} best tokens at a layer hold 90 % of those of every answer.\n\n"
        + table(["prompts", "ranked by", "layers", *map(str, shown)], rows)
    )
    peaks = [
        [kind, way, *(f"{fmean(found[layer] for found in seen):.2f}" for layer in shown)]
        for (kind, way), seen in looked_up.items()
        if way.startswith("**ours")
    ]
    body += "\n\nHighest score of a far token, mean over prompts:\n\n"
    body += table(["prompts", "ranked by", *map(str, shown)], peaks)
    data = [{"prompts": kind, "way": way, "select_on": on, "held": seen} for (kind, way, on), seen in held.items()]
    write(args.out, "Ranking", body, {"held": data})


def made(task: str, tokenizer: Any, length: int, seed: int, index: int) -> Prompt:
    """A prompt without the start of its answer, every other one with rules behind the question."""
    wording = Wording(after_question="rules" if index % 2 else None, answer_prefix=False)
    return locate(tokenizer, build(task, tokenizer, length, seed, index, wording=wording))


def scored(model: Any, tokenizer: Any, prompt: Prompt, settings: dict[str, Any]) -> list[Tensor]:
    """Token scores [P] at each layer."""
    config, found = ASLConfig(**settings), []
    with flexasl.patch(model, config, policy=_Scored(), tokenizer=tokenizer) as patch, torch.no_grad():
        power = math.inf if config.score_power == "max" else float(config.score_power or 1)
        patch.observer = lambda layer, seen: found.append(over_heads(seen, 1, power)[0])
        model(input_ids=torch.tensor([prompt.ids], device=model.device), use_cache=False, logits_to_keep=1)
    return found


def keeper(tokenizer: Any, prompt: Prompt, budget: int, window: int = 32) -> Callable[[Tensor], set[int]]:
    """From token scores to the tokens that are kept."""
    tokens, always = len(prompt.ids), []
    if tokenizer is not None:
        question = [at for span in find_question(tokenizer, prompt.ids) for at in range(*span)]
        always = Asked(question, tokens, budget, window, contrast=True).kept(budget)

    def kept(scores: Tensor) -> set[int]:
        scores = scores.index_fill(0, torch.tensor(always, dtype=torch.int64), math.inf)
        return {*scores.topk(budget - window).indices.tolist(), *range(tokens - window, tokens)}

    return kept


def far(tokenizer: Any, prompt: Prompt, scores: list[Tensor], near: int = 77) -> list[float]:
    """By layer, the highest score of a token that is far from the question and from the start."""
    tokens = len(prompt.ids)
    first = next((at for at, _ in find_question(tokenizer, prompt.ids) if at > tokens // 2), tokens - 32)
    return [float(one[near : first - near].max()) for one in scores]


def holding(
    prompt: Prompt, scores: list[Tensor], kept: Callable[[Tensor], set[int]], on: str, since: int
) -> list[bool]:
    """By layer, whether what is kept there holds the answers, by that layer's scores or those from a layer on."""
    best, found = None, []
    for layer, one in enumerate(scores):
        best = combined(best if layer > since else None, one, on)
        found.append(holds_answers(prompt, sorted(kept(best))))
    return found


if __name__ == "__main__":
    main()
