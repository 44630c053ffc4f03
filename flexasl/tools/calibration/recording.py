"""Prompts whose answer's tokens are known, and how every layer ranks their tokens, from one run of each.

Shapes: L layers, G KV heads, P prefix tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flexasl
from flexasl.errors import FlexASLError
from flexasl.integrations.questions import of_prompts
from flexasl.ops import over_heads
from flexasl.policies.base import SCORES
from flexasl.policies.full import Full
from flexasl.tools.evaluation.samples import Sample
from flexasl.tools.text import encoding

Answer = tuple[tuple[int, ...], ...]
"""Where a reference is stated in the prompt: for each statement, the positions of its tokens."""
SENTENCE = 200
"""Characters on either side of a reference in which its sentence is looked for."""
_BEFORE = re.compile(r".*(?:[.!?][\"')]*\s|\n)", re.DOTALL)
_AFTER = re.compile(r".*?(?:[.!?](?=\s|$)|(?=\n))", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it."""

    task: str
    index: int
    ids: list[int]
    answers: tuple[Answer, ...]
    """One for each reference."""
    references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A prompt, and the scores of its tokens."""

    prompt: Prompt
    scores: Tensor
    """[L, P] float32, pooled and summed over heads, as the rule takes them."""
    question: tuple[int, ...] = ()
    """Positions of the tokens that ask, ascending; none where the window ranks."""


def locate(tokenizer: Any, sample: Sample, *, sentences: bool = False) -> Prompt:
    """The sample as token ids, with the tokens that state its references; with sentences, those of the whole sentences
    that do.

    Raises FlexASLError for a tokenizer that does not say where in the text its tokens are, and for a reference that
    does not stand in the prompt.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FlexASLError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens are, which calibration needs; give a "
            "fast tokenizer (use_fast=True)"
        )
    encoded = encoding(tokenizer, sample.prompt, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    answers = []
    for reference in sample.references:
        places = _places(sample.prompt, reference)
        if not places:
            raise FlexASLError(
                f"task={sample.task!r} has an answer, {reference!r}, that does not stand in the prompt, so that "
                "nothing says which tokens to keep; give retrieval tasks such as needle, passkey or niah_single_2"
            )
        if sentences:
            places = [_sentence(sample.prompt, *place) for place in places]
        answers.append(
            tuple(
                tuple(at for at, (start, end) in enumerate(offsets) if start < end and start < last and end > first)
                for first, last in places
            )
        )
    return Prompt(
        task=sample.task,
        index=sample.index,
        ids=list(encoded["input_ids"]),
        answers=tuple(answers),
        references=tuple(sample.references),
    )


def record(
    model: Any, prompts: Iterable[Prompt], config: flexasl.ASLConfig, tokenizer: Any, on_run: Callable[[int], None]
) -> tuple[list[Recording], list[int] | None]:
    """Reads each prompt once with its full cache; returns the scores under the config's `window`, `kernel_size`,
    `pooling`, `score_power` and `contrast`, and the layers whose ranks count (None: all). The question that the
    tokenizer finds ranks the tokens; without one (None), the window does. on_run is called with the number of runs so
    far."""
    scoring = flexasl.ASLConfig(**{name: getattr(config, name) for name in SCORES})
    recordings = []
    with flexasl.patch(model, scoring, policy=_Watched(), tokenizer=tokenizer) as patch, torch.no_grad():
        layers: dict[int, Tensor] = {}

        def note(layer: int, scores: Tensor) -> None:
            totals = over_heads(scores, 1, config.power)
            layers[layer] = (totals if patch.reduce is None else patch.reduce(totals, config.power == math.inf))[0]

        patch.observer = note
        for prompt in prompts:
            layers.clear()
            ids = torch.tensor([prompt.ids], dtype=torch.int64, device=model.device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            nothing = torch.zeros_like(next(iter(layers.values())))  # of layers without attention
            scores = torch.stack([layers.get(layer, nothing) for layer in range(len(patch.attention))]).cpu()
            found = of_prompts(patch, ids, [len(prompt.ids)], len(prompt.ids)).positions
            question = () if found is None or found[0] is None else tuple(found[0].tolist())
            recordings.append(Recording(prompt=prompt, scores=scores, question=question))
            on_run(len(recordings))
        return recordings, None if patch.ranking_layers is None else list(patch.ranking_layers)


class _Watched(Full):
    """Nothing pruned, but every layer scored."""

    takes = Full.takes | SCORES


def _places(text: str, words: str) -> list[tuple[int, int]]:
    """Where the words stand in the text, as characters from and to."""
    places, start = [], text.find(words)
    while start >= 0:
        places.append((start, start + len(words)))
        start = text.find(words, start + len(words))
    return places


def _sentence(text: str, first: int, last: int) -> tuple[int, int]:
    """The characters of the sentence around these; these alone on a side where it has no end nearby."""
    before, after = max(0, first - SENTENCE), text[last : last + SENTENCE]
    start, stop = _BEFORE.match(text[before:first]), _AFTER.match(after)
    return first if start is None else before + start.end(), last if stop is None else last + stop.end()
