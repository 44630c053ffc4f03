"""Pictures of the grid's answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from methods import BEHIND, GROUPS, METHODS, VARIANTS, Row, prompt, side_by_side, within_reach

from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.tables import Record

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan", "tab:gray")
"""Of other methods than ours, which is red."""


def picture(models: Mapping[str, list[Row]]) -> Figure:
    """Score against cost, a panel for each model; a method's settings are joined."""
    figure = Figure(figsize=(6 * len(models) + 2.5, 5), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (model, rows) in zip(panels, models.items(), strict=True):
        for place, method in enumerate(METHODS):
            found = [row for row in within_reach(rows) if row.method is method and row.kind in VARIANTS]
            if not found or (method.ours and "kv_budget" in method.name):
                continue
            color = "black" if method.begins == FULL else "crimson" if method.ours else COLORS[place % len(COLORS)]
            costs, scores = [row.cost for row in found], [row.score().mean for row in found]
            axes.plot(costs, scores, color=color, linewidth=1, alpha=0.0 if method.layers else 0.5)
            for row in found:
                starred = method.ours or method.begins == FULL
                fill = color if starred else {"paper": "none", "pooling": "white"}.get(row.kind, color)
                shape, size = ("*", 15) if starred else ("o", 7)
                style = {"marker": shape, "markersize": size, "markerfacecolor": fill, "linestyle": ":"}
                axes.plot([row.cost], [row.score().mean], color=color, **style)
            axes.plot([], [], color=color, marker="o", linestyle="", label=method.name.replace("*", ""))
        axes.set(title=model, xlabel="counted cost of the prefill / full", xlim=(0, 1.05), ylim=(-0.02, 1.02))
    panels[0].set_ylabel("score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(
        "Hollow: at the paper's settings, filled: with our ranking; stars: full cache and FlexASL", fontsize=10
    )
    return figure


def picture_of_layers(models: Mapping[str, dict[str, list[Record]]]) -> Figure | None:
    """Where FlexASL's default cut the prompts of each group: loosely in pale, finally in full color."""
    cut = {
        model: [one for one in kinds.get("ranking", ()) if one["setting"].startswith("asl@") and one["selections"]]
        for model, kinds in models.items()
    }
    cut = {model: records for model, records in cut.items() if records}
    if not cut:
        return None
    figure = Figure(figsize=(6 * len(cut), 4), layout="constrained")
    for axes, (model, records) in zip(figure.subplots(1, len(cut), squeeze=False)[0], cut.items(), strict=True):
        groups = {name: [one for one in records if one["task"] in tasks] for name, tasks in GROUPS.items()}
        groups = {name: own for name, own in groups.items() if own}
        for place, own in enumerate(groups.values()):
            for number, record in enumerate(sorted(own, key=prompt)):
                height = place + 0.12 * (number % 5 - 2)
                *loose, final = (made["layer"] for made in record["selections"])
                axes.plot([*loose, final], [height] * (len(loose) + 1), color="crimson", linewidth=0.8, alpha=0.4)
                axes.plot(loose, [height] * len(loose), "o", color="crimson", alpha=0.35, markersize=6)
                axes.plot([final], [height], "o", color="crimson", markersize=6)
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.set(title=model, xlabel="layer", xlim=(-0.5, records[0]["num_layers"] - 0.5))
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle("Where prompts were cut: loosely (pale) and finally, a line for each prompt", fontsize=10)
    return figure


def picture_of_endings(models: Mapping[str, dict[str, list[Record]]]) -> Figure | None:
    """What text behind the question does to each method, where that was asked."""
    told = {model: side_by_side(kinds, BEHIND) for model, kinds in models.items()}
    told = {model: columns for model, columns in told.items() if columns}
    if not told:
        return None
    figure = Figure(figsize=(6 * len(told) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(told), sharey=True, squeeze=False)[0]
    for axes, (model, columns) in zip(panels, told.items(), strict=True):
        kinds = [kind for kind in BEHIND if any(kind in rows for rows in columns.values())]
        joined = {title: rows for title, rows in columns.items() if len(rows) > 1}
        for place, (title, rows) in enumerate(joined.items()):
            seen = [kind for kind in kinds if kind in rows]
            style: dict[str, Any] = (
                {"color": "black"} if title == "full cache" else {"color": COLORS[place % len(COLORS)]}
            )
            style |= {"color": "crimson", "linewidth": 2.5} if rows[seen[0]].method.ours else {}
            scores = [rows[kind].score().mean for kind in seen]
            axes.plot([kinds.index(kind) for kind in seen], scores, marker="o", label=title.replace("*", ""), **style)
        axes.set_xticks(range(len(kinds)), [BEHIND[kind] for kind in kinds], rotation=20, ha="right")
        axes.set(title=model, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure
