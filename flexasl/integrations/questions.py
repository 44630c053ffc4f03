"""What a user says of the question, and the tokens of each prompt that it means.

A question of one row is a text of the prompt, a span (start, stop) of its positions, 0 being its first real token, or a
list of these; of a batch it is one such text or span for all rows, or a list with one for each, of which None leaves it
to the tokenizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexasl import checks
from flexasl.checks import integer, shown
from flexasl.errors import FlexASLError
from flexasl.prompt_text import Span
from flexasl.question import find_question, question_tokens, text_of

ALLOWED = "a text of the prompt, a span (start, stop) of its positions, a list of these for each row, or None"


class Found(NamedTuple):
    """What `Prefill` takes: of each row positions [W] int64 in the padded batch, and what the report says of them."""

    positions: list[Tensor | None] | None = None
    texts: list[str | None] | None = None


_OF_A_CALL: ContextVar[tuple[Any, Any] | None] = ContextVar("flexasl_question", default=None)
"""A patch and the question of the prompts that it reads now, in this thread."""


@contextlib.contextmanager
def asking(patch: Any, question: Any) -> Iterator[None]:
    """Prompts that the patch's model reads inside have this question, in this thread."""
    check(question, patch.tokenizer)
    before = _OF_A_CALL.set((patch, question))
    try:
        yield
    finally:
        _OF_A_CALL.reset(before)


def of_prompts(patch: Any, ids: Tensor | None, lengths: Sequence[int], tokens: int) -> Found:
    """The questions of the prompts that the patch's model reads now, of which ids [B, tokens] are known or not."""
    call = _OF_A_CALL.get()
    question = patch.question if call is None or call[0] is not patch else call[1]
    if question is None and patch.tokenizer is None:
        return Found()
    return find(question, patch.tokenizer, ids, lengths, tokens)


def check(question: Any, tokenizer: Any) -> None:
    """Raises `FlexASLError` for what is no question, and for a text where there is no tokenizer to find it with."""
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        checks.tokenizer(tokenizer)
    for row in question if isinstance(question, list) else [question]:
        for part in row if isinstance(row, list) else [row]:
            if isinstance(part, str) and tokenizer is None:
                raise FlexASLError(
                    f"question={shown(part)} is a text, and there is no tokenizer to find it in the prompt; give "
                    "flexasl.patch the model's tokenizer, or the question as a span (start, stop)"
                )
            if part is not None and not isinstance(part, str) and not _is_span(part):
                raise FlexASLError(f"question={shown(question)} holds {shown(part)}; give {ALLOWED}")


def repeated(question: Any, times: int) -> Any:
    """The question of a batch in which each row is there so many times, one after another."""
    return [row for row in question for _ in range(times)] if isinstance(question, list) else question


@torch.compiler.disable
def find(question: Any, tokenizer: Any, ids: Tensor | None, lengths: Sequence[int], tokens: int) -> Found:
    """The questions of a batch of prompts, of which ids [B, tokens] are known or not, padded on the left. Raises
    `FlexASLError` where a row does not have what was given for it."""
    rows = question if isinstance(question, list) else [question] * len(lengths)
    if len(rows) != len(lengths):
        raise FlexASLError(
            f"question has {len(rows)} rows where the batch has {len(lengths)}; give one for each, or one for all"
        )
    read = None if ids is None or tokenizer is None else ids.tolist()
    positions_of: list[Tensor | None] = []
    texts: list[str | None] = []
    for row, (given, length) in enumerate(zip(rows, lengths)):
        own = None if read is None else read[row][tokens - length :]
        spans, text = _of_row(given, tokenizer, own, length)
        places = sorted({place for start, stop in spans for place in range(start, stop)})
        positions = torch.tensor(places, dtype=torch.int64, device="cpu") + (tokens - length)
        positions_of.append(positions if places else None)
        texts.append(text)
    return Found(positions_of, texts)


def _of_row(given: Any, tokenizer: Any, ids: list[int] | None, length: int) -> tuple[list[Span], str | None]:
    """The spans of one row, and what the report says of them: their text, why there are none, or nothing."""
    if given is None or given == []:
        if tokenizer is None:
            return [], None
        if ids is None:
            return [], "the prompt's text is not known"
        spans = list(find_question(tokenizer, ids))
        return spans, text_of(tokenizer, ids, spans) if spans else "no question was found"
    parts = given if isinstance(given, list) else [given]
    texts, spans = [part for part in parts if isinstance(part, str)], []
    for part in parts:
        if not isinstance(part, str):
            start = integer("question: start", part[0], 0, length - 1)
            spans.append(Span(start, integer("question: stop", part[1], start + 1, length)))
        elif ids is None:
            raise FlexASLError(
                f"question={shown(part)} is a text, and the prompt is given as embeddings; give a span (start, stop)"
            )
        else:
            spans.append(question_tokens(tokenizer, ids, part))
    return spans, " … ".join(" ".join(text.split()) for text in texts) if len(texts) == len(parts) else None


def _is_span(part: Any) -> bool:
    if not isinstance(part, tuple) or len(part) != 2:
        return False
    return all(hasattr(end, "__index__") and not isinstance(end, bool) for end in part)
