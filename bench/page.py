"""Tables and pictures of the grid's answers: `docs/results/README.md` and the part of README.md that is about them.

The same answers give the same bytes. Settings of all methods stand in `bench/grid.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.tables import FLOOR, Estimate, Record, bootstrap, table

BEGIN, END = "<!-- made by bench/grid.py page -->", "<!-- end -->"
GROUPS = {
    "literal": ("niah_single_2", "niah_multikey_1", "number_string"),
    "long identifiers": ("niah_single_3",),
    "several values": ("niah_multivalue",),
    "variable tracking": ("vt",),
    "word counts": ("fwe",),
    "keys and values": ("kv_retrieval",),
    "by meaning": ("by_meaning",),
    "one of many alike": ("uniform",),
}
VARIANTS = {"paper": "its paper's settings", "pooling": "with our pooling", "ranking": "with our ranking"}
BEHIND = {
    "ranking": "nothing behind it",
    "behind30": "30 tokens",
    "behind60": "60 tokens",
    "behind120": "120 tokens",
    "front": "the question in front",
}
LENGTHS = {"ranking": "2,048 tokens", "4k": "4,096", "8k": "8,192", "16k": "16,384 (1,024 selected)"}
"""Kinds of cells that are set side by side."""
SQUAD = {"squad": "questions in SQuAD's format, over made-up articles"}
ALIKE = 0.005
"""Costs that differ by less are equal."""


class Method(NamedTuple):
    """One row: a method by the beginning of its setting's name, in the cells that have it."""

    name: str
    begins: str
    ours: bool = False
    layers: bool = False
    """Whether the rest of the setting's name says which layers."""


METHODS = (
    Method("full cache", FULL),
    Method("**FlexASL**", "asl@", ours=True),
    Method("**FlexASL**, `kv_budget` as large", "asl:kv_budget=", ours=True),
    Method("ASL's published rule", "paper"),
    Method("FastKV", "fixed_layer"),
    Method("fixed layer", "fixed_layer:layer=", layers=True),
    Method("two fixed layers", "asl:stages=", layers=True),
    Method("GemFilter", "gemfilter"),
    Method("PyramidInfer", "pyramid_infer"),
    Method("SnapKV", "snapkv"),
    Method("PyramidKV", "pyramid_kv"),
    Method("StreamingLLM", "streaming"),
)


class Row(NamedTuple):
    """What one method's setting made of a model's prompts."""

    method: Method
    name: str
    kind: str
    """Of its cell."""
    records: list[Record]

    @property
    def title(self) -> str:
        if self.method.ours:
            return f"{self.name}, {'its profile' if self.kind == 'paper' else 'default settings'}"
        return self.name

    @property
    def cost(self) -> float:
        return statistics.fmean(record["counted_prefill"] for record in self.records)

    @property
    def kv(self) -> float:
        return statistics.fmean(record["kv_share"] for record in self.records)

    def of(self, tasks: Iterable[str]) -> Row:
        """The same on some tasks."""
        tasks = set(tasks)
        return self._replace(records=[record for record in self.records if record["task"] in tasks])

    def score(self) -> Estimate:
        return bootstrap(list(_cells(self.records).values()))

    def told(self) -> str:
        return f"{self.score()} at {self.cost:.2f}" if self.records else "–"


Cells = Mapping[str, tuple[Any, dict[str, Any], list[Record]]]
"""By name, the cell, what it was run with, and its answers."""


def write_pages(cells: Cells, root: Path) -> None:
    """Writes the page, its picture, and README's part."""
    folder = root / "docs" / "results"
    models = _by_model(cells)
    (folder / "README.md").write_text(results_page(cells), encoding="utf-8")
    drawn = {
        "grid": picture({model: _rows(kinds) for model, kinds in models.items()}),
        "layers": picture_of_layers(models),
        "behind": picture_of_endings(models),
    }
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120)
    readme = root / "README.md"
    readme.write_text(with_part(readme.read_text(encoding="utf-8"), readme_part(cells)), encoding="utf-8")


def with_part(text: str, part: str) -> str:
    """A page with this between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def results_page(cells: Cells) -> str:
    """The page of all results."""
    parts = [
        "# Results",
        "Made of the answers in [grid](grid) by `python bench/grid.py page`. Greedy answers to prompts that no setting "
        "was chosen on. Scores are means over tasks, with 95 % bootstrap intervals by prompt; behind each stands the "
        "counted cost of the prefill, as a share of the full one. Every method runs at its paper's settings, scaled to "
        "the model's depth, with our pooling (`kernel_size=17`, `phrase`), and with our ranking (the question's "
        "queries, their highest weights less what the same head gives the text before it, and our pooling). FlexASL "
        "is [the default rule](../defaults.md); results of the former one are [here](variance.md). SnapKV and "
        "StreamingLLM here keep the entries, and give the answers, that [kvpress's own code](../benchmarks/peers.md) "
        "does. Summaries and code, by likelihood: [here](../benchmarks/likelihood-smollm2.md).",
        "![Accuracy against the cost of the prefill](grid.png)",
    ]
    models = _by_model(cells)
    if picture_of_layers(models) is not None:
        parts.append("![Where prompts of each group were cut](layers.png)")
    for model, kinds in models.items():
        parts += _model_part(model, kinds)
    if picture_of_endings(models) is not None:
        parts.append("![What text behind the question does to each method](behind.png)")
    parts += ["## Commands", *(_command(name, cell, told) for name, (cell, told, _) in cells.items())]
    return "\n\n".join(parts) + "\n"


def readme_part(cells: Cells) -> str:
    """README's table: methods by model."""
    models = _by_model(cells)
    rows: dict[str, list[str]] = {}
    for place, kinds in enumerate(models.values()):
        for row in within_reach(_rows(kinds)):
            if row.method.layers or (row.method.ours and "kv_budget" in row.name):
                continue
            ours = row.method.ours or row.method.begins == FULL
            name = row.title if ours else f"{row.name}, {VARIANTS[row.kind]}"
            rows.setdefault(name, ["–"] * len(models))[place] = f"{row.score().mean:.2f} at {row.cost:.2f}"
    return table(["", *models], [[name, *told] for name, told in rows.items()])


