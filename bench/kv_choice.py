"""Which cache entries the layers before the final selection should keep, and whether what they drop should leave a mean
entry: `python bench/kv_choice.py [--model FILE] [--samples N]`.

Each prompt is pruned by the default rule. Then the caches of all layers that hold more than `--kv-budget` entries are
cut down in several ways, and all ways read the unpatched model's own answer. Figures are the divergence of their
next-token distributions from those with these caches whole, and from the unpatched model's, in nats a token:

- `own`: a layer's own scores, by KV head, as `kv_budget` does it; `tokens`: the highest of its heads, for all heads
- `selected`: the tokens of the final selection first, then by `own`
- `+N`: what is dropped leaves N mean entries a head, each of neighbours: means of keys and values, and the logarithm of
  their number added to the logit
- `recent`: the last entries, and the first four
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from setting import setting
from torch import Tensor

import flexasl
from flexasl.integrations.transformers.cache import PrunedCache
from flexasl.ops import kept_indices
from flexasl.tools.evaluation.tables import table
from flexasl.tools.evaluation.tasks import build
from flexasl.tools.loading import load_model
from flexasl.tools.text import encode

TASKS = ("niah_multikey_1", "niah_multivalue", "by_meaning", "uniform")
CHOICES = ("whole", "own", "own +1", "own +16", "tokens", "selected", "selected +1", "selected +16", "recent")
WINDOW, FIRST = 32, 4
WHAT = "Nats a token from whole caches, and from the unpatched model."


class Means(NamedTuple):
    """What the dropped entries of a layer left: keys and values [G, C, D], and what is added to logits [G, C]."""

    keys: Tensor
    values: Tensor
    counts: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub id; default: the embedded one")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--select-tokens", type=int, default=256)
    parser.add_argument("--kv-budget", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4, help="of each task")
    parser.add_argument("--seed", type=int, default=74)
    parser.add_argument("--out", type=Path, help="where to write the table, without ending")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    found: dict[str, list[list[list[float]]]] = {}
    with torch.inference_mode():
        for index in range(args.samples):
            for task in TASKS:
                sample = build(task, tokenizer, args.tokens, args.seed, index)
                one = compare(model, tokenizer, encode(tokenizer, sample.prompt), args.select_tokens, args.kv_budget)
                if one is not None:
                    found.setdefault(task, []).append(one)
                    print(task, index, one, flush=True)
    means = {task: torch.tensor(one).mean(0) for task, one in found.items()}
    rows = [
        [name, *(f"{made[place, 0]:.3f}, {made[place, 1]:.3f}" for made in means.values())]
        for place, name in enumerate(CHOICES)
    ]
    heads = ["kept", *(f"`{task}`, {len(one)} prompts" for task, one in found.items())]
    told = setting()
    about = "".join(f"- {name}: {value}\n" for name, value in told.items())
    text = f"# Which cache entries to keep\n\n{about}\n{WHAT}\n\n{table(heads, rows)}\n"
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        made = {"setting": told, "choices": CHOICES, "nats": {task: one.tolist() for task, one in means.items()}}
        args.out.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def compare(model: Any, tokenizer: Any, ids: list[int], budget: int, most: int) -> list[list[float]] | None:
    """By choice, the divergence from whole caches and from the unpatched model; None for an answer of one token."""
    prompt = torch.tensor([ids])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    answer = answer[:, len(ids) :]
    if answer.shape[1] < 2:
        return None
    unpatched = model(torch.cat([prompt, answer[:, :-1]], 1)).logits[:, len(ids) :].float().log_softmax(-1)
    scores: dict[int, Tensor] = {}
    config = flexasl.ASLConfig(select_tokens=budget)
    with flexasl.patch(model, config, tokenizer=tokenizer, profile=False) as patch:
        patch.observer = lambda layer, made: scores.update({layer: made[0].float()})
        cache = model(prompt).past_key_values
        kept = torch.tensor(patch.report.rows[0].kept_positions)
    caches, means = zip(*(cut(cache, scores, kept, len(ids), most, name) for name in CHOICES))
    stacked = PrunedCache.stacked(caches, slack=answer.shape[1])
    fed = answer[:, :-1].expand(len(CHOICES), -1)
    mask = torch.ones(len(CHOICES), len(ids) + fed.shape[1], dtype=torch.long)
    with flexasl.patch(model, policy="full") as patch, with_means(patch.attention, means):
        made = model(fed, attention_mask=mask, past_key_values=stacked).logits.float().log_softmax(-1)
    return [[divergence(base, one).item() for base in (made[0], unpatched[0])] for one in made]


def divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """Of log-probabilities [M, V]."""
    return (wanted.exp() * (wanted - got)).sum(-1).mean()


def cut(
    cache: Any, scores: dict[int, Tensor], selected: Tensor, tokens: int, most: int, choice: str
) -> tuple[Any, dict[int, Means]]:
    """A copy of the cache with at most so many entries in each layer, and the mean entries by layer."""
    made, means = PrunedCache.stacked([cache]), {}
    name, _, number = choice.partition(" +")
    for index, layer in enumerate(made.layers):
        keys, values, positions = layer.keys, layer.values, layer.positions[0]
        groups, entries = keys.shape[1:3]
        if entries <= most or choice == "whole":
            continue
        own = torch.zeros(groups, entries)
        own[:, : scores[index].shape[1]] = scores[index]
        if name == "tokens":
            own = own.amax(0, keepdim=True).expand(groups, -1)
        elif name == "selected":
            own = own + 1000.0 * torch.isin(positions, selected)
        elif name == "recent":
            own = positions.float().masked_fill(positions < FIRST, math.inf).expand(groups, -1)
        own = own.masked_fill(positions >= tokens - WINDOW, math.inf)
        keep = torch.zeros(groups, entries, dtype=torch.bool).scatter(1, own.topk(most, -1).indices, True)
        if number:
            means[index] = left_behind(keys[0], values[0], ~keep, int(number))
        layer.keep(kept_indices(keep[None], most)[0], None)
    return made, means


def left_behind(keys: Tensor, values: Tensor, gone: Tensor, count: int) -> Means:
    """Mean entries of those that are gone [G, N] bool, each of as many neighbours: keys, values [G, N, D]."""
    place = (gone.cumsum(-1) - 1).clamp(min=0) * count // gone.sum(-1, keepdim=True)
    parts = torch.nn.functional.one_hot(place, count).float() * gone[..., None]
    sizes = parts.sum(1)
    return Means(*((parts.transpose(1, 2) @ states) / sizes[..., None] for states in (keys, values)), sizes.log())


@contextmanager
def with_means(modules: Any, means: Any) -> Iterator[None]:
    """Attention of a batch, of which each row has mean entries of its own in some layers."""

    def attend(layer: int, spec: Any, query: Tensor, key: Tensor, value: Tensor, visible: Any, **_: Any) -> Tensor:
        batch, heads, queries, dim = query.shape
        groups = key.shape[1]
        scaled = query.reshape(batch, groups, -1, queries, dim) * spec.factor(dim)
        logits = scaled @ key[:, :, None].transpose(-1, -2)
        logits = logits.masked_fill(~visible.mask(spec)[:, :, None], -math.inf)
        width = max([len(of_row[layer].counts[0]) for of_row in means if layer in of_row] or [1])
        added, keys, values = torch.full((batch, groups, width), -math.inf), *torch.zeros(2, batch, groups, width, dim)
        for row, of_row in enumerate(means):
            if layer in of_row:
                count = of_row[layer].counts.shape[1]
                keys[row, :, :count], values[row, :, :count], added[row, :, :count] = of_row[layer]
        extra = scaled @ keys[:, :, None].transpose(-1, -2) + added[:, :, None, None]
        weights = torch.cat([logits, extra], -1).softmax(-1)
        mixed = weights @ torch.cat([value, values], 2)[:, :, None]
        return mixed.reshape(batch, heads, queries, -1)

    try:
        for layer, module in enumerate(modules):
            module.forward = lambda *args, layer=layer, spec=module.spec, sinks=None, **kw: attend(
                layer, spec, *args, **kw
            )
        yield
    finally:
        for module in modules:
            del module.forward


if __name__ == "__main__":
    main()
