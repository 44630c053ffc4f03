"""The picture of a calibration: shares held and answered against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexasl.tools.calibration.checking import CHOSEN, DEFAULT, FULL, mean_cost, mean_score
from flexasl.tools.calibration.choosing import Judged

if TYPE_CHECKING:
    from flexasl.tools.calibration.evidence import Calibration

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#666666", "#2f855a"
MARKS = {DEFAULT: ("s", 60, GREEN), CHOSEN: ("*", 190, ORANGE)}


def draw(made: Calibration) -> Figure:
    """Left what was replayed, a point for each candidate, right what was answered."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _draw_replayed(left, made)
    _draw_answered(right, made)
    for axes in (left, right):
        axes.set_xlabel("cost: operations of the prefill / full prefill")
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlim(right=1.02)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"{made.about['model']}, select_tokens={made.config.select_tokens}", fontsize=11)
    return figure


def _draw_replayed(axes: Axes, made: Calibration) -> None:
    def point(one: Judged) -> tuple[float, float]:
        return one.cost, one.held / len(made.prompts)

    axes.set_title(f"replayed: {len(made.prompts)} prompts that the choice was made on", loc="left", fontsize=10)
    axes.set_ylabel("share of prompts, held or answered")
    line = [point(one) for one in made.fixed_layers]
    axes.plot(*zip(*line), color=GREY, linewidth=1, marker=".", markersize=3, label="fixed layers", zorder=1)
    costs, shares = zip(*map(point, made.candidates))
    axes.scatter(costs, shares, s=22, color=BLUE, alpha=0.25, linewidths=0, label="candidates", zorder=2)
    for name, one in ((DEFAULT, made.default), (CHOSEN, made.chosen)):
        _mark(axes, name, *point(one))


def _draw_answered(axes: Axes, made: Calibration) -> None:
    axes.set_title(f"answered: {len(made.checked)} other prompts", loc="left", fontsize=10)
    full = mean_score(made.answers[FULL])
    axes.axhline(full, color=GREY, linewidth=1, linestyle="--")
    axes.text(0.01, full, "full cache", transform=axes.get_yaxis_transform(), fontsize=9, color=GREY, va="bottom")
    for name in (DEFAULT, CHOSEN):
        _mark(axes, name, mean_cost(made.answers[name]), mean_score(made.answers[name]))


def _mark(axes: Axes, name: str, cost: float, share: float) -> None:
    marker, size, color = MARKS[name]
    axes.scatter(cost, share, s=size, marker=marker, color=color, edgecolors="white", label=name, zorder=3)