def picture(models: Mapping[str, list[Row]]) -> Figure:
    """Score against cost, a panel for each model; a method's settings are joined."""
    figure = Figure(figsize=(6 * len(models) + 2.5, 5), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (model, rows) in zip(panels, models.items(), strict=True):
        for place, method in enumerate(METHODS):
            found = [row for row in within_reach(rows) if row.method is method and row.kind in VARIANTS]
            if not found or (method.ours and "kv_budget" in method.name):
                continue
            color = "black" if method.begins == FULL else "crimson" if method.ours else f"C{place % 10}"
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
            for number, record in enumerate(sorted(own, key=_prompt)):
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
    told = {model: _columns(kinds, BEHIND) for model, kinds in models.items()}
    told = {model: columns for model, columns in told.items() if columns}
    if not told:
        return None
    figure = Figure(figsize=(6 * len(told) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(told), sharey=True, squeeze=False)[0]
    for axes, (model, columns) in zip(panels, told.items(), strict=True):
        kinds = [kind for kind in BEHIND if any(kind in rows for rows in columns.values())]
        for place, (title, rows) in enumerate(columns.items()):
            seen = [kind for kind in kinds if kind in rows]
            style: dict[str, Any] = {"color": "black"} if title == "full cache" else {"color": f"C{place}"}
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


def within_reach(rows: Sequence[Row]) -> list[Row]:
    """Without the tasks on which the full cache scores under `FLOOR`."""
    lost = beyond(rows)
    return [row.of({record["task"] for record in row.records} - set(lost)) for row in rows]


def beyond(rows: Sequence[Row]) -> dict[str, float]:
    """Tasks on which the full cache scores under `FLOOR`, and its score."""
    full = next(row for row in rows if row.method.begins == FULL)
    means = {task: statistics.fmean(scores) for task, scores in _cells(full.records).items()}
    return {task: mean for task, mean in means.items() if mean < FLOOR}


def better(rows: Sequence[Row]) -> list[str]:
    """What answers more than FlexASL's default at no greater cost, beyond the interval of the difference by prompt."""
    rows = [row for row in rows if row.records]
    ours = next((row for row in rows if row.method.begins == "asl@" and row.kind == "ranking"), None)
    found = []
    for row in rows if ours else ():
        if ours is not None and not row.method.ours and row.cost <= ours.cost + ALIKE:
            known = {_prompt(record): record["score"] for record in ours.records}
            both = [record for record in row.records if _prompt(record) in known]
            apart = [{**record, "score": record["score"] - known[_prompt(record)]} for record in both]
            if apart and bootstrap(list(_cells(apart).values())).low > 0:
                found.append(f"{row.name} {VARIANTS[row.kind]} ({row.told()}, ours {ours.told()})")
    return found


def _model_part(model: str, kinds: dict[str, list[Record]]) -> list[str]:
    rows = _rows(kinds)
    lost, reached = beyond(rows), within_reach(rows)
    prompts = {kind: len({_prompt(record) for record in records}) for kind, records in kinds.items()}
    parts = [f"## {model}, 2,048 tokens, 256 of them selected"]
    counted = ", ".join(f"{prompts[kind]} {name}" for kind, name in VARIANTS.items() if kind in prompts)
    parts.append(f"Prompts: {counted}.")
    if lost:
        named = ", ".join(f"`{task}` ({mean:.2f})" for task, mean in lost.items())
        parts.append(f"Beyond this model, whose full cache scores under {FLOOR}, and left out of means: {named}.")
    names = dict.fromkeys(row.title if row.method.ours else row.name for row in reached)
    lines = []
    for name in names:
        own = {row.kind: row for row in reached if name in (row.title, row.name)}
        some = next(iter(own.values()))
        if some.method.ours:
            own = {"ranking": some}
        lines.append([name, *(own[kind].told() if kind in own else "–" for kind in VARIANTS), f"{some.kv:.2f}"])
    parts.append(table(["method", *VARIANTS.values(), "KV cache"], lines))
    found = better(reached)
    groups = {name: tasks for name, tasks in GROUPS.items() if any(row.of(tasks).records for row in rows)}
    for name, tasks in groups.items():
        found += [f"{name}: {one}" for one in better([row.of(tasks) for row in reached])]
    told = "; ".join(found) if found else "none, over all groups and in each"
    parts.append(f"Better than FlexASL's default at no greater cost, beyond the interval of the difference: {told}.")
    shown = [row for row in rows if row.kind == "ranking" or row.method.ours or row.method.begins == FULL]
    lines = [
        [
            row.title,
            *(
                f"{some.score().mean:.2f} at {some.cost:.2f}" if (some := row.of(tasks)).records else "–"
                for tasks in groups.values()
            ),
        ]
        for row in shown
    ]
    parts += ["By group, with our ranking:", table(["method", *groups], lines)]
    if "rules" in kinds and "paper" in kinds:
        parts += _rules_part(kinds)
    parts += _side_by_side("By what stands behind the question, all ranked by it", kinds, BEHIND)
    parts += _side_by_side("By length of the prompt, all ranked by the question", kinds, LENGTHS)
    return parts + (_side_by_side("Reading comprehension, ranked by the question", kinds, SQUAD, least=1))


def _side_by_side(title: str, kinds: Mapping[str, list[Record]], names: Mapping[str, str], least: int = 2) -> list[str]:
    """Cells of several kinds, where so many are there, on the prompts that all of them have."""
    columns = _columns(kinds, names, least)
    own = [kind for kind in names if any(kind in rows for rows in columns.values())]
    lines = [
        [name, *(rows[kind].told() for kind in own)] for name, rows in columns.items() if len(rows) == len(own) and own
    ]
    if not lines:
        return []
    records = next(iter(columns.values()))[own[0]].records
    counted = f"{len(records)} prompts of {len({one['task'] for one in records})} tasks"
    return [f"{title}; {counted}:", table(["method", *(names[kind] for kind in own)], lines)]


def _columns(kinds: Mapping[str, list[Record]], names: Mapping[str, str], least: int = 2) -> dict[str, dict[str, Row]]:
    """By method and kind of cell, where so many kinds are there, the answers to prompts that all of them have."""
    own = {kind: kinds[kind] for kind in names if kind in kinds}
    if len(own) < least:
        return {}
    shared = set.intersection(*({(one["task"], one["index"]) for one in records} for records in own.values()))
    columns: dict[str, dict[str, Row]] = {}
    for kind, records in own.items():
        for row in _rows({"ranking": [one for one in records if (one["task"], one["index"]) in shared]}):
            columns.setdefault(row.title, {})[kind] = row
    return columns


def _rules_part(kinds: dict[str, list[Record]]) -> list[str]:
    """What some 60 tokens of rules behind the question do."""
    with_rules = _rows({"paper": kinds["rules"]})
    tasks = {record["task"] for record in kinds["rules"]}
    usual = {row.name: row.of(tasks) for row in _rows({"paper": kinds["paper"]})}
    lines = [[row.name, usual[row.name].told() if row.name in usual else "–", row.told()] for row in with_rules]
    heads = ["method", "the question last, the answer begun", "60 tokens of rules behind it"]
    return [
        "With 60 tokens of rules behind the question, each method ranking as in its paper, on five tasks:",
        table(heads, lines),
    ]


def _rows(kinds: Mapping[str, list[Record]]) -> list[Row]:
    """Those of a model, in the order of `METHODS`; the full cache once."""
    rows = []
    for method in METHODS:
        for kind in (one for one in VARIANTS if one in kinds):
            records = kinds[kind]
            for setting in dict.fromkeys(record["setting"] for record in records):
                if _method(setting) is not method or (method.begins == FULL and any(r.method is method for r in rows)):
                    continue
                name = f"{method.name} `{_layers(setting)}`" if method.layers else method.name
                own = [record for record in records if record["setting"] == setting]
                rows.append(Row(method, name, kind, own))
    return rows


def _layers(setting: str) -> str:
    """What the name of a setting says of layers."""
    return setting.partition(":")[2].rpartition("@")[0].partition(",kernel_size")[0]


def _method(setting: str) -> Method:
    """That of a setting: the one whose beginning is longest."""
    return max((one for one in METHODS if setting.startswith(one.begins)), key=lambda one: len(one.begins))


def _by_model(cells: Cells) -> dict[str, dict[str, list[Record]]]:
    """By model and kind of cell, the answers, of models that have been asked at 2,048 tokens."""
    models: dict[str, dict[str, list[Record]]] = {}
    for name, (_, told, records) in cells.items():
        models.setdefault(told["identity"]["model"], {})[name.rpartition("-")[2]] = records
    return {model: kinds for model, kinds in models.items() if kinds.keys() & VARIANTS.keys()}


def _command(name: str, cell: Any, told: dict[str, Any]) -> str:
    about = told["about"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}, Python {about['python']}"
    return f"`{name}`, commit {told['commit']}, {about['device']}, {versions}:\n\n```\n{cell.command()}\n```"


def _cells(records: Iterable[Record]) -> dict[str, list[float]]:
    """Scores by task."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["task"], []).append(record["score"])
    return found


def _prompt(record: Record) -> tuple[str, int, int]:
    return record["task"], record["length"], record["index"]
