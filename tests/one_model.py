"""The embedded model under transformers: what it decides and answers, which other frameworks must do likewise."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

import flexasl
from flexasl import embedded
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids

NEW_TOKENS, PAD = 12, 0
SETTINGS = flexasl.ASLConfig(select_tokens=160)


class Want(NamedTuple):
    prompts: torch.Tensor
    """[B, N], padded on the left with `PAD`, which no prompt contains."""
    config: flexasl.ASLConfig
    """`SETTINGS` with no default left open: a profile's, which other frameworks do not look up, filled in."""
    layers: list[int | None]
    kept: list[tuple[int, ...]]
    logits: torch.Tensor
    """[N, V] of the first row, unpatched."""
    answer: torch.Tensor
    """[B, `NEW_TOKENS`], greedy, pruned."""


@functools.cache
def want() -> Want:
    model, tokenizer = embedded.load()
    rows = []
    for tokens, seed in ((700, 3), (500, 4)):
        fact = magic_number(seed)
        text = needle_prompt(tokenizer, tokens, 0.3, fact.needle, fact.question, seed)
        rows.append(torch.tensor(prompt_ids(tokenizer, text, fact.answer_prefix)))
    width = max(map(len, rows))
    prompts = torch.stack([torch.cat([row.new_full((width - len(row),), PAD), row]) for row in rows])
    with torch.no_grad():
        logits = model(rows[0][None]).logits[0]
    with flexasl.patch(model, SETTINGS) as patch:
        out = model.generate(
            prompts,
            attention_mask=(prompts != PAD).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    decided = patch.report.rows
    assert all(row.pruned for row in decided)
    return Want(
        prompts,
        patch.config,
        [row.selected_layer for row in decided],
        [row.kept_positions for row in decided],
        logits,
        out[:, -NEW_TOKENS:],
    )
