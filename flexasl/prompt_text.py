"""A prompt as text: where its tokens are in it, and where the user's last turn."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

BEFORE = 8
"""Tokens before a piece of a prompt that are decoded with it."""
HALF = "\ufffd"
"""What a letter is read as whose last token is missing."""


class Span(NamedTuple):
    """Tokens of a prompt."""

    start: int
    stop: int
    """One behind the last."""


class Prompt:
    """A prompt's text, and where its tokens are in it."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(ids)
        self.text = decoded(tokenizer, self._ids)
        self._offsets = _offsets(tokenizer, self.text, self._ids)

    def tokens(self, parts: Iterable[tuple[int, int]]) -> tuple[Span, ...]:
        """The tokens that have a part in these characters."""
        if self._offsets is not None:
            starts, stops = [start for start, _ in self._offsets], [stop for _, stop in self._offsets]
            return tuple(Span(bisect_right(stops, first), bisect_left(starts, last)) for first, last in parts)
        # So many first tokens as do not reach a character, by decoding them.
        counts = range(len(self._ids) + 1)
        made = []
        for first, last in parts:
            start = bisect_left(counts, first, key=self._length)
            start -= self._length(start) > first
            made.append(Span(start, bisect_left(counts, last, key=self._length)))
        return tuple(made)

    def _length(self, count: int) -> int:
        """Characters of the first tokens, without the beginning of a letter that the next one ends."""
        return len(decoded(self._tokenizer, self._ids[:count]).rstrip(HALF))


def _offsets(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
    """The characters of each token, ascending, where the tokenizer can tell."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if list(made["input_ids"]) != ids:
        return None
    return [tuple(pair) for pair in made["offset_mapping"]]


def pieces(tokenizer: Any, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    """The text of ids between neighbouring cuts, ascending, which begin with 0. A letter of several tokens goes to the
    piece in which it ends."""
    made = []
    for start, stop in pairwise(cuts):
        # Behind a few tokens before it, a piece keeps its leading space, and a letter is whole.
        first = max(0, start - BEFORE)
        before = decoded(tokenizer, ids[first:start]).removesuffix(HALF)
        text = decoded(tokenizer, ids[first:stop])
        made.append((text if stop == cuts[-1] else text.removesuffix(HALF))[len(before) :])
    return made


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    try:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except TypeError:  # of another library
        text = tokenizer.decode(list(ids))
    return str(text)


def last_turn(tokenizer: Any, text: str) -> tuple[int, int]:
    """The characters of the user's last message; all where the prompt has none by the chat template."""
    found = _marks(tokenizer)
    if found is None:
        return 0, len(text)
    before, after = found
    start = text.rfind(before)
    if start < 0:
        return 0, len(text)
    start += len(before)
    stop = text.find(after, start)
    return start, len(text) if stop < 0 else stop


def _marks(tokenizer: Any) -> tuple[str, str] | None:
    """What stands before a user's message, and what ends it; None without a chat template that says so."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    said = ("qaone", "qatwo", "qathree")
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, said)]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program, which can raise anything
        return None
    places = [whole.find(content) for content in said]
    if -1 in places or places != sorted(places):
        return None
    opening, answering = whole[: places[0]], whole[places[0] + len(said[0]) : places[1]]
    again = whole[places[1] + len(said[1]) : places[2]]
    same = next((at for at in range(min(len(opening), len(again))) if opening[-1 - at] != again[-1 - at]), None)
    before = again[len(again) - (min(len(opening), len(again)) if same is None else same) :]
    special = sorted({*map(str, _special(tokenizer))} - {""}, key=len, reverse=True)
    parts = [found.span() for found in re.finditer("|".join(map(re.escape, special)), before)] if special else []
    # The shortest end of it that begins with a special token and does not open an answer as well.
    shorter = [before[start:] for start, _ in parts if not answering.endswith(before[start:])]
    before = shorter[-1] if shorter else before
    ends = re.search("|".join(map(re.escape, special)), answering) if special else None
    after = answering[: ends.end()] if ends is not None else answering.rstrip()
    return (before, after) if before.strip() and after.strip() else None


def _special(tokenizer: Any) -> Iterable[str]:
    known = set(getattr(tokenizer, "all_special_tokens", ()))
    added = getattr(tokenizer, "get_added_vocab", dict)
    return known | set(added())
