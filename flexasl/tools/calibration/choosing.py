"""The settings that are tried, and which of them is taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flexasl.config import LONE_STAGE_TOKENS, ASLConfig
from flexasl.profiles import FOUND
from flexasl.stages import Stage
from flexasl.tools.calibration.tables import Outcome

SETTINGS = FOUND
"""What calibration looks for."""
TAUS = (0.75, 1.0, 1.5)
"""Thresholds that are tried, as shares of the default's."""
STAGE_TOKENS = (0.2, 0.3)
"""Shares that are tried. Where only one layer has ranked by then, that of the default: what one ranking costs shows in
answers, not in what is held."""
STARTS, STOPS = (1 / 8, 1 / 6), (1 / 6, 1 / 4, 1 / 3)
"""Depths, as shares of the layers, from which a stage is tried, and up to which."""
FIRST, LAST = (1 / 4, 1 / 3, 5 / 12, 1 / 2), (0.6, 0.7, 0.8)
"""Depths of `min_layer` and `max_layer` that are tried, as shares of the layers."""
MOST_WAITING = 1 / 4
"""Share of the prompts on which `max_layer` may decide."""
RULE = (
    "Chosen in this order: candidates that select at max_layer without a look-up on at most a quarter of the prompts "
    "(all candidates, if there is none); of these, candidates that cost no more than the defaults (all, if the best of "
    "them hold less than half as many answers as others); of these, candidates that hold the answer on most prompts, "
    "in the mean of a candidate and its neighbours, one step away in one setting; of these, the cheapest; of equally "
    "cheap ones, the one with the fewest changes to the defaults. If no candidate holds any answer, the default."
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

    @property
    def held(self) -> int:
        """On how many prompts the selection holds the answer."""
        return sum(outcome.held for outcome in self.outcomes)

    @property
    def cost(self) -> float:
        """Mean over prompts."""
        return fmean(outcome.cost for outcome in self.outcomes)

    @property
    def waited(self) -> int:
        """On how many prompts `max_layer` decided; a fixed layer waits for nothing."""
        return 0 if self.rule is None else sum(outcome.waited for outcome in self.outcomes)


def settings_of(rule: ASLConfig) -> dict[str, Any]:
    """The values of `SETTINGS`."""
    return {name: getattr(rule, name) for name in SETTINGS}


def default_of(config: ASLConfig) -> ASLConfig:
    """The config with all that calibration looks for at its default."""
    open_ = dict.fromkeys(("observe_layers", "variance_reference", "min_layer_unasked"))
    return config.replace(settled_by="lookup", **open_, **settings_of(ASLConfig()))


def candidates(config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> list[ASLConfig]:
    """Rules to try, resolved, the default first. Of the config everything but `SETTINGS` stays."""
    ranking_layers = list(range(num_layers) if ranking_layers is None else ranking_layers)
    depth = len(ranking_layers)
    default = default_of(config).resolve(num_layers, ranking_layers)
    assert default.score_from is not None and default.min_layer is not None and default.max_layer is not None
    assert default.tau is not None
    taus = [round(share * default.tau, 3) for share in TAUS]
    firsts = _places(FIRST, depth, ranking_layers.index(default.min_layer))
    lasts = _places(LAST, depth, ranking_layers.index(default.max_layer))
    found = {tuple(settings_of(default).values()): default}
    stages = [*_stages(ranking_layers), default.stages[0] if default.stages else None]
    firsts = [first for first in firsts if ranking_layers[first] > _opens(ranking_layers)] or firsts
    for stage, first, last, tau in itertools.product(stages, firsts, lasts, taus):
        opening = ranking_layers[first] if stage is None or stage.min_layer is None else stage.min_layer
        if last < first or opening > ranking_layers[first] or (stage is not None and last == first):
            continue
        for since in sorted({min(default.score_from, opening), opening}):
            rule = config.replace(
                min_layer_unasked=None,
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
    depth, made, opens = len(ranking_layers), {}, _opens(ranking_layers)
    for tokens, start, stop in itertools.product(STAGE_TOKENS, STARTS, STOPS):
        first, last = (ranking_layers[min(int(share * depth), depth - 1)] for share in (start, stop))
        stage = Stage(tokens=LONE_STAGE_TOKENS if last == opens else tokens, min_layer=first, max_layer=last)
        made[str(stage)] = stage
    return [None, *made.values()]


def _opens(ranking_layers: Sequence[int]) -> int:
    """The first layer whose scores count. Nothing final is selected there: one ranking holds as much, and is read
    worse."""
    return ranking_layers[int(STARTS[0] * len(ranking_layers))]


def choose(judged: Sequence[Judged], default: Judged | None = None) -> Judged:
    """The candidate to take, by `RULE`; without a default, the cheapest of those that hold most by themselves."""
    prompts = len(judged[0].outcomes)
    able = [one for one in judged if one.waited <= MOST_WAITING * prompts] or list(judged)
    if default is None or default.rule is None:
        most = max(one.held for one in able)
        return min((one for one in able if one.held == most), key=lambda one: round(one.cost, 9))
    steady = {id(one): held for one, held in zip(judged, _steady(judged), strict=True)}
    cheap = [one for one in able if one.cost <= default.cost]
    if cheap and 2 * max(one.held for one in cheap) >= max(one.held for one in able):
        able = cheap
    if not any(one.held for one in able):
        return default
    most_steady, rule = max(steady[id(one)] for one in able), default.rule

    def order(one: Judged) -> tuple[Any, ...]:
        return round(one.cost, 9), () if one.rule is None else _distance(one.rule, rule)

    return min((one for one in able if steady[id(one)] == most_steady), key=order)


def _steady(judged: Sequence[Judged]) -> list[float]:
    """On how many prompts each holds the answer, in the mean of itself and those one step away in one setting: one that
    holds more than all around it does so by chance."""
    settings = [_numbers(one.settings) for one in judged]
    levels = [{value: level for level, value in enumerate(sorted(set(values)))} for values in zip(*settings)]
    places = [tuple(level[value] for level, value in zip(levels, of_one)) for of_one in settings]
    held = {place: one.held for place, one in zip(places, judged, strict=True)}

    def around(place: tuple[int, ...]) -> list[int]:
        steps = [
            (*place[:axis], place[axis] + step, *place[axis + 1 :]) for axis in range(len(place)) for step in (-1, 1)
        ]
        return [held[one] for one in (place, *steps) if one in held]

    return [fmean(around(place)) for place in places]


def _numbers(settings: dict[str, Any]) -> tuple[float, ...]:
    """The settings as numbers, those of the stage too, -1 where there is none."""
    plain = [settings[name] for name in SETTINGS if name != "stages"]
    for stage in settings["stages"] or (None,):
        plain += [-1] * 3 if stage is None else [stage.tokens, stage.min_layer, stage.max_layer]
    return tuple(plain)


def _distance(rule: ASLConfig, default: ASLConfig) -> tuple[float, ...]:
    """How many settings differ, then how far the numbers are from the default's."""
    mine, theirs = settings_of(rule), settings_of(default)
    numbers = [abs(mine[name] - theirs[name]) for name in SETTINGS if name != "stages"]
    return (sum(mine[name] != theirs[name] for name in SETTINGS), *numbers)


def _places(shares: Sequence[float], depth: int, default: int) -> list[int]:
    return sorted({default, *(min(int(share * depth), depth - 1) for share in shares)})
