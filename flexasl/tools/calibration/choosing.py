"""The settings that are tried, and which of them is taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flexasl.config import ASLConfig
from flexasl.stages import Stage
from flexasl.tools.calibration.tables import Outcome

SETTINGS = ("score_from", "stages", "min_layer", "max_layer", "tau")
"""What calibration looks for."""
TAUS = (0.4, 0.5, 0.6)
STAGE_TOKENS = (0.25, 0.5)
STARTS, STAGE_SPAN = (1 / 8, 1 / 6, 1 / 4), 1 / 12
"""Depths, as shares of the layers, from which a stage is tried, and how much later it comes at the latest."""
APART = 1 / 8
"""Share of the layers that lie between the first layers of the stage and of the final selection, at least: small models
misread what is cut at once."""
FIRST, LAST = (1 / 3, 5 / 12, 1 / 2), (0.5, 0.6, 0.7, 0.8)
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
    return config.replace(settled_by="lookup", observe_layers=None, variance_reference=None, **settings_of(ASLConfig()))


def candidates(config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> list[ASLConfig]:
    """Rules to try, resolved, the default first. Of the config everything but `SETTINGS` stays."""
    ranking_layers = list(range(num_layers) if ranking_layers is None else ranking_layers)
    depth = len(ranking_layers)
    default = default_of(config).resolve(num_layers, ranking_layers)
    assert default.tau and default.min_layer is not None and default.max_layer is not None
    firsts = _places(FIRST, depth, ranking_layers.index(default.min_layer))
    lasts = _places(LAST, depth, ranking_layers.index(default.max_layer))
    found = {tuple(settings_of(default).values()): default}
    for stage, first, last, tau in itertools.product(_stages(ranking_layers), firsts, lasts, TAUS):
        opening = None if stage is None else stage.min_layer
        if last < first or (opening is not None and ranking_layers.index(opening) + max(1, int(APART * depth)) > first):
            continue
        for since in sorted({0, num_layers // 6, num_layers // 3}):
            rule = config.replace(
                score_from=since,
                stages=() if stage is None else (stage,),
                min_layer=ranking_layers[first],
                max_layer=ranking_layers[last],
                tau=tau,
            ).resolve(num_layers, ranking_layers)
            found.setdefault(tuple(settings_of(rule).values()), rule)
    return list(found.values())


def _stages(ranking_layers: Sequence[int]) -> list[Stage | None]:
    """The loose stages to try, None for no such stage."""
    depth, made = len(ranking_layers), {}
    for tokens, start in itertools.product(STAGE_TOKENS, STARTS):
        first = min(int(start * depth), depth - 1)
        last = min(first + max(1, round(STAGE_SPAN * depth)), depth - 1)
        stage = Stage(tokens=tokens, min_layer=ranking_layers[first], max_layer=ranking_layers[last])
        made[str(stage)] = stage
    return [None, *made.values()]


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
    numbers = [abs(mine[name] - theirs[name]) for name in SETTINGS if name != "stages"]
    return (sum(mine[name] != theirs[name] for name in SETTINGS), *numbers)


def _places(shares: Sequence[float], depth: int, default: int) -> list[int]:
    return sorted({default, *(min(int(share * depth), depth - 1) for share in shares)})
