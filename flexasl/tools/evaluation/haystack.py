"""Texts to hide things in: prose that is on every machine, a user's file, or five sentences over and over."""

from __future__ import annotations

import re
import textwrap
from itertools import accumulate
from random import Random

LONGEST_SENTENCE = 400
NOISE = "Rain falls on the hills. A dog sleeps by the wall. The road bends to the left. Bread is on the table."


class Haystack:
    """The sentences of a text, read from some place on, over and over.

    The last sentence of a paragraph carries the blank line after it. What runs on for more than `LONGEST_SENTENCE`
    characters without a sentence's end is cut there.
    """

    def __init__(self, text: str) -> None:
        paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
        self._paragraphs = [_split(paragraph) for paragraph in paragraphs if paragraph]

    @classmethod
    def noise(cls) -> Haystack:
        """The same few short sentences for ever."""
        hay = cls(NOISE)
        hay._paragraphs = [[sentence.strip() for sentence in hay._paragraphs[0]]]
        return hay

    def read_from(self, rng: Random) -> Sentences:
        """Its sentences from the start of a paragraph that `rng` picks."""
        start = rng.randrange(len(self._paragraphs))
        turned = self._paragraphs[start:] + self._paragraphs[:start]
        return Sentences([sentence for paragraph in turned for sentence in paragraph])


class Sentences:
    """An endless row of sentences."""

    def __init__(self, cycle: list[str]) -> None:
        self._cycle = cycle

    def first(self, count: int) -> list[str]:
        """The first `count` sentences."""
        times = -(-count // len(self._cycle))
        return (self._cycle * times)[:count]


def hide(needles: list[str], depths: list[float], sentences: list[str]) -> str:
    """The sentences as one text, each needle between two of them at its depth, measured in characters (0 start, 1 end).

    Needles at the same place keep the order of their depths, then their own.
    """
    starts = list(accumulate(map(len, sentences), initial=0))
    text = list(sentences)
    for depth, needle in reversed(sorted(zip(depths, needles), key=lambda pair: pair[0])):
        place = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * starts[-1]))
        blank = "\n\n" if place and sentences[place - 1].endswith("\n\n") else ""
        text.insert(place, needle + blank)
    return join(text)


def join(sentences: list[str]) -> str:
    """Sentences as running text."""
    return " ".join(sentences).replace("\n\n ", "\n\n").strip()


def _split(paragraph: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) (?=\S)|(?<=[。！？])", paragraph)
    *first, last = [piece for sentence in sentences if sentence for piece in textwrap.wrap(sentence, LONGEST_SENTENCE)]
    return [*first, last + "\n\n"]
