"""Pictures of an evaluation. Each function returns a matplotlib figure, or None where there is nothing to show."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexasl.picture import GREY, draw_thresholds
from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.sources import DEPTHS
from flexasl.tools.evaluation.tables import Estimate, Record, Results

NEEDLE = "needle"
PALE = "#dddddd"
SIZES, FULL_SIZE = (6.0, 12.0), 20.0
"""Of markers, in points: smallest and largest budget, and the unpatched model."""
MARKERS = "os^Dvp<>hX"
COLUMNS = 3


def pareto(results: Results) -> Figure:
    """Score against the cost of the prefill, measured where it was and counted, on tasks within the model's reach."""
    results = results.within_reach()
    figure = Figure(figsize=(12 if results.timed else 7.5, 5.5), layout="constrained")
    panels = figure.subplots(1, 2 if results.timed else 1, sharey=True, squeeze=False)[0]
    scores = {setting: results.score(results.of(setting=setting)) for setting in results.settings}
    seconds, operations = {}, {}
    for setting in results.settings:
        records = results.of(setting=setting)
        if results.timed:
            seconds[setting] = statistics.median(results.seconds_share(record) for record in records)
        operations[setting] = statistics.fmean(record["counted_prefill"] for record in records)
    seconds = {name: share for name, share in seconds.items() if math.isfinite(share)}  # else its full cache is missing
    if seconds:
        _pareto(panels[0], "measured: seconds to the first token / full cache", seconds, scores)
    _pareto(panels[-1], "counted: operations of the prefill / full cache", operations, scores)
    panels[0].set_ylabel("score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def heat_map(results: Results) -> Figure | None:
    """Score by length and depth of the one needle, a panel for each setting."""
    placed = [record for record in results.records if record["depth"] is not None]
    records = [record for record in placed if record["task"] == NEEDLE] or placed
    if not records:
        return None
    exact = records[0]["task"] == NEEDLE
    depths = sorted({record["depth"] for record in records}) if exact else list(DEPTHS)
    lengths = sorted({record["length"] for record in records})
    cells: dict[tuple[str, int, int], list[float]] = {}
    for record in records:
        row = min(range(len(depths)), key=lambda index: abs(depths[index] - record["depth"]))
        cells.setdefault((record["setting"], row, lengths.index(record["length"])), []).append(record["score"])
    settings = [setting for setting in results.settings if any(key[0] == setting for key in cells)]
    figure, panels = _panels(settings, 2.6)
    image: Any = None
    for setting, axes in panels:
        grid = np.full((len(depths), len(lengths)), np.nan)
        for (label, row, column), scores in cells.items():
            if label == setting:
                grid[row, column] = statistics.fmean(scores)
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            axes.text(column, row, "" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth")
    figure.colorbar(image, ax=figure.axes, label="score")
    what = "the needle task" if exact else "tasks with one needle, by nearest depth"
    figure.suptitle(f"Found by length and depth: {what}", fontsize=11)
    return figure


def chosen_layers(results: Results) -> Figure | None:
    """How often each layer was chosen, by task, a panel for each setting that chose by the prompt: not always the same
    layers, where any setting is such. Layers of loose selections are pale."""
    choices = {
        name: {tuple(one["layer"] for one in record["selections"]) for record in results.of(setting=name)}
        for name in results.settings
    }
    chose = {name for name, layers in choices.items() if layers != {()}}
    if not chose:
        return None
    chose = {name for name in chose if len(choices[name]) > 1} or chose
    colors = _colors(results.tasks)
    figure, panels = _panels([setting for setting in results.settings if setting in chose], 2.8)
    for setting, axes in panels:
        records = results.of(setting=setting)
        layers = max(record["num_layers"] for record in records)
        below = np.zeros(layers)
        for task, final in itertools.product(results.tasks, (True, False)):
            made = [[one["layer"] for one in record["selections"]] for record in records if record["task"] == task]
            picked = [layer for all_ in made for layer in (all_[-1:] if final else all_[:-1])]
            if not picked:
                continue
            counts = np.bincount(picked, minlength=layers)
            bars = {"label": task} if final else {"alpha": 0.4}
            axes.bar(range(layers), counts, bottom=below, color=colors[task], width=0.9, **bars)
            below = below + counts
        never = sum(not record["selections"] for record in records)
        if never:
            axes.text(0.02, 0.95, f"none chosen: {never}", transform=axes.transAxes, va="top", fontsize=8, color=GREY)
        axes.set_xlim(-0.5, layers - 0.5)
        axes.set_ylim(0, 1.15 * below.max())
        axes.locator_params(integer=True)
        axes.set_xlabel("layer chosen")
        axes.set_ylabel("prompts")
    return _with_legend(figure, "Layer that selected, by task")


def decisions(results: Results) -> Figure | None:
    """What the rule saw by layer (look-up, or variance ratio): each prompt thin, with a dot where it selected, each
    task's median thick, a panel for each setting that compared layers."""
    taken = {record["setting"] for record in results.records if len(record["eval_layers"]) > 1}
    if not taken:
        return None
    colors = _colors(results.tasks)
    figure, panels = _panels([setting for setting in results.settings if setting in taken], 2.8)
    for setting, axes in panels:
        for task in results.tasks:
            _curves(axes, results.of(setting=setting, task=task), colors[task], task)
        looked = [record for record in results.of(setting=setting) if record["eval_layers"]]
        stages = next((record["thresholds"] for record in looked if record["thresholds"]), None)
        tau = next((record["tau"] for record in looked), None)
        if stages is not None:
            draw_thresholds(axes, stages, looked[0]["num_layers"])
        elif tau is not None:
            axes.axhline(tau, color=GREY, linestyle="--", linewidth=1, label="tau")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layer")
        lookup = any(record["lookup"] for record in looked)
        axes.set_ylabel("highest score of a far token" if lookup else "rank variance / reference")
    return _with_legend(figure, "When is it time to select? Thin: prompts, dots: selections; thick: median of a task")


def _pareto(axes: Axes, what: str, costs: dict[str, float], scores: dict[str, Estimate]) -> None:
    """A colour for each policy with its settings, whose budgets are joined by dots, and a size for each budget. A pale
    band joins the settings that no other beats."""
    families: dict[str, list[str]] = {}
    for setting in costs:
        families.setdefault(setting.rpartition("@")[0] or setting, []).append(setting)
    colors, sizes = _colors(list(families)), _sizes(list(costs))
    for place, (family, settings) in enumerate(families.items()):
        unpatched = family == FULL
        color, shape = ("black", "*") if unpatched else (colors[family], MARKERS[place % len(MARKERS)])
        found = [scores[setting] for setting in settings]
        means, spent = [score.mean for score in found], [costs[setting] for setting in settings]
        ends = [[mean - score.low, score.high - mean] for mean, score in zip(means, found)]
        spread = np.maximum(np.transpose(ends), 0)
        axes.errorbar(spent, means, spread, fmt=":", color=color, linewidth=1, elinewidth=0.8, capsize=2, zorder=2)
        areas = [FULL_SIZE**2 if unpatched else sizes[_budget(setting)] ** 2 for setting in settings]
        axes.scatter(spent, means, areas, color=color, marker=shape, edgecolors="white", linewidths=0.5, zorder=3)
        axes.plot([], [], f"{shape}:", color=color, markersize=13 if unpatched else 7, label=family)
    best = sorted(
        (cost, scores[setting].mean)
        for setting, cost in costs.items()
        if not any(_beats(costs[other], scores[other].mean, cost, scores[setting].mean) for other in costs)
    )
    axes.plot(*zip(*best), color=PALE, linewidth=8, marker="o", markersize=16, zorder=1, label="beaten by none")
    if len(sizes) > 1:
        for budget, size in sizes.items():
            axes.plot([], [], "o", color=GREY, markersize=size, label=f"budget {budget}")
    axes.set_xlabel(what)
    axes.set_xlim(max(0, math.floor(10 * min(costs.values())) / 10 - 0.05), max(1.0, *costs.values()) + 0.04)
    axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)


def _sizes(settings: list[str]) -> dict[str, float]:
    """A marker's size for each budget, the smallest budget first."""
    budgets = sorted({_budget(setting) for setting in settings if setting != FULL}, key=float)
    least, most = SIZES
    sizes = np.linspace(least, most, len(budgets)) if len(budgets) > 1 else [(least + most) / 2]
    return dict(zip(budgets, map(float, sizes)))


def _budget(setting: str) -> str:
    return setting.rpartition("@")[2]


def _beats(cost: float, score: float, other_cost: float, other_score: float) -> bool:
    return cost <= other_cost and score >= other_score and (cost, score) != (other_cost, other_score)


def _curves(axes: Axes, records: list[Record], color: Any, task: str) -> None:
    by_layer: dict[int, list[float]] = {}
    for record in records:
        seen = zip(record["eval_layers"], record["lookup"] or record["variance_ratio"])
        points = {at: value for at, value in seen if value is not None}
        axes.plot(list(points), list(points.values()), color=color, linewidth=0.5, alpha=0.35)
        chosen = [one["layer"] for one in record["selections"] if one["layer"] in points]
        axes.plot(chosen, [points[at] for at in chosen], ".", color=color, markersize=5)
        for at, value in points.items():
            by_layer.setdefault(at, []).append(value)
    if by_layer:
        layers = sorted(by_layer)
        axes.plot(layers, [statistics.median(by_layer[at]) for at in layers], color=color, linewidth=2, label=task)


def _panels(settings: list[str], height: float) -> tuple[Figure, list[tuple[str, Axes]]]:
    columns = min(COLUMNS, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(4 * columns + 2, height * rows + 0.6), layout="constrained")
    panels = []
    for place, setting in enumerate(settings):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(setting, fontsize=10, loc="left")
        panels.append((setting, axes))
    return figure, panels


def _with_legend(figure: Figure, title: str) -> Figure:
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _colors(names: list[str]) -> dict[str, Any]:
    """The ten strong colours first, then their ten pale ones."""
    palette = colormaps["tab20"]
    return {name: palette((2 * place + place // 10) % 20) for place, name in enumerate(names)}
