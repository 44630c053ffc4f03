"""What it costs in accuracy to prune a document before its questions are known, with several questions about each.

`question known` prunes anew for every question, as an ordinary prompt; the other rows read the document once, save it,
and load it for each question. `about` is one sentence for all questions, which names none of the facts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from setting import arguments, setting, table, write

from flexasl import ASLConfig, embedded, run
from flexasl.tools.text import INTRODUCTION, Fact, magic_number, prompt_ids, prose

ANSWER_TOKENS = 12
ABOUT = "I will ask for special magic numbers that the text states."


def main() -> None:
    args = _arguments()
    setting()
    model, tokenizer = embedded.load(getattr(torch, args.dtype), args.device)
    budgets = {
        f"select_tokens={args.select_tokens}": ASLConfig(select_tokens=args.select_tokens),
        f"select_tokens=kv_budget={args.select_tokens}": ASLConfig(
            select_tokens=args.select_tokens, kv_budget=args.select_tokens
        ),
    }
    results: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for tokens in args.tokens:
        found = results[tokens] = {}
        for seed in track(range(args.documents), f"{tokens} tokens", disable=None):
            facts = [magic_number(args.questions * seed + at) for at in range(args.questions)]
            text = document(tokenizer, tokens, facts, seed)
            found.setdefault("all, not pruned", []).extend(saved(model, tokenizer, text, facts, None, ""))
            for name, config in budgets.items():
                rows = {
                    "question known": known(model, tokenizer, text, facts, config),
                    "saved": saved(model, tokenizer, text, facts, config, ""),
                    "saved, about": saved(model, tokenizer, text, facts, config, ABOUT),
                }
                for row, answers in rows.items():
                    found.setdefault(f"{name}, {row}", []).extend(answers)
    heads = ["tokens", "setting", "right", "cache, MiB", "file, MiB"]
    rows = [[tokens, name, *_summary(done)] for tokens, by_name in results.items() for name, done in by_name.items()]
    body = f"{args.questions} questions about each of {args.documents} documents; about: {ABOUT!r}\n\n"
    write(args.out, "Questions that come after the pruning", body + table(heads, rows), {"results": results})


def document(tokenizer: Any, tokens: int, facts: list[Fact], seed: int) -> str:
    """Prose of so many tokens with the facts spread evenly over its paragraphs."""
    paragraphs = prose(tokens - 40 * len(facts), tokenizer, seed=seed).split("\n\n")
    for at, fact in reversed(list(enumerate(facts))):
        place = int((at + 0.5) / len(facts) * len(paragraphs))
        paragraphs[place] = f"{fact.needle} {paragraphs[place]}"
    return "\n\n".join([INTRODUCTION.replace("One sentence", "Some sentences").replace("states", "state"), *paragraphs])


def known(model: Any, tokenizer: Any, text: str, facts: list[Fact], config: ASLConfig) -> list[dict[str, Any]]:
    """Each question at the end of a prompt of its own."""
    answers = []
    for fact in facts:
        ids = prompt_ids(tokenizer, f"{text}\n\n{fact.question}", fact.answer_prefix)
        asking: dict[str, Any] = {"config": config, "policy": "asl", "question": fact.question}
        said = run.answer(model, tokenizer, ids, max_new_tokens=ANSWER_TOKENS, **asking)
        answers.append(_result(said, fact, None))
    return answers


def saved(
    model: Any, tokenizer: Any, text: str, facts: list[Fact], config: ASLConfig | None, about: str
) -> list[dict[str, Any]]:
    """The document read once, with every token kept where config is None, then loaded for each question."""
    ids, notes = run.opening_ids(tokenizer, text, about)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.safetensors"
        policy = "asl" if config else "full"
        cache = run.prefill(model, ids, config=config, policy=policy, tokenizer=tokenizer, question=about or None)
        cache.save(path, notes)
        size, answers = path.stat().st_size, []
        for fact in facts:
            said = run.answer_saved(
                model,
                tokenizer,
                path,
                fact.question,
                max_new_tokens=ANSWER_TOKENS,
                answer_prefix=fact.answer_prefix,
            )
            answers.append(_result(said, fact, size))
    return answers


def _result(said: run.Answer, fact: Fact, file_bytes: int | None) -> dict[str, Any]:
    return {
        "right": fact.answer in said.text,
        "kv_bytes": said.kv_bytes,
        "file_bytes": file_bytes,
    }


def _summary(answers: list[dict[str, Any]]) -> list[str]:
    cache, file = (statistics.median(answer[name] or 0 for answer in answers) for name in ("kv_bytes", "file_bytes"))
    right = sum(answer["right"] for answer in answers)
    return [f"{right}/{len(answers)}", f"{cache / 2**20:.0f}", f"{file / 2**20:.0f}" if file else ""]


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=[2000])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
