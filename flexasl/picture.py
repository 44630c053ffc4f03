"""The picture of one row of a report: what the rule saw by layer, and where in the prompt the kept tokens lie."""

from __future__ import annotations

import bisect
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexasl.report import Report, RowReport, layers_of
from flexasl.stages import threshold
from flexasl.stored import visible

TITLE_TEXT = 80
"""Characters of the text that ranked."""
POSITION_BINS = 100
THRESHOLD = "threshold of each stage"
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#666666"


def draw(report: Report, row: int) -> Figure:
    """The row's picture."""
    chosen = report.rows[row]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_curve(above, chosen, report)
    _draw_positions(below, chosen)
    figure.suptitle(
        f"{visible(report.policy)}, row {row}: {chosen.kept_tokens:,} of {chosen.prompt_tokens:,} tokens kept, "
        f"KV cache {report.kv_share:.0%} of full"
        + (f"\nranked by: {visible(textwrap.shorten(chosen.ranked_by, TITLE_TEXT))}" if chosen.ranked_by else ""),
        fontsize=11,
        parse_math=False,
    )
    return figure


def draw_thresholds(axes: Axes, stages: Iterable[tuple[float, int, int]], layers: int) -> None:
    """What a look-up must reach at each layer, in stages as `Report.thresholds` has them."""
    for tau, first, last in stages:
        at = range(first, min(last + 1, layers))
        falling = [threshold(tau, first, layer) for layer in at]
        axes.plot(at, falling, color=GREY, linestyle="--", linewidth=1, marker="_", label=THRESHOLD)


def _draw_curve(axes: Axes, row: RowReport, report: Report) -> None:
    tau: Any = report.config.get("tau")
    name, values = ("look-up", row.lookup) if row.lookup else ("variance ratio", row.variance_ratio)
    axes.set_title(row.curve_title, loc="left", fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel("highest score of a far token" if row.lookup else "rank variance / reference")
    axes.set_xlim(-0.5, report.num_layers - 0.5)
    axes.locator_params(axis="x", integer=True)
    if row.eval_layers:
        axes.plot(row.eval_layers, values, marker="o", markersize=4, color=BLUE, label=name)
        if row.lookup:
            draw_thresholds(axes, report.thresholds, report.num_layers)
        elif tau is not None:
            axes.axhline(tau, color=GREY, linestyle="--", linewidth=1, label=f"tau = {tau:g}")
        axes.set_ylim(bottom=0)
    else:
        _say(axes, "the rule did not look at this row")
        axes.set_yticks([])
    if row.selected_layer is not None:
        for selection in row.selections[:-1]:
            axes.axvline(selection.layer, color=ORANGE, linewidth=1, linestyle=":")
        axes.axvline(row.selected_layer, color=ORANGE, linewidth=1.5, label=f"selected at {layers_of(row)}")
        seen = dict(zip(row.eval_layers, values))
        for selection in row.selections:
            if selection.layer in seen:
                axes.plot(selection.layer, seen[selection.layer], marker="o", markersize=9, color=ORANGE, zorder=3)
    named = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    if named:
        axes.legend(named.values(), named, loc="best", fontsize=9, frameon=False)


def _draw_positions(axes: Axes, row: RowReport) -> None:
    axes.set_title("Where in the prompt are the kept tokens?", loc="left", fontsize=10)
    axes.set_xlabel("prompt position (tokens)")
    axes.set_ylabel("share kept")
    axes.set_xlim(0, max(row.prompt_tokens, 1))
    axes.set_ylim(0, 1.05)
    if not row.kept_positions:
        _say(axes, "every token was kept" if not row.pruned else "no kept positions were recorded")
        return
    bins = min(POSITION_BINS, row.prompt_tokens)
    edges = [row.prompt_tokens * index // bins for index in range(bins + 1)]
    widths = [right - left for left, right in pairwise(edges)]
    # Each token weighs one over its bin's width, so that a bar is the share of the bin's tokens that was kept.
    weights = [1 / widths[bisect.bisect_right(edges, position) - 1] for position in row.kept_positions]
    axes.hist(row.kept_positions, bins=edges, weights=weights, color=BLUE)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
