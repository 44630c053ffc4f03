"""Prefill of a batch of prompts of different lengths, beside the sum of what its rows take alone.

Turns alternate, and ratios are medians of pairs, because machines are shared; for the same reason the processor's
seconds stand beside the wall's. The tokens that follow are compared too: each row's must equal its solo run's.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from prefill import _prefill, _prompt
from setting import arguments, setting, table, write

import flexasl
from flexasl import embedded

LENGTHS = [200, 400, 800, 1200, 1800, 2400, 3200, 4000]


class Seconds(NamedTuple):
    wall: float
    processor: float
    """Of all threads."""


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=LENGTHS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--unpatched", action="store_true", help="also the unpatched model, once; takes minutes on CPU")
    args = parser.parse_args()
    setting()
    model, tokenizer = embedded.load(getattr(torch, args.dtype), args.device)
    prompts = [_prompt(tokenizer, tokens, args.device)[0] for tokens in args.tokens]
    batch = _padded(prompts)
    settings: dict[str, dict[str, Any]] = {
        **({"unpatched": {}} if args.unpatched else {}),
        f"select_tokens={args.select_tokens}": {"select_tokens": args.select_tokens},
        f"the same, kv_budget={args.select_tokens}": {
            "select_tokens": args.select_tokens,
            "kv_budget": args.select_tokens,
        },
    }
    rows, data = [], []
    for name, changes in settings.items():
        patch = flexasl.patch(model, flexasl.ASLConfig(**changes)) if changes else None
        pairs = [_pair(model, prompts, batch, turn) for turn in range(args.pairs if changes else 1)]
        same = ""
        if patch is not None:
            same = f"{_same(model, prompts, batch, args.new_tokens)} of {len(prompts)}"
            patch.remove()
        shares = [statistics.median(one / all_ for one, all_ in zip(*clock)) for clock in _clocks(pairs)]
        medians = [f"{statistics.median(side):.2f}" for side in _clocks(pairs)[0]]
        rows.append([name, *medians, *(f"{share:.3f}" for share in shares), same])
        data.append({"settings": name, "pairs": pairs, "same": same})
    title = f"A batch of {len(prompts)} prompts, {min(args.tokens):,} to {max(args.tokens):,} tokens"
    heads = [
        "settings",
        "batch, s",
        "rows one by one, s",
        "batch / sum",
        "of processor time",
        f"rows with the same {args.new_tokens} tokens",
    ]
    write(args.out, title, table(heads, rows), {"tokens": args.tokens, "rows": data})


def _pair(
    model: Any, prompts: list[torch.Tensor], batch: dict[str, torch.Tensor], turn: int
) -> tuple[Seconds, Seconds]:
    """The batch's prefill, and its rows' one by one; who goes first alternates."""
    taken = {}
    for together in (turn % 2 == 0, turn % 2 == 1):
        started = time.process_time()
        wall = _prefill(model, **batch) if together else sum(_prefill(model, ids[None]) for ids in prompts)
        taken[together] = Seconds(wall, time.process_time() - started)
    return taken[True], taken[False]


def _clocks(pairs: list[tuple[Seconds, Seconds]]) -> list[tuple[list[float], list[float]]]:
    """By clock, all batches' seconds and all those of rows alone."""
    return [([batch[clock] for batch, _ in pairs], [alone[clock] for _, alone in pairs]) for clock in (0, 1)]


def _same(model: Any, prompts: list[torch.Tensor], batch: dict[str, torch.Tensor], count: int) -> int:
    """Rows whose answers alone are those in the batch."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    many = model.generate(**batch, **settings)[:, -count:]
    alone = [model.generate(ids[None], **settings)[0, -count:] for ids in prompts]
    return sum(torch.equal(one, other) for one, other in zip(many, alone, strict=True))


def _padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompts as one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in prompts]).long().to(ids.device)
    return {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    main()
