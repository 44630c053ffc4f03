"""JSON that was stored: read within limits, checked against a type, and refused in one sentence.

Python's own types say what a value must be: `str`, `int`, `float` (any finite number), `bool`, `None`, `Any`,
`dict[str, X]`, `list[X]`, `tuple[X, ...]`, `tuple[X, Y]`, `X | Y`, a TypedDict, whose objects may hold more, a
dataclass, whose objects may not, and `Annotated[X, rule]` with rules such as `Range`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

from flexasl.errors import FlexASLError

MOST_BYTES = 2**30
"""Of a file, or of a line of one that has a record in each."""
MOST_DEPTH = 64
"""Lists and objects inside each other."""
MOST_DIGITS = 100
"""Of a whole number."""
TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
"""A string, whole or not, or a bracket outside of strings."""
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
PLAIN = (str, int)
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class Unfit(FlexASLError):
    """What is wrong with a stored value, to be said with the name of its file."""


class NullIsNaN:
    """Rule for floats: `null` stands for a number that is none."""


NULL_IS_NAN = NullIsNaN()


@dataclasses.dataclass(frozen=True)
class Range:
    """Rule for numbers: both ends are in it."""

    least: float
    most: float = 2**53

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {self.least} to {self.most}"


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Rule for lists: how many entries there are."""

    count: int

    def holds(self, value: typing.Sized) -> bool:
        return len(value) >= self.count

    def __str__(self) -> str:
        return f"of at least {self.count} entries"


Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]


def read(path: str | os.PathLike[str], kind: Any = Any) -> Any:
    """The value in a JSON file. Raises `Unfit`, without the file's name, and FileNotFoundError where there is none."""
    if os.path.isdir(path):
        raise Unfit("it is a folder")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist; give a JSON file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Unfit(f"it has more than {MOST_BYTES:,} bytes")
    return fit(kind, parse(data))


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Place in bytes and content of each line of a file, line ends included; of one that is too long, its beginning."""
    with open(path, "rb") as file:
        place = 0
        while line := file.readline(MOST_BYTES + 1):
            yield place, line
            place += len(line)


def parse(data: bytes | str) -> Any:
    """A value from JSON in UTF-8, with or without a byte order mark.

    Raises `Unfit` for anything else, names given twice, numbers that are not finite or far too long, halves of
    characters, and what is nested deeper than `MOST_DEPTH`.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        if isinstance(data, str):
            data.encode()
    except UnicodeError as error:
        raise Unfit("it is not UTF-8") from error
    _check_depth(text)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float, parse_int=_int
        )
        if ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise Unfit(f"it is not JSON ({error.msg} in line {error.lineno}, column {error.colno})") from error
    except UnicodeEncodeError as error:
        raise Unfit("it has half a character (a lone surrogate)") from error
    return value


def fit(kind: Any, value: Any, where: str = "") -> Any:
    """The value as what `kind` says: lists as tuples and objects as dataclasses where it says so, the rest as it is.

    Raises `Unfit`, which names the place in the value, what is there and what is needed.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _ruled(inner[0], inner[1:], value, where)
    if origin in (typing.Union, types.UnionType):
        return _one_of(kind, inner, value, where)
    if typing.is_typeddict(kind):
        return _object_of(kind, value, where, closed=False)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**_object_of(kind, value, where, closed=True))
    if origin is dict:
        _need(type(value) is dict, kind, value, where)
        for name in value:
            _need(type(name) is str, str, name, f"a name in {where or 'it'}")
        return {name: fit(inner[1], item, _inside(where, name)) for name, item in value.items()}
    if origin in (list, tuple):
        _need(type(value) in (list, tuple), kind, value, where)
        if inner[0] in PLAIN and (origin is list or inner[-1] is ...) and all(type(one) is inner[0] for one in value):
            return origin(value)  # most of what is long
        each = [inner[0]] * len(value) if origin is list or inner[-1] is ... else list(inner)
        if len(each) != len(value):
            raise Unfit(f"{where or 'it'} has {len(value)} entries, where {len(each)} are needed")
        return origin(fit(one, item, f"{where}[{at}]") for at, (one, item) in enumerate(zip(each, value)))
    if kind is float and type(value) is int:
        return float(value)
    _need(type(value) is kind and (kind is not float or math.isfinite(value)), kind, value, where)
    return value


def dump(value: Any, **settings: Any) -> str:
    """A value as JSON that `parse` takes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **settings)


def nameable(path: str) -> str:
    """A file's name as text that can be stored and printed. Python disguises bytes that the locale's encoding lacks as
    halves of characters: they are read as UTF-8, and what is none becomes `\\xff` and the like."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    """A text in which what a terminal would obey (all control characters but line ends and tabs, and marks that turn
    the direction of writing) is written as `\\x1b` and the like."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


def _ruled(kind: Any, rules: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NULL_IS_NAN in rules:
        return math.nan
    found = fit(kind, value, where)
    for rule in rules:
        if rule is not NULL_IS_NAN and not rule.holds(found):
            raise Unfit(f"{where or 'it'} is {_brief(value)}, where {_words(kind)} {rule} is needed")
    return found


def _one_of(kind: Any, choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    for choice in others:
        try:
            return fit(choice, value, where)
        except Unfit:
            if len(others) == 1:  # whose own words say more
                raise
    raise Unfit(f"{where or 'it'} is {_brief(value)}, where {_words(kind)} is needed")


def _object_of(kind: Any, value: Any, where: str, *, closed: bool) -> dict[str, Any]:
    _need(type(value) is dict, kind, value, where)
    kinds, optional = _fields(kind)
    missing = [name for name in kinds if name not in value and name not in optional]
    if missing:
        raise Unfit(f"{_inside(where, missing[0])} is missing")
    if closed and len(value) > len(kinds):
        more = next(name for name in value if name not in kinds)
        raise Unfit(f"{_inside(where, more)} is not known; the fields of {kind.__name__} are {', '.join(kinds)}")
    return value | {name: fit(kinds[name], value[name], _inside(where, name)) for name in kinds if name in value}


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of the fields of a TypedDict or dataclass, and the names of those that may be missing."""
    kinds: dict[str, Any] = {}
    optional = set()
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is typing.NotRequired:
            optional.add(name)
            (hint,) = typing.get_args(hint)
        kinds[name] = hint
    return kinds, optional


def _need(holds: bool, kind: Any, value: Any, where: str) -> None:
    if not holds:
        raise Unfit(f"{where or 'it'} is {_brief(value)}, where {_words(kind)} is needed")


def _words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, inner)))
    return WORDS.get(kind) or ("a list" if origin in (list, tuple) else "an object")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _inside(where: str, name: Any) -> str:
    name = name if str(name).isidentifier() else _brief(name)
    return f"{where}.{name}" if where else name


def _check_depth(text: str) -> None:
    depth = 0
    for found in TOKEN.finditer(text):
        bracket = found[0]
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > MOST_DEPTH:
            raise Unfit(f"it is nested deeper than {MOST_DEPTH} lists and objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # which one counts would be up to the reader
        names = [name for name, _ in pairs]
        raise Unfit(f"it names {_brief(next(name for name in names if names.count(name) > 1))} twice")
    return found


def _no_number(constant: str) -> NoReturn:
    raise Unfit(f"it has {constant} for a number")


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:20])


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise Unfit(f"it has a number of {len(text)} digits")
    return int(text)
