"""From stored answers to tables in Markdown. The same answers give the same bytes, whatever the order they came in."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexasl.stages import threshold
from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.tasks import TASKS

FLOOR = 0.3
"""A full cache that scores less is lost on the task, which then says nothing of what pruning does."""
BY_OTHERS = re.compile(r"the last (?:\d+ tokens|token)(?:;|$)|tokens that policy ")
"""How `RowReport.ranked_by` begins where no question ranked."""
RESAMPLES = 2000
SEED = 0

Record = dict[str, Any]


class Estimate(NamedTuple):
    """A mean score and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Results:
    """Stored answers, sorted, with the unpatched model's beside each."""

    def __init__(self, records: Iterable[Record]) -> None:
        order = {name: place for place, name in enumerate(TASKS)}
        self.records = sorted(
            records,
            key=lambda record: (
                order.get(record["task"], len(order)),
                record["length"],
                record["index"],
                *_setting_order(record),
            ),
        )
        self.tasks = list(dict.fromkeys(record["task"] for record in self.records))
        self.lengths = sorted({record["length"] for record in self.records})
        by_label = {record["setting"]: record for record in self.records}
        self.settings = sorted(by_label, key=lambda label: _setting_order(by_label[label]))
        self._full = {_prompt(record): record for record in self.records if record["setting"] == FULL}

    @property
    def timed(self) -> bool:
        """Whether seconds were measured, which those are not that were answered together."""
        return all(record["first_token_seconds"] is not None for record in self.records)

    def of(self, **wanted: Any) -> list[Record]:
        """The records with these values."""
        return [record for record in self.records if all(record[name] == value for name, value in wanted.items())]

    def beyond(self) -> dict[tuple[str, int], float]:
        """Tasks, with a length, that are beyond the model: the unpatched model's mean score there, under `FLOOR`."""
        cells: dict[tuple[str, int], list[float]] = {}
        for record in self._full.values():
            cells.setdefault((record["task"], record["length"]), []).append(record["score"])
        means = {cell: statistics.fmean(scores) for cell, scores in sorted(cells.items())}
        return {cell: mean for cell, mean in means.items() if mean < FLOOR}

    def within_reach(self) -> Results:
        """Without what is beyond the model; all of it where nothing else is there."""
        beyond = self.beyond()
        left = [record for record in self.records if (record["task"], record["length"]) not in beyond]
        return Results(left) if beyond and left else self

    def score(self, records: Sequence[Record]) -> Estimate:
        """Mean score: over the samples of each task and length, then over these."""
        cells: dict[tuple[str, int], list[float]] = {}
        for record in records:
            cells.setdefault((record["task"], record["length"]), []).append(record["score"])
        return bootstrap(list(cells.values()))

    def seconds_share(self, record: Record) -> float:
        """Seconds to the first token, as a share of the unpatched model's for the same prompt; NaN without that."""
        full = self._full.get(_prompt(record))
        return record["first_token_seconds"] / full["first_token_seconds"] if full else math.nan


