"""One prompt's answers under many settings at once: the prefills share what is equal in them, the decode is one batch.

Shapes: S settings, N tokens of the prompt, M new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flexasl
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.report import Report
from flexasl.tools.evaluation.memo import Memo, costly_modules
from flexasl.tools.evaluation.plans import Setting

STRETCH = 16
"""Tokens that are decoded before settings whose answer has ended leave the batch."""


class Said(NamedTuple):
    """What one setting made of a prompt."""

    text: str
    prompt_tokens: int
    new_tokens: int
    report: Report | None
    """None for the unpatched model."""
    first_token_seconds: None = None
    """Not measured, nor is the whole answer: settings share their work."""
    total_seconds: None = None


def answer_together(
    model: Any, tokenizer: Any, ids: list[int], settings: Sequence[Setting], *, max_new_tokens: int
) -> list[Said]:
    """The greedy answers to a prompt, one for each setting, as `flexasl.run.answer` gives them one by one."""
    prompt = torch.tensor([ids], dtype=torch.int64, device=model.device)
    memo = Memo(len(ids))
    with memo.over(costly_modules(decoder_layers(model))):
        read = [_prefill(model, tokenizer, prompt, setting, memo, max_new_tokens) for setting in settings]
    del memo
    first, caches, reports = map(list, zip(*read, strict=True))
    del read
    tokens = _decode(model, prompt, first, caches, max_new_tokens)
    return [
        Said(tokenizer.decode(new, skip_special_tokens=True).strip(), len(ids), len(new), report)
        for new, report in zip(tokens, reports, strict=True)
    ]


def _prefill(
    model: Any, tokenizer: Any, prompt: Tensor, setting: Setting, memo: Memo, max_new_tokens: int
) -> tuple[int, Any, Report | None]:
    """The first token, the cache and the report of the prompt [1, N] under one setting."""
    with ExitStack() as stack:
        patch = None
        if setting.policy is not None:
            asking: dict[str, Any] = {"tokenizer": tokenizer} if setting.by_question else {}
            asking["profile"] = setting.profile
            patch = stack.enter_context(flexasl.patch(model, setting.config, policy=setting.policy, **asking))
            stack.enter_context(memo.over({at: own for at, own in enumerate(patch.attention) if own is not None}))
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=[_at_once],
            return_dict_in_generate=True,
        )
        return int(out.sequences[0, -1]), out.past_key_values, None if patch is None else patch.report


def _decode(model: Any, prompt: Tensor, first: list[int], caches: list[Any], max_new_tokens: int) -> list[Tensor]:
    """All new tokens [M] of each setting, up to its end-of-sequence token, given the first one and the cache of the
    prompt [1, N]. Empties the list of caches, which are large."""
    from flexasl.integrations.transformers.cache import PrunedCache

    ends = torch.tensor(sorted(_end_tokens(model)), dtype=torch.int64, device=prompt.device)
    new = [torch.tensor([token], dtype=torch.int64, device=prompt.device) for token in first]
    going = [row for row, tokens in enumerate(new) if not torch.isin(tokens, ends).any()]
    if not going or max_new_tokens == 1:
        return new
    cache = PrunedCache.stacked([caches[row] for row in going], slack=min(STRETCH, max_new_tokens))
    caches.clear()
    with flexasl.patch(model, policy="full"):
        while going and len(new[going[0]]) < max_new_tokens:
            start = torch.stack([torch.cat([prompt[0], new[row]]) for row in going])
            out = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                past_key_values=cache,
                max_new_tokens=min(STRETCH, max_new_tokens - len(new[going[0]])),
                do_sample=False,
            )
            for row, tokens in zip(going, out[:, prompt.shape[1] :], strict=True):
                ended = torch.isin(tokens, ends).nonzero()
                new[row] = tokens[: int(ended[0]) + 1] if len(ended) else tokens
            left = [place for place, row in enumerate(going) if not torch.isin(new[row], ends).any()]
            if left and len(left) < len(going):
                cache.batch_select_indices(torch.tensor(left, dtype=torch.int64, device=prompt.device))
            going = [going[place] for place in left]
    return new


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _at_once(ids: Tensor, scores: Any, **rest: Any) -> Tensor:
    """transformers' stopping criterion: after the first token."""
    return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
