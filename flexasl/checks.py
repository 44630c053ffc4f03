"""Checks of arguments. Each raises one sentence that names the argument, what was given and what is allowed, or returns
the value as the rest of the code takes it: an int of numpy as an int."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from flexasl.errors import ConfigError, FlexASLError, UnsupportedError

F = TypeVar("F", bound=Callable[..., Any])

LONGEST = 60
"""Characters of a value that an error shows."""


def shown(value: Any) -> str:
    """The value as an error shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def article(value: Any) -> str:
    """The kind of a value, with its article: "an int"."""
    kind = "None" if value is None else type(value).__name__
    return kind if value is None else f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def instance(
    name: str, value: Any, kinds: type | tuple[type, ...], allowed: str, error: type[FlexASLError] = FlexASLError
) -> Any:
    """The value, which must be of one of these kinds; allowed says which in words."""
    if not isinstance(value, kinds):
        given = "" if value is None else f"={shown(value)}"
        raise error(f"{name}{given} is {article(value)}; give {allowed}")
    return value


def integer(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    error: type[FlexASLError] = FlexASLError,
) -> int:
    """The value as an int, within these bounds; numpy's ints count, truth values do not."""
    if least is not None and most is not None:
        bounds = f"from {least} to {most}"
    else:
        bounds = f"at least {least}" if least is not None else f"at most {most}"
    whole = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            whole = operator.index(value)
    if whole is None:
        limit = "" if least is most is None else f" {bounds}" if bounds.startswith("from") else f" of {bounds}"
        raise error(f"{name}={shown(value)} is not a whole number; give an int{limit}")
    if least is not None and whole < least:
        raise error(f"{name}={whole} is too small; give {bounds}")
    if most is not None and whole > most:
        raise error(f"{name}={whole} is too large; give {bounds}")
    return whole


def ascending(name: str, values: Any, least: int, most: int, *, error: type[FlexASLError] = FlexASLError) -> list[int]:
    """The values, a sequence or a tensor, as ints within these bounds, each once and in order; name is that of one."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        raise error(f"{name}s are {shown(values)}; give whole numbers in order")
    whole = [value if type(value) is int else integer(name, value, least, most, error=error) for value in listed]
    for value in whole[:1] + whole[-1:]:
        integer(name, value, least, most, error=error)
    if any(one >= other for one, other in pairwise(whole)):
        raise error(f"{name}s do not ascend; give each once, in order")
    return whole


def real(name: str, value: Any, allowed: str, *, error: type[FlexASLError] = FlexASLError) -> float | int:
    """The value as a finite int or float; allowed says in words which."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise error(f"{name}={shown(value)} is out of range; give {allowed}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def amount(name: str, value: Any, least: int, why: str = "is too small") -> int | float:
    """A count of at least so many tokens, or a share in (0, 1]; why: what is wrong with fewer."""
    if not isinstance(value, (bool, float)):
        with contextlib.suppress(TypeError):  # integers of NumPy, torch and others
            value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name}={shown(value)} is not an amount; give a count of tokens or a share in (0, 1]")
    if not isinstance(value, numbers.Integral):
        share = float(value)
        if not 0 < share <= 1:
            raise ConfigError(f"{name}={value} is not a share of the prompt; give a float in (0, 1] or an int")
        return share
    count = int(value)
    if count < least:
        raise ConfigError(f"{name}={count} {why}; give at least {least}")
    return count


def one_of(name: str, value: Any, allowed: Sequence[Any], *, error: type[FlexASLError] = FlexASLError) -> Any:
    """The value, which must be one of these."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise error(f"{name}={shown(value)} is not known; give {' or '.join(map(repr, allowed))}")
    return value


def several(name: str, values: Any, kind: type | tuple[type, ...], allowed: str) -> list[Any]:
    """The values, an iterable of this kind, which may be text itself but is not given as one text."""
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise FlexASLError(f"{name}={shown(values)} is {article(values)}; give a list of {allowed}")
    found = list(values)
    for value in found:
        if not isinstance(value, kind):
            raise FlexASLError(f"{name} holds {shown(value)}, {article(value)}; give {allowed}")
    return found


def tokenizer(value: Any) -> Any:
    """The value, which must turn text into ids and ids into text."""
    if not callable(value) or not callable(getattr(value, "decode", None)):
        given = "" if value is None else f"={shown(value)}"
        raise FlexASLError(f"tokenizer{given} is {article(value)}; give the model's tokenizer")
    return value


def transformers_model(value: Any) -> Any:
    """The value, which must be a model of transformers."""
    found = sys.modules.get("transformers")
    if found is None or not isinstance(value, found.PreTrainedModel):
        raise UnsupportedError(f"model is {article(value)}; give a transformers causal language model")
    return value


def path(name: str, value: Any) -> Path:
    """The value as a path."""
    return Path(instance(name, value, (str, os.PathLike), "a path"))


def renamed(old: str, new: str) -> None:
    """Warns that a public name has another one now; it goes with the next release."""
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=3)


def renames(**names: str) -> Callable[[F], F]:
    """Lets a function take keyword arguments by their old names, with a warning: old="new"."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                renamed(old, names[old])
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(F, called)

    return wrap
