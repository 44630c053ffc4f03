"""The settings that are tried, and which of them is taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flexasl.config import ASLConfig
from flexasl.tools.calibration.tables import Outcome

SETTINGS = ("min_layer", "max_layer", "tau", "observe_layers", "variance_reference", "select_on")
"""What calibration looks for."""
TAUS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
OBSERVED = (4, 8)
COMBINED = ("last", "max", "recent")
FIRST, LAST = (1 / 3, 1 / 2), (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
"""Depths of `min_layer` and `max_layer` that are tried, as shares of the layers."""
MANY = 10
"""Choosing prompts from which on a candidate may lose one more than the best, for being cheaper; one of fewer would be
too large a share."""
RULE = (
    "Of the candidates that keep the answer on as many of the choosing prompts as the best one does (or one fewer, "
    f"where there are at least {MANY} such prompts), the cheapest; of several such the one that keeps more, then the "
    "one with the fewest changes to the defaults."
)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A setting, and what it makes of every prompt."""

    name: str
    rule: ASLConfig | None
    """Resolved; None for a fixed layer, which its name tells."""
    outcomes: tuple[Outcome, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The values of `SETTINGS`."""
        return {} if self.rule is None else settings_of(self.rule)

    def kept(self, prompts: Sequence[int]) -> int:
        """On how many of these prompts the answer stays."""
        return sum(self.outcomes[at].kept for at in prompts)

    def cost(self, prompts: Sequence[int]) -> float:
        """Mean cost of these prompts."""
        return fmean(self.outcomes[at].cost for at in prompts)


def settings_of(rule: ASLConfig) -> dict[str, Any]:
    """The values of `SETTINGS`."""
    return {name: getattr(rule, name) for name in SETTINGS}


def default_of(config: ASLConfig) -> ASLConfig:
    """The config with all that calibration looks for at its default."""
    return config.replace(**settings_of(ASLConfig()))


def paper_of(config: ASLConfig) -> ASLConfig:
    """The config with the published rule."""
    return default_of(config).replace(
        settled_by="variance", variance_reference="initial", select_on="last", if_never="keep"
    )


def candidates(config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> list[ASLConfig]:
    """Rules to try, resolved, the default first. Of the config everything but `SETTINGS` stays."""
    ranking_layers = list(range(num_layers) if ranking_layers is None else ranking_layers)
    depth = len(ranking_layers)
    default = default_of(config).resolve(num_layers, ranking_layers)
    assert default.observe_layers and default.tau and default.min_layer is not None and default.max_layer is not None
    observed = sorted({default.observe_layers, *(count for count in OBSERVED if count <= depth // 2)})
    firsts = _places(FIRST, depth, ranking_layers.index(default.min_layer))
    lasts = _places(LAST, depth, ranking_layers.index(default.max_layer))
    taus = sorted({default.tau, *TAUS})
    found = {tuple(settings_of(default).values()): default}
    for count, first, last, tau in itertools.product(observed, firsts, lasts, taus):
        if not count - 1 <= first < last:
            continue
        for reference, on in itertools.product(("peak", "initial"), COMBINED):
            rule = config.replace(
                min_layer=ranking_layers[first],
                max_layer=ranking_layers[last],
                tau=tau,
                observe_layers=count,
                variance_reference=reference,
                select_on=on,
            ).resolve(num_layers, ranking_layers)
            found.setdefault(tuple(settings_of(rule).values()), rule)
    return list(found.values())


def choose(judged: Sequence[Judged], prompts: Sequence[int], default: ASLConfig | None = None) -> Judged:
    """The candidate to take by how they do on these prompts, by `RULE`; without a default, the first of equals."""
    enough = max(one.kept(prompts) for one in judged) - (len(prompts) >= MANY)

    def order(one: Judged) -> tuple[Any, ...]:
        far = () if default is None or one.rule is None else _distance(one.rule, default)
        return round(one.cost(prompts), 9), -one.kept(prompts), far

    return min((one for one in judged if one.kept(prompts) >= enough), key=order)


def _distance(rule: ASLConfig, default: ASLConfig) -> tuple[float, ...]:
    """How many settings differ, then how far the numbers are from the default's."""
    mine, theirs = settings_of(rule), settings_of(default)
    both = [(mine[name], theirs[name]) for name in SETTINGS if isinstance(theirs[name], (int, float))]
    numbers = [abs(one - other) for one, other in both]
    return (sum(mine[name] != theirs[name] for name in SETTINGS), *numbers)


def _places(shares: Sequence[float], depth: int, default: int) -> list[int]:
    return sorted({default, *(min(int(share * depth), depth - 1) for share in shares)})
