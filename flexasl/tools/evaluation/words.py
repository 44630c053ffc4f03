"""Words, numbers and identifiers that samples are made of."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import cache
from random import Random


@cache
def vocabulary() -> tuple[str, ...]:
    """Some 8,000 English words in lower case, ascending."""
    return tuple(sorted({word for kind in ("noun", "verb", "adjective") for word in _words(kind)}))


def key_words(rng: Random) -> str:
    """An adjective and a noun, as in `quiet-harbour`."""
    return f"{rng.choice(_words('adjective'))}-{rng.choice(_words('noun'))}"


def number(rng: Random, digits: int = 7) -> str:
    """A number of so many digits that does not start with 0."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def identifier(rng: Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(make: Callable[[Random], str], count: int, rng: Random, taken: set[str] | None = None) -> list[str]:
    """So many different strings, none of them in `taken`, in the order in which they were made."""
    found: dict[str, None] = {}
    while len(found) < count:
        one = make(rng)
        if not taken or one not in taken:
            found[one] = None
    return list(found)


@cache
def _words(kind: str) -> tuple[str, ...]:
    from wonderwords import RandomWord

    words = RandomWord().filter(include_categories=[kind])
    return tuple(sorted({word for word in words if word.isalpha() and word.isascii() and word.islower()}))
