"""The figures of one row of a report, as SVG: what the rule saw, what layers read and stored, what was kept where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from flexasl.page.marking import spans_of
from flexasl.page.writing import safe
from flexasl.report import Report, RowReport
from flexasl.stages import threshold

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 190, 48, 8, 12, 34
"""Of a figure and its margins, in units that are about a pixel on a narrow screen."""
BINS = 100
"""Parts of a prompt whose share of kept tokens is drawn."""

Point = tuple[float, float]


class _Axes:
    """Places in a figure for values from `first` to `last` and from 0 to `top`."""

    def __init__(self, first: float, last: float, top: float) -> None:
        self.first, self.last, self.top = first, max(last, first + 1), top or 1.0

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.first) / (self.last - self.first), 1)

    def y(self, value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / self.top), 1)

    def drawn(self, below: str) -> str:
        """The axes, with their numbers, and what the lower one counts."""
        lines = []
        for value in ticks(0, self.top):
            lines.append(f'<path class="grid" d="M{LEFT} {self.y(value)}H{WIDTH - RIGHT}"/>')
            lines.append(f'<text x="{LEFT - 6}" y="{self.y(value) + 4}" text-anchor="end">{value:,g}</text>')
        for value in ticks(self.first, self.last, whole=True):
            lines.append(f'<text x="{self.x(value)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:,g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        return "".join(lines) + f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{below}</text>'

    def line(self, points: Iterable[Point], kind: str) -> str:
        """A line through those of the points that are numbers."""
        places = " ".join(f"{self.x(x)},{self.y(min(y, self.top))}" for x, y in points if math.isfinite(y))
        return f'<polyline class="{kind}" points="{places}"/>' if places else ""

    def bar(self, first: float, last: float, low: float, high: float, kind: str) -> str:
        left, top = self.x(first), self.y(high)
        wide, tall = round(self.x(last) - left, 1), round(self.y(low) - top, 1)
        return f'<rect class="{kind}" x="{left}" y="{top}" width="{wide}" height="{tall}"/>'


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * 0.999)
    step = max(1.0, step) if whole else step
    start = math.ceil(low / step - 1e-9)
    return [round(at * step, 10) for at in range(start, math.floor(high / step + 1e-9) + 1)]


def curve(report: Report, row: RowReport) -> str:
    """What the rule saw by layer, what it asked for, and the layers that selected."""
    if not row.eval_layers:
        return ""
    values = row.lookup or row.variance_ratio
    tau = report.config.get("tau")
    asked: list[Sequence[Point]] = [
        [(layer, threshold(tau, first, layer)) for layer in range(first, min(last + 1, report.num_layers))]
        for tau, first, last in (report.thresholds if row.lookup else ())
    ]
    if not row.lookup and tau is not None:
        asked = [[(0, tau), (report.num_layers - 1, tau)]]
    seen = list(zip(row.eval_layers, values))
    finite = [y for line in (seen, *asked) for _, y in line if math.isfinite(y)]
    axes = _Axes(0, report.num_layers - 1, 1.08 * max(finite, default=1.0))
    parts = [axes.drawn("layer")]
    for selection in row.selections:
        at = axes.x(selection.layer)
        parts.append(f'<path class="chosen" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>')
    parts += [axes.line(line, "asked") for line in asked]
    parts.append(axes.line(seen, "seen"))
    chosen = {selection.layer for selection in row.selections}
    for layer, value in seen:
        if math.isfinite(value):
            kind, size = ("dot chosen", 5) if layer in chosen else ("dot", 2.5)
            parts.append(f'<circle class="{kind}" cx="{axes.x(layer)}" cy="{axes.y(value)}" r="{size}"/>')
    name = "highest score of a far token" if row.lookup else "rank variance / reference"
    keys = [("seen", name), ("asked", "threshold")] if asked else [("seen", name)]
    if chosen:
        keys.append(
            ("chosen", f"selected at layer{'s' if len(chosen) > 1 else ''} {', '.join(map(str, sorted(chosen)))}")
        )
    return _figure(row.curve_title, "".join(parts), keys)


def layers(report: Report, row: RowReport, note: str) -> str:
    """Tokens that each layer read, and entries that its cache has."""
    if not row.layer_tokens and not any(report.kv_tokens):
        return ""
    axes = _Axes(-0.5, report.num_layers - 0.5, max((row.prompt_tokens, *report.kv_tokens)))
    bars = [axes.bar(at - 0.5, at + 0.5, 0, count, "read") for at, count in enumerate(row.layer_tokens)]
    bars += [axes.bar(at - 0.25, at + 0.25, 0, count, "held") for at, count in enumerate(report.kv_tokens) if count]
    keys = [("read", "tokens that the layer read")] if row.layer_tokens else []
    if any(report.kv_tokens):
        rows = ", of the longest row" if len(report.rows) > 1 else ""
        keys.append(("held", f"entries that each head of its cache has{rows}"))
    return _figure("What did each layer read and store?", axes.drawn("layer") + "".join(bars), keys, note)


def places(row: RowReport) -> str:
    """Which share of each part of the prompt passed each selection."""
    selections = spans_of(row)
    if not selections:
        return ""
    bins = min(BINS, row.prompt_tokens)
    edges = [row.prompt_tokens * at // bins for at in range(bins + 1)]
    axes, parts = _Axes(0, row.prompt_tokens, 1.0), []
    for number, spans in enumerate(selections, len(row.selections) - len(selections) + 1):
        marks = bytearray(row.prompt_tokens)
        for start, stop in spans:
            marks[start:stop] = b"\1" * (stop - start)
        for first, last in pairwise(edges):
            share = sum(marks[first:last]) / (last - first)
            parts.append(axes.bar(first, last, 0, share, f"bin k{number}") if share else "")
    bars = f'<g class="s{len(row.selections)}">{"".join(parts)}</g>'
    keys = [(f"bin k{len(row.selections)}", "kept")]
    if len(selections) > 1:
        keys.insert(0, ("bin k1", f"left after layer {row.selections[0].layer}"))
    return _figure(
        "Where in the prompt are the kept tokens?", axes.drawn("position") + bars, keys, kind=f"s{len(row.selections)}"
    )


def _figure(title: str, drawing: str, keys: Iterable[tuple[str, str]], note: str = "", kind: str = "") -> str:
    listed = "".join(f'<li><span class="key {kind}"></span>{safe(words)}</li>' for kind, words in keys)
    below = f"<p>{safe(note)}</p>" if note else ""
    return (
        f"<figure{f' class={kind!r}' if kind else ''}><figcaption>{safe(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)}">{drawing}</svg>'
        f"<ul>{listed}</ul>{below}</figure>\n"
    )
