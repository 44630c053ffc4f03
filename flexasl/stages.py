"""Stages of a selection: loose ones, each at most once a prompt, before the final one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexasl.checks import amount, integer, real, shown
from flexasl.errors import ConfigError

FORM = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(?:@(\d+)(?:-(\d+))?)?")
PATIENCE = 0.85
"""What a threshold becomes one layer later."""
TEXTS = "texts such as '0.5@5-9' (half of the tokens, at one of the layers 5 to 9)"


def threshold(tau: float, first: int, layer: int) -> float:
    """What a look-up must reach at a layer, where `tau` is asked at the first one."""
    return tau * PATIENCE ** max(0, layer - first)


@dataclass(frozen=True, kw_only=True, repr=False)
class Stage:
    """A loose selection before the final one: after its layer, the model runs on `tokens` tokens.

    A stage may be written as a text, `"0.5"`, `"0.5@7"` or `"0.5@5-9"`: tokens, and from which layer to which.

    Args:
        tokens: A count, never less than `select_tokens`, or a share in (0, 1] of the prompt, never less than one and a
            half times `select_tokens`.
        tau: As `ASLConfig.tau`, for this stage. None: 0.4, or 0.95 with another pooling than `"phrase"`.
        min_layer: First layer at which it can be made. None: `score_from`.
        max_layer: Layer at which it is made at the latest. None: a quarter of the layers.

    Raises:
        ConfigError: A value is out of range, or `max_layer` comes before `min_layer`.

    Examples:
        >>> Stage.of("0.5@5-9")
        Stage(tokens=0.5, min_layer=5, max_layer=9)
        >>> ASLConfig(stages="0.5@5-9").stages
        (Stage(tokens=0.5, min_layer=5, max_layer=9),)
    """

    tokens: int | float
    tau: float | None = None
    min_layer: int | None = None
    max_layer: int | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "tokens", amount("stages: tokens", self.tokens, 2))
        for name in ("min_layer", "max_layer"):
            if getattr(self, name) is not None:
                set_(self, name, integer(f"stages: {name}", getattr(self, name), 0, error=ConfigError))
        if self.tau is not None:
            tau = real("stages: tau", self.tau, "a number in (0, 1]", error=ConfigError)
            if not 0 < tau <= 1:
                raise ConfigError(f"stages: tau={tau} is out of range; give a number in (0, 1]")
            set_(self, "tau", tau)
        if self.min_layer is not None and self.max_layer is not None and self.max_layer < self.min_layer:
            raise ConfigError(
                f"stages: max_layer={self.max_layer} comes before min_layer={self.min_layer}; give at least "
                f"{self.min_layer}"
            )

    @classmethod
    def of(cls, given: Any) -> Stage:
        """The stage that a dict, a text or a stage says; raises `ConfigError` for anything else."""
        if isinstance(given, Stage):
            return given
        if isinstance(given, Mapping):
            names = [part.name for part in dataclasses.fields(cls)]
            if "tokens" not in given or not set(given) <= set(names):
                raise ConfigError(f"stages holds {shown(dict(given))}; give tokens, and of {', '.join(names[1:])} some")
            return cls(**given)
        found = FORM.fullmatch(given) if isinstance(given, str) else None
        if found is None:
            raise ConfigError(f"stages holds {shown(given)}; give {TEXTS}, or flexasl.Stage(tokens=...)")
        tokens, first, last = found.groups()
        bounds = {} if first is None else {"min_layer": int(first), "max_layer": int(last or first)}
        return cls(tokens=float(tokens) if "." in tokens else int(tokens), **bounds)

    @classmethod
    def several(cls, given: Any) -> tuple[Stage, ...]:
        """The stages of a list, or of a text with `+` between them; `"none"` and `""` are none."""
        if isinstance(given, str):
            given = [] if given in ("", "none") else given.split("+")
        elif isinstance(given, (Stage, Mapping)):
            given = [given]
        if not isinstance(given, (list, tuple)):
            raise ConfigError(f"stages={shown(given)} is not a list; give a list of {TEXTS}, or None")
        return tuple(cls.of(one) for one in given)

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return f"Stage({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __str__(self) -> str:
        if self.min_layer is None or self.max_layer is None:
            return f"{self.tokens}"
        layers = f"{self.min_layer}" + (f"-{self.max_layer}" if self.max_layer > self.min_layer else "")
        return f"{self.tokens}@{layers}"
