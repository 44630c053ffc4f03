"""Files that are nearly right: bytes changed, pieces lost or doubled, and JSON with something else in a place."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**90, 10**400, -(2**70), 1.5, 1e308, float("nan"), float("inf")]
ODD += ["", "x", "\ud800", "\x1b[2J", "9" * 5000, [], {}, [[]], [-1], [0, "0"], {"a": None}]
"""What no place of a file is made for."""


def mutated(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """So many versions of a file, none of them the file itself: bits and bytes changed, pieces cut out, put in, doubled
    and moved, ends cut off and added, and numbers of eight bytes made large."""
    choose = random.Random(seed)
    while count:
        made, at = bytearray(content), choose.randrange(len(content))
        piece = made[at : at + choose.randint(1, 60)]
        kind = choose.randrange(9)
        if kind == 0:
            made[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            made[at] = choose.randrange(256)
        elif kind == 2:
            del made[at : at + len(piece)]
        elif kind == 3:
            made[at:at] = choose.randbytes(len(piece))
        elif kind == 4:
            made[at:at] = piece * choose.choice([1, 1, 1, 50])
        elif kind == 5:
            del made[at : at + len(piece)]
            at = choose.randrange(len(made) + 1)
            made[at:at] = piece
        elif kind == 6:
            del made[at:]
        elif kind == 7:
            made += choose.choice([choose.randbytes(len(piece)), bytes(piece), b"\n", b"\0", b"[" * 5000])
        else:
            made[at : at + 8] = choose.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
        if bytes(made) != content:
            count -= 1
            yield bytes(made)


def mangled(value: Any, choose: random.Random) -> Any:
    """A JSON value with something in it of another type, size or depth, missing, or there besides."""
    value = copy.deepcopy(value)
    place: Any = None
    at: Any = None
    inner = value
    while isinstance(inner, (dict, list)) and inner and choose.random() < 0.9:
        place, at = inner, choose.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = place[at]
    kind = choose.randrange(6)
    if place is None or kind == 5:
        return choose.choice(ODD) if place is None else [value]
    if kind == 0:
        del place[at]
    elif kind == 1 and isinstance(place, dict):
        place[choose.choice(["more", "", "\x1b[2J", at.upper()])] = place[at]
    elif kind == 2:
        for _ in range(choose.choice([1, 3, 100])):
            place[at] = choose.choice([[place[at]], {"a": place[at]}])
    else:
        place[at] = choose.choice(ODD)
    return value


def as_json(value: Any, choose: random.Random) -> bytes:
    """The value as a file, now and then one that is no strict JSON."""
    text = json.dumps(value, ensure_ascii=choose.random() < 0.5)
    if choose.random() < 0.05:
        twice = text.replace("{", '{"a":1,"a":2,', 1)
        text = choose.choice(["\ufeff" + text, text + text, "[" * 100_000 + text, twice])
    return text.encode("utf-8", "surrogatepass")
