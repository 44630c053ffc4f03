"""Methods of the grid, and what each made of a model's prompts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.tables import FLOOR, Estimate, Record, bootstrap

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
    "ranking": "nothing after it",
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

    @property
    def setting(self) -> str:
        return str(self.records[0]["setting"])

    def of(self, tasks: Iterable[str]) -> Row:
        """The same on some tasks."""
        tasks = set(tasks)
        return self._replace(records=[record for record in self.records if record["task"] in tasks])

    def score(self) -> Estimate:
        return estimate(self.records)

    def told(self) -> str:
        return f"{self.score()} at {self.cost:.2f}" if self.records else "–"


Cells = Mapping[str, tuple[Any, dict[str, Any], list[Record]]]
"""By name, the cell, what it was run with, and its answers."""
Times = Mapping[str, Mapping[str, Any]]
"""By the name of a cell, what `bench/grid.py time` stored of it."""


def by_model(cells: Cells) -> dict[str, dict[str, list[Record]]]:
    """By model and kind of cell, the answers, of models that have been asked at 2,048 tokens."""
    models: dict[str, dict[str, list[Record]]] = {}
    for name, (_, told, records) in cells.items():
        models.setdefault(told["identity"]["model"], {})[name.rpartition("-")[2]] = records
    return {model: kinds for model, kinds in models.items() if kinds.keys() & VARIANTS.keys()}


def rows_of(kinds: Mapping[str, list[Record]]) -> list[Row]:
    """Those of a model, in the order of `METHODS`; the full cache once."""
    rows: list[Row] = []
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


def within_reach(rows: Sequence[Row]) -> list[Row]:
    """Without the tasks on which the full cache scores under `FLOOR`."""
    lost = beyond(rows)
    return [row.of({record["task"] for record in row.records} - set(lost)) for row in rows]


def beyond(rows: Sequence[Row]) -> dict[str, float]:
    """Tasks on which the full cache scores under `FLOOR`, and its score."""
    full = next(row for row in rows if row.method.begins == FULL)
    means = {task: statistics.fmean(scores) for task, scores in scores_by_task(full.records).items()}
    return {task: mean for task, mean in means.items() if mean < FLOOR}


def better(rows: Sequence[Row]) -> list[str]:
    """What answers more than FlexASL's default at no greater cost, beyond the interval of the difference by prompt."""
    rows = [row for row in rows if row.records]
    ours = next((row for row in rows if row.method.begins == "asl@" and row.kind == "ranking"), None)
    found = []
    for row in rows if ours else ():
        if ours is not None and not row.method.ours and row.cost <= ours.cost + ALIKE:
            known = {prompt(record): record["score"] for record in ours.records}
            both = [record for record in row.records if prompt(record) in known]
            apart = [{**record, "score": record["score"] - known[prompt(record)]} for record in both]
            if apart and estimate(apart).low > 0:
                found.append(f"{row.name} {VARIANTS[row.kind]} ({row.told()}, ours {ours.told()})")
    return found


def side_by_side(
    kinds: Mapping[str, list[Record]], names: Mapping[str, str], least: int = 2
) -> dict[str, dict[str, Row]]:
    """By method and kind of cell, where so many kinds are there, the answers to prompts that all of them have, without
    the tasks that the full cache cannot do in the first of them."""
    own = {kind: kinds[kind] for kind in names if kind in kinds}
    if len(own) < least:
        return {}
    shared = set.intersection(*({(one["task"], one["index"]) for one in records} for records in own.values()))
    lost = beyond(rows_of({"ranking": next(iter(own.values()))}))
    shared = {(task, index) for task, index in shared if task not in lost}
    columns: dict[str, dict[str, Row]] = {}
    for kind, records in own.items():
        for row in rows_of({"ranking": [one for one in records if (one["task"], one["index"]) in shared]}):
            columns.setdefault(row.title, {})[kind] = row
    return columns


def _method(setting: str) -> Method:
    """That of a setting: the one whose beginning is longest."""
    return max((one for one in METHODS if setting.startswith(one.begins)), key=lambda one: len(one.begins))


def _layers(setting: str) -> str:
    """What the name of a setting says of layers."""
    return setting.partition(":")[2].rpartition("@")[0].partition(",kernel_size")[0]


def scores_by_task(records: Iterable[Record]) -> dict[str, list[float]]:
    """Scores by task."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["task"], []).append(record["score"])
    return found


def estimate(records: Iterable[Record]) -> Estimate:
    """Mean over tasks, and its interval by prompt: within each task, or over all of them where each has one prompt."""
    tasks = list(scores_by_task(records).values())
    return bootstrap(
        [[score for scores in tasks for score in scores]] if all(len(scores) == 1 for scores in tasks) else tasks
    )


def prompt(record: Record) -> tuple[str, int, int]:
    return record["task"], record["length"], record["index"]