def bootstrap(cells: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the cells' means, and its 95 % percentile bootstrap interval: samples are drawn anew within each cell.

    The seed is fixed. Where all samples of every cell agree, so do the interval's ends: it says nothing about prompts
    unlike those sampled.
    """
    rng = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for cell in cells:
        scores = np.asarray(cell, dtype=np.float64)
        means += scores[rng.integers(len(scores), size=(RESAMPLES, len(scores)))].mean(1)
    low, high = np.percentile(means / len(cells), [2.5, 97.5])
    return Estimate(statistics.fmean(statistics.fmean(cell) for cell in cells), float(low), float(high))


def score_tables(results: Results) -> str:
    """Scores and counted costs, over everything and by length and task."""
    parts = ["## All tasks and lengths", *_lost(results), _overview(results)]
    for length in results.lengths:
        at_length = Results(results.of(length=length))
        parts += [f"## {length:,} tokens", *([_overview(at_length)] if len(results.lengths) > 1 else [])]
        parts.append(_by_task(at_length))
    return "\n\n".join(parts) + "\n"


def time_tables(results: Results) -> str:
    """Measured seconds of the prefill, by length and setting."""
    rows = []
    for length in results.lengths:
        for setting in results.settings:
            if records := results.of(length=length, setting=setting):
                seconds = [record["first_token_seconds"] for record in records]
                shares = [results.seconds_share(record) for record in records]
                whole = [record["total_seconds"] for record in records]
                rows.append(
                    [f"{length:,}", setting, len(records), _middle(seconds), _middle(shares), _counted(records)]
                    + [_middle(whole)]
                )
    heads = ["tokens", "setting", "prompts", "first token, s", "share of full", "counted share", "whole answer, s"]
    return table(heads, rows) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _lost(results: Results) -> list[str]:
    """A sentence on what is beyond the model, where anything is."""
    beyond = results.beyond()
    if not beyond:
        return []
    named = ", ".join(f"`{task}` at {length:,} tokens ({mean:.2f})" for (task, length), mean in beyond.items())
    left_out = "left out of means over several tasks and of the first picture"
    averaged = left_out if results.within_reach() is not results else "with nothing else to average"
    return [f"**Beyond this model**, whose full cache scores under {FLOOR}: {named}; {averaged}."]


def _overview(results: Results) -> str:
    results, rows = results.within_reach(), []
    for setting in results.settings:
        records = results.of(setting=setting)
        selected = sum(bool(record["selections"]) for record in records)
        score, kv = results.score(records), statistics.fmean(record["kv_share"] for record in records)
        row = [setting, score, _counted(records), f"{kv:.2f}", _layers(records), f"{selected}/{len(records)}"]
        rows.append([*row, _share(map(_by_max_layer, records)), _share(map(_by_question, records))])
    heads = ["setting", "score", "counted prefill", "KV cache", "layers chosen", "selected", "by max_layer"]
    return table([*heads, "ranked by the question"], rows)


def _layers(records: Sequence[Record]) -> str:
    """Median, lowest and highest layer of each selection, the final one last."""
    made = [[selection["layer"] for selection in record["selections"]] for record in records]
    parts = []
    for place in range(max(map(len, made), default=0), 0, -1):
        at = [layers[-place] for layers in made if len(layers) >= place]
        spread = f" ({min(at)}–{max(at)})" if min(at) < max(at) else ""
        parts.append(f"{statistics.median_low(at)}{spread}")
    return ", ".join(parts if len(parts) < 4 else [parts[0], "…", parts[-1]]) or "–"


def _by_max_layer(record: Record) -> bool | None:
    """Whether the last selection was made because the layers for it ended, and not for what the rule saw; None where
    that is not known."""
    layer, values = record["selected_layer"], record["lookup"] or record["variance_ratio"]
    seen = dict(zip(record["eval_layers"], values)).get(layer)
    if seen is None or record["tau"] is None:
        return None
    if not record["lookup"]:
        return bool(seen >= record["tau"])
    stages = [(tau, first) for tau, first, last in record["thresholds"] if first <= layer <= last]
    return all(seen < threshold(tau, first, layer) for tau, first in stages)


def _by_question(record: Record) -> bool | None:
    """Whether the question ranked the tokens; None where nothing did."""
    return BY_OTHERS.match(record["ranked_by"]) is None if record["ranked_by"] else None


def _share(held: Iterable[bool | None]) -> str:
    """Of how many that are known it holds."""
    known = [one for one in held if one is not None]
    return f"{sum(known)}/{len(known)}" if known else "–"


def _by_task(results: Results) -> str:
    by_task = {task: Results(results.of(task=task)) for task in results.tasks}
    heads = ["setting"]
    for task, of_task in by_task.items():
        tokens = round(statistics.fmean(record["prompt_tokens"] for record in of_task.records))
        heads.append(f"{task}, {tokens:,} tokens")
    rows = []
    for setting in results.settings:
        found = [of_task.of(setting=setting) for of_task in by_task.values()]
        rows.append([setting, *(f"{results.score(some)} of {len(some)}" if some else "–" for some in found)])
    return table(heads, rows)


def _counted(records: Sequence[Record]) -> str:
    return f"{statistics.fmean(record['counted_prefill'] for record in records):.2f}"


def _middle(values: Sequence[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _prompt(record: Record) -> tuple[str, int, int]:
    return record["task"], record["length"], record["index"]


def _setting_order(record: Record) -> tuple[bool, str, float]:
    """The unpatched model first, then by policy, then by budget."""
    return record["setting"] != FULL, record["policy"], record["budget"] or 0
