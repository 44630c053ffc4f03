"""Tables of the grid's answers: `docs/results/README.md`, its pictures, and the part of README.md that is about them.

The same answers give the same bytes. Settings of all methods stand in `bench/grid.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import (
    BEHIND,
    GROUPS,
    LENGTHS,
    SQUAD,
    VARIANTS,
    Cells,
    Row,
    Times,
    better,
    beyond,
    by_model,
    prompt,
    rows_of,
    side_by_side,
    within_reach,
)
from pictures import picture, picture_of_endings, picture_of_layers

from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.tables import FLOOR, Record, table

BEGIN, END = "<!-- made by bench/grid.py page -->", "<!-- end -->"


Missing = Mapping[str, Sequence[str]]
"""By step of `bench/grid.py`, cells that were left out."""


def write_pages(cells: Cells, root: Path, times: Times, missing: Missing | None = None) -> None:
    """Writes the page, its pictures, and README's part."""
    folder = root / "docs" / "results"
    models = by_model(cells)
    (folder / "README.md").write_text(results_page(cells, times, missing), encoding="utf-8")
    drawn = {
        "grid": picture({model: rows_of(kinds) for model, kinds in models.items()}),
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


def results_page(cells: Cells, times: Times, missing: Missing | None = None) -> str:
    """The page of all results."""
    parts = [
        "# Results",
        "Scores of every method at its counted cost, on prompts that no setting was chosen on. `python bench/grid.py "
        "page` makes this page from the answers in [grid](grid).",
        "- Answers are greedy. A score is a mean over tasks, with a 95 % bootstrap interval over prompts\n"
        "  (over tasks where each has one prompt).\n"
        '- A cell reads "score [interval] at cost". The cost is the counted operations of the prefill, as a share of '
        "the full prefill.\n"
        "- **Its paper's settings**: those of the method's paper, scaled to the model's depth.\n"
        '- **With our pooling**: the same with `kernel_size=17`, `pooling="phrase"`.\n'
        "- **With our ranking**: the same with our pooling, and with scores by the question's queries: their highest "
        "weights, less what the same head gives from the text before the question.\n"
        "- **FlexASL** is [the default rule](../defaults.md). [Rank variance](variance.md) has results of the former "
        "rule.\n"
        "- SnapKV and StreamingLLM keep the same entries, and give the same answers, as [kvpress's own "
        "code](../benchmarks/peers.md).\n"
        "- [Likelihoods](../benchmarks/likelihood-smollm2.md) of summaries and code are on a page of their own.",
        "![Accuracy against the cost of the prefill](grid.png)",
    ]
    models = by_model(cells)
    if picture_of_layers(models) is not None:
        parts.append("![Where prompts of each group were cut](layers.png)")
    for model, kinds in models.items():
        own = {name: times[name] for name, (_, told, _) in cells.items() if name in times and _model(told) == model}
        parts += [*_model_part(model, kinds), *_times_part(kinds, own)]
    if picture_of_endings(models) is not None:
        parts.append("![The effect of text after the question on each method](behind.png)")
    left_out = [
        f"- `python bench/grid.py {step} {' '.join(names)}`" for step, names in (missing or {}).items() if names
    ]
    if left_out:
        parts += [
            "## Left out",
            "For want of time on two cores, not for what they might show. These commands add them (`run`) and measure "
            "times (`time`):",
            "\n".join(left_out),
        ]
    parts += ["## Commands", *(_command(name, cell, told) for name, (cell, told, _) in cells.items())]
    return "\n\n".join(parts) + "\n"


SHORT = {
    "SmolLM2-135M-Instruct": "SmolLM2 135M",
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": "Qwen2.5-Coder 0.5B",
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf": "Qwen2.5-Coder 1.5B",
    "gemma-3-270m-q4_k_m.gguf": "Gemma 3 270M",
}
"""Names of models as README's table has them."""


def readme_part(cells: Cells) -> str:
    """README's table: methods by model; of each method the scores of all variants, and the cost."""
    models = by_model(cells)
    rows: dict[str, list[str]] = {}
    for place, kinds in enumerate(models.values()):
        for rows_alike in _by_method(within_reach(rows_of(kinds))).values():
            first = rows_alike[0]
            alone = first.method.ours or first.method.begins == FULL
            by_kind = {row.kind: f"{row.score().mean:.2f}" for row in rows_alike}
            scores = list(by_kind.values()) if alone else [by_kind.get(kind, "–") for kind in list(VARIANTS)[:3]]
            cost = max(row.cost for row in rows_alike)
            name = first.title if alone else first.name
            rows.setdefault(name, ["–"] * len(models))[place] = f"{' / '.join(scores)} at {cost:.2f}"
    return table(["", *(SHORT.get(model, model) for model in models)], [[name, *told] for name, told in rows.items()])


def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """README's rows, those of a method's variants together; FlexASL with a profile and without are two."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not row.method.layers and not (row.method.ours and "kv_budget" in row.name):
            found.setdefault(row.title if row.method.ours else row.name, []).append(row)
    return found


def _model_part(model: str, kinds: dict[str, list[Record]]) -> list[str]:
    rows = rows_of(kinds)
    lost, reached = beyond(rows), within_reach(rows)
    prompts = {kind: len({prompt(record) for record in records}) for kind, records in kinds.items()}
    parts = [f"## {model}, 2,048 tokens, 256 of them selected"]
    counted = ", ".join(f"{prompts[kind]} {name}" for kind, name in VARIANTS.items() if kind in prompts)
    parts.append(f"Prompts: {counted}.")
    if lost:
        named = ", ".join(f"`{task}` ({mean:.2f})" for task, mean in lost.items())
        parts.append(f"Too hard for this model (its full cache scores under {FLOOR}), and left out of means: {named}.")
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
    parts.append(
        f"Better than FlexASL's default at no greater cost (the interval of the difference excludes 0): {told}."
    )
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
    parts += _columns_part("By the text after the question, all ranked by the question", kinds, BEHIND)
    parts += _columns_part("By length of the prompt, all ranked by the question", kinds, LENGTHS)
    return parts + (_columns_part("Reading comprehension, ranked by the question", kinds, SQUAD, least=1))


def _times_part(kinds: dict[str, list[Record]], times: Times) -> list[str]:
    """Counted cost, time and memory of the first prompt, beside each other."""
    measured = {name.rpartition("-")[2]: told for name, told in times.items()}
    lines = []
    for row in rows_of(kinds):
        found = measured.get(row.kind, {"settings": {}})["settings"].get(row.setting)
        if found is not None:
            shares = [f"{found[name]:.2f}" for name in ("counted", "share", "peak", "kv")]
            lines.append([row.title, VARIANTS[row.kind], *shares])
    if not lines:
        return []
    told = next(iter(measured.values()))
    heads = ["method", "settings", "counted cost", "time to the first token", "peak memory above the model", "KV cache"]
    about = (
        f"Measured on the first prompt of {told['tokens']:,} tokens, as shares of the unpatched model's in the same "
        f"run (medians of pairs; {told['hardware']}, {told['versions']}, commit {told['commit']}; `{told['command']}`):"
    )
    return [about, table(heads, lines)]


def _columns_part(title: str, kinds: Mapping[str, list[Record]], names: Mapping[str, str], least: int = 2) -> list[str]:
    """Cells of several kinds, where so many are there, on the prompts that all of them have; methods that at least two
    of them have."""
    columns = side_by_side(kinds, names, least)
    own = [kind for kind in names if any(kind in rows for rows in columns.values())]
    lines = [
        [name, *(rows[kind].told() if kind in rows else "–" for kind in own)]
        for name, rows in columns.items()
        if len(rows) >= min(2, len(own))
    ]
    if not lines:
        return []
    records = next(iter(columns.values()))[own[0]].records
    tasks = len({one["task"] for one in records})
    counted = f"{len(records)} prompts of {tasks} task{'s' * (tasks > 1)} within the model's reach"
    return [f"{title}; {counted}:", table(["method", *(names[kind] for kind in own)], lines)]


def _rules_part(kinds: dict[str, list[Record]]) -> list[str]:
    """The effect of some 60 tokens of rules after the question."""
    with_rules = rows_of({"paper": kinds["rules"]})
    tasks = {record["task"] for record in kinds["rules"]}
    usual = {row.name: row.of(tasks) for row in rows_of({"paper": kinds["paper"]})}
    lines = [[row.name, usual[row.name].told() if row.name in usual else "–", row.told()] for row in with_rules]
    heads = ["method", "the question last, the answer begun", "60 tokens of rules after it"]
    return [
        "With 60 tokens of rules after the question, each method ranking as in its paper, on five tasks:",
        table(heads, lines),
    ]


def _model(told: Mapping[str, Any]) -> str:
    return str(told["identity"]["model"])


def _command(name: str, cell: Any, told: dict[str, Any]) -> str:
    about = told["about"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}, Python {about['python']}"
    return f"`{name}`, commit {told['commit']}, {about['device']}, {versions}:\n\n```\n{cell.command()}\n```"
