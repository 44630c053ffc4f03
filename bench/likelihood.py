"""Summaries and code: how far a pruned prompt moves what the model says next, where no answer is right or wrong.

Every prompt is read unpatched, and answered greedily. Then the prompt is read under each method, and the same answer is
read on: figures are the divergence of next-token distributions from the unpatched model's, in nats a token of the
answer, and how much less likely the answer is, likewise.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import torch
from setting import arguments, setting, table, write
from torch import Tensor

import flexasl
from flexasl import evaluation
from flexasl.config import LOOKUP_SCORES
from flexasl.tools.evaluation.costs import layer_costs, prefill_share
from flexasl.tools.evaluation.plans import Setting
from flexasl.tools.loading import load_model
from flexasl.tools.text import bare_ids, encode, prose, render

TASK = "Summarise the text above in a few sentences."
MODULES = ("argparse", "ast", "csv", "decimal", "difflib", "email.message", "fractions", "heapq", "imaplib", "inspect")
RANKING = "kernel_size=17,pooling=phrase,score_power=max,contrast=true"
METHODS = {
    "asl": "FlexASL",
    "fixed_layer": "FastKV, its paper's settings",
    f"fixed_layer:{RANKING}": "FastKV, our ranking",
    "snapkv": "SnapKV, its paper's settings",
    f"snapkv:{RANKING}": "SnapKV, our ranking",
    "streaming": "StreamingLLM",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=[2048], select_tokens=256)
    parser.add_argument("--model", help="folder, GGUF file or hub id; default: the embedded one")
    parser.add_argument("--samples", type=int, default=4, help="of summaries, and of code")
    parser.add_argument("--answer-tokens", type=int, default=64)
    args = parser.parse_args()
    setting()
    assert RANKING.startswith(f"kernel_size={LOOKUP_SCORES['kernel_size']},pooling={LOOKUP_SCORES['pooling']},")
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    named = {
        name: evaluation.plan(policies=[spec], budgets=[args.select_tokens], rank_by=rank, tasks=["needle"]).settings[1]
        for spec, name in METHODS.items()
        for rank in ["policy" if spec in ("fixed_layer", "snapkv", "streaming") else "question"]
    }
    costs, found = layer_costs(model), {}
    with torch.inference_mode():
        for index in range(args.samples):
            for kind, ids in prompts(tokenizer, args.tokens[0], index).items():
                for name, figures in compare(model, tokenizer, ids, named, costs, args.answer_tokens).items():
                    found.setdefault((kind, name), []).append(figures)
                    print(kind, index, name, *(f"{one:.3f}" for one in figures), flush=True)
    rows = [
        [kind, name, *(f"{fmean(one):.3f} ± {stdev(one):.3f}" for one in list(zip(*seen))[:2]), f"{_cost(seen):.2f}"]
        for (kind, name), seen in sorted(found.items(), key=lambda one: one[0][0])
    ]
    body = (
        f"{args.model or 'SmolLM2-135M-Instruct'}; {args.samples} texts of Python's language reference to summarise "
        f"and {args.samples} modules of its library to continue, {args.tokens[0]:,} tokens each, "
        f"{args.select_tokens} selected; answers of {args.answer_tokens} tokens. Means over prompts ± standard "
        "deviation, nats a token.\n\n"
        + table(["prompts", "method", "divergence", "likelihood lost", "cost of the prefill"], rows)
    )
    data = [{"prompts": kind, "method": name, "figures": seen} for (kind, name), seen in found.items()]
    write(args.out, "What is said next", body, {"found": data})


def _cost(seen: list[tuple[float, float, float]]) -> float:
    return fmean(cost for _, _, cost in seen)


def prompts(tokenizer: Any, tokens: int, index: int) -> dict[str, list[int]]:
    """A text to summarise, and a module to continue, of at most so many tokens."""
    around = len(encode(tokenizer, render(tokenizer, f"\n\n{TASK}")))
    text = prose(tokens - around - 4, tokenizer, seed=index + 1)
    module: ModuleType = __import__(MODULES[index % len(MODULES)], fromlist=["_"])
    code = bare_ids(tokenizer, Path(inspect.getsourcefile(module) or "").read_text(encoding="utf-8"))
    return {"summaries": encode(tokenizer, render(tokenizer, f"{text}\n\n{TASK}")), "code": code[:tokens]}


def compare(
    model: Any, tokenizer: Any, ids: list[int], named: dict[str, Setting], costs: Any, answer_tokens: int
) -> dict[str, tuple[float, float, float]]:
    """By method, divergence, likelihood lost and counted cost."""
    prompt = torch.tensor([ids], device=model.device)
    whole = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    answer = model.generate(prompt, max_new_tokens=answer_tokens, min_new_tokens=8, **whole)[:, len(ids) :]
    wanted = read_on(model, prompt, answer)
    said = wanted.gather(-1, answer[0, :, None]).mean()
    made = {}
    for name, one in named.items():
        asking = {"tokenizer": tokenizer} if one.by_question else {}
        with flexasl.patch(model, one.config, policy=one.policy, profile=False, **asking) as patch:
            got = read_on(model, prompt, answer)
            cost = prefill_share(costs, patch.report)
        apart = (wanted.exp() * (wanted - got)).sum(-1).mean()
        made[name] = (apart.item(), (said - got.gather(-1, answer[0, :, None]).mean()).item(), cost)
    return made


def read_on(model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """Log-probabilities [M, V] float32 of each token of the answer [1, M], which is read behind the prompt."""
    out = model(prompt, use_cache=True, logits_to_keep=1)
    mask = torch.ones(1, prompt.shape[1] + answer.shape[1] - 1, dtype=torch.int64, device=prompt.device)
    rest = model(answer[:, :-1], past_key_values=out.past_key_values, attention_mask=mask)
    return torch.cat([out.logits[0, -1:], rest.logits[0]]).float().log_softmax(-1)


if __name__ == "__main__":
    main()
