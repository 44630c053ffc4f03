"""Pictures of one pruned prompt for docs/concepts.md: what each layer runs on, the stages, and what caches keep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from kept import kept
from matplotlib.figure import Figure

import flexasl
from flexasl import embedded
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "flexasl", "font.family": "sans-serif", "font.size": 11}
SIZE = (5.4, 3.6)
"""In inches: small, so that letters stay legible on a narrow screen."""
FACT, QUESTION, TOKENS = "#dd6b20", "#2f855a", "#08306b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    model, tokenizer = embedded.load()
    fact = magic_number(1)
    words = (fact.needle, fact.question, 1)
    message = needle_prompt(tokenizer, args.tokens, 0.4, *words, answer_prefix=fact.answer_prefix)
    ids = prompt_ids(tokenizer, message, fact.answer_prefix)
    marks = [(FACT, *span(tokenizer, ids, fact.needle)), (QUESTION, *span(tokenizer, ids, fact.question))]
    asking: dict[str, Any] = {"tokenizer": tokenizer, "question": fact.question, "profile": False}
    config = flexasl.ASLConfig(select_tokens=args.budget)
    seen, report = kept(model, torch.tensor([ids]), config, "asl", **asking)
    trimmed = kept(model, torch.tensor([ids]), config.replace(kv_budget=args.budget), "asl", **asking)[1]
    for name, figure in (
        ("layers", picture_of_layers(seen, marks)),
        ("stages", picture_of_stages(report)),
        ("caches", picture_of_caches(report, trimmed)),
    ):
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})
    print(report, trimmed, sep="\n")


def span(tokenizer: Any, ids: list[int], text: str) -> tuple[int, int]:
    """Where a text stands among tokens."""
    end = next(end for end in range(len(ids)) if text in tokenizer.decode(ids[:end]))
    return end - len(tokenizer(text)["input_ids"]), end


def picture_of_layers(seen: torch.Tensor, marks: list[tuple[str, int, int]]) -> Figure:
    """Which tokens every layer runs on."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.imshow(seen, aspect="auto", cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
    for (color, start, end), name in zip(marks, ("the fact", "the question"), strict=True):
        axes.axvspan(start - 3, end + 3, color=color, alpha=0.7, linewidth=0, label=name)
    axes.set(xlabel="position in the prompt (tokens)", ylabel="layer")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def picture_of_stages(report: flexasl.Report) -> Figure:
    """The best score of a far token at each layer, what each stage asks for, and where it selected."""
    figure, row = Figure(figsize=SIZE, layout="constrained"), report.rows[0]
    axes = figure.subplots()
    axes.plot(row.eval_layers, row.lookup, "o-", color=TOKENS, markersize=4, label="best score of a far token")
    for (tau, first, last), name, color in zip(report.thresholds, ("loose", "final"), (QUESTION, FACT), strict=True):
        layers = range(first, last + 1)
        asked = [flexasl.stages.threshold(tau, first, layer) for layer in layers]
        axes.plot(layers, asked, "--", color=color, label=f"{name} threshold")
    for height, made, color in zip((0.97, 0.88), row.selections, (QUESTION, FACT), strict=True):
        axes.axvline(made.layer, color=color, linewidth=1)
        axes.annotate(f" {made.kept_tokens} tokens kept", (made.layer, height), color=color, va="top")
    axes.set(xlabel="layer", ylabel="share of attention", xlim=(0, report.num_layers), ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    return figure


def picture_of_caches(report: flexasl.Report, trimmed: flexasl.Report) -> Figure:
    """Entries in each layer's cache."""
    figure, layers = Figure(figsize=SIZE, layout="constrained"), range(report.num_layers)
    axes = figure.subplots()
    axes.step(layers, [report.rows[0].prompt_tokens] * len(layers), where="mid", color="gray", label="unpatched")
    axes.step(layers, report.kv_tokens, where="mid", color=TOKENS, label="FlexASL")
    axes.step(layers, trimmed.kv_tokens, where="mid", color=FACT, label="with kv_budget")
    axes.set(xlabel="layer", ylabel="cache entries per KV head", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    return figure


if __name__ == "__main__":
    main()
