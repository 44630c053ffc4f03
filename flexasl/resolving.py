"""Defaults that depend on the model: what `ASLConfig.resolve` fills in, for either rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from flexasl.config import (
    LONE_STAGE_TOKENS,
    LOOKUP_SCORES,
    LOOKUP_TAUS,
    OWN_SCORES,
    PUBLISHED_SCORES,
    STAGE_TOKENS,
    ASLConfig,
)
from flexasl.errors import ConfigError
from flexasl.stages import Stage, threshold


class _RankingLayers:
    """The layers that attend to the whole prompt, ascending, of so many."""

    def __init__(self, layers: Sequence[int], num_layers: int) -> None:
        self.layers, self.num_layers = layers, num_layers

    def from_on(self, layer: int) -> int:
        """The first of them from this one on, else the last."""
        return next((one for one in self.layers if one >= layer), self.layers[-1])

    def up_to(self, name: str, layer: int) -> int:
        """The last of them up to this one, which is the setting of that name."""
        if layer < self.layers[0]:
            self.refuse(name, layer)
        return [one for one in self.layers if one <= layer][-1]

    def quarter(self, start: int) -> int:
        """The last of them in the first quarter of the stack, no earlier than this one."""
        return max([start, *(one for one in self.layers if one <= self.num_layers // 4)])

    def refuse(self, name: str, layer: int) -> NoReturn:
        raise ConfigError(
            f"{name}={layer} leaves no layer to select at; layers with full attention are "
            f"{', '.join(map(str, self.layers))} of {self.num_layers}"
        )


def resolve_lookup(config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None) -> ASLConfig:
    """The rule of look-ups for a stack; ranking_layers are not empty."""
    among = _RankingLayers(range(num_layers) if ranking_layers is None else ranking_layers, num_layers)
    opens = among.from_on(num_layers // 8 if config.score_from is None else config.score_from)
    last = None if config.max_layer is None else among.up_to("max_layer", config.max_layer)
    if config.min_layer is None:
        first = max(among.from_on(num_layers // 3), opens)
        first = first if last is None else min(first, last)
    else:
        first = among.from_on(config.min_layer)
        if first < config.min_layer or (last is not None and last < first):
            among.refuse("min_layer", config.min_layer)
    if last is None:
        last = max(first, among.up_to("max_layer", max(7 * (num_layers - 1) // 10, first)))
    config = config.scored(LOOKUP_SCORES)
    tau, loose = LOOKUP_TAUS[str(config.pooling)]
    if config.min_layer is None:
        tau = max(0.01, round(threshold(tau, num_layers // 3, first), 3))
    unasked = config.min_layer_unasked
    if unasked is None:
        unasked = min(max(among.from_on(num_layers // 2), first), last)
    elif not first <= among.from_on(unasked) <= last:
        among.refuse("min_layer_unasked", unasked)
    stages = _stages(config, among, opens, last, loose)
    selects = min([first, *(stage.min_layer for stage in stages if stage.min_layer is not None)])
    if config.score_from is not None and config.score_from > selects:
        raise ConfigError(
            f"score_from={config.score_from} comes behind layer {selects}, from which on tokens are selected; give "
            f"at most {selects}"
        )
    return config.replace(
        settled_by="lookup",
        tau=tau if config.tau is None else config.tau,
        stages=stages,
        score_from=min(opens, selects),
        min_layer=first,
        min_layer_unasked=among.from_on(unasked),
        max_layer=last,
        if_never=config.if_never or "select",
    )


def _stages(config: ASLConfig, among: _RankingLayers, opens: int, last: int, tau: float) -> tuple[Stage, ...]:
    """The loose stages, the first from layer `opens` on, none after the last layer of the final selection; tau: that
    of stages which have none."""
    given = config.stages
    if given is None:
        lone = among.quarter(opens) == opens
        given = (Stage(tokens=LONE_STAGE_TOKENS if lone else STAGE_TOKENS),) if opens < last else ()
    made: list[Stage] = []
    before = among.layers[0]
    for stage in given:
        start, stop = stage.min_layer, stage.max_layer
        for name, layer in (("min_layer", start), ("max_layer", stop)):
            if layer is not None and layer >= among.num_layers:
                raise ConfigError(
                    f"stages: {name}={layer} is beyond the model, which has {among.num_layers} layers; give at most "
                    f"{among.num_layers - 1}"
                )
        stop = None if stop is None else max(among.up_to("stages: max_layer", stop), before)
        start = max(opens if start is None else among.from_on(start), before)
        start = start if stop is None else min(start, stop)
        if start > last and stage.min_layer is not None:
            raise ConfigError(
                f"stages: min_layer={stage.min_layer} comes after max_layer={last}, where the final selection is made "
                "at the latest; give a smaller one, or a greater max_layer"
            )
        if start > last:
            continue
        if stop is None:
            stop = among.quarter(start)
        least = tau if stage.tau is None else stage.tau
        made.append(Stage(tokens=stage.tokens, tau=least, min_layer=start, max_layer=stop))
        before = start
    return tuple(made)


def resolve_variance(config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None) -> ASLConfig:
    """The rule of rank variance for a stack; ranking_layers are not empty."""
    if ranking_layers is not None and len(ranking_layers) < num_layers:
        return _variance_among(config, num_layers, ranking_layers)
    paper = config.variance_reference == "initial"
    bounds = [bound for bound in (config.min_layer, config.max_layer) if bound is not None]
    observe, first, last, never = config.observe_layers, config.min_layer, config.max_layer, config.if_never
    if observe is None:
        observe = min(8 if paper else 4, max(2, num_layers // 3), num_layers, *(bound + 1 for bound in bounds))
    if first is None:
        start = num_layers // 3 if paper else 3 * num_layers // 8
        first = min(max(start, observe - 1), num_layers - 1, *bounds)
    if never is None:
        never = "keep" if last is None and paper else "select"
    if last is None:
        last = num_layers - 1 if paper else max(first, 7 * (num_layers - 1) // 10)
    return config.replace(
        settled_by="variance",
        variance_reference=config.variance_reference or "peak",
        tau=(0.3 if paper else 0.05) if config.tau is None else config.tau,
        stages=(),
        observe_layers=observe,
        min_layer=first,
        max_layer=last,
        if_never=never,
    ).scored(PUBLISHED_SCORES if paper else OWN_SCORES)


def _variance_among(config: ASLConfig, num_layers: int, ranking_layers: Sequence[int]) -> ASLConfig:
    """As for a stack of the ranking layers alone, whose bounds are then named as layers of the whole one."""
    bounds: dict[str, int | None] = {"min_layer": None, "max_layer": None}
    if config.min_layer is not None:
        bounds["min_layer"] = max(
            sum(layer < config.min_layer for layer in ranking_layers), (config.observe_layers or 1) - 1
        )
    if config.max_layer is not None:
        bounds["max_layer"] = sum(layer <= config.max_layer for layer in ranking_layers) - 1
    least = 0
    for name, place in bounds.items():
        if place is None:
            continue
        if not least <= place < len(ranking_layers):
            _RankingLayers(ranking_layers, num_layers).refuse(name, getattr(config, name))
        least = place
    found = config.replace(**bounds, calibrated_for=None).resolve(len(ranking_layers))
    assert found.min_layer is not None and found.max_layer is not None
    layers = {"min_layer": ranking_layers[found.min_layer], "max_layer": ranking_layers[found.max_layer]}
    return found.replace(**layers, calibrated_for=config.calibrated_for)
