"""A prompt as HTML: runs of tokens that the same became of, with a shade for each selection that they passed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from flexasl.page.writing import safe
from flexasl.prompt_text import pieces
from flexasl.report import RowReport, Spans

FOLDED = 60
"""Dropped tokens in a row from which on their middle is folded away."""
EDGE = 12
"""Tokens at both ends of such a run that stay."""
FOLD = '<input type="checkbox" class="fold"'
LIGHTEST, DARKEST = 14, 44
"""Shades of tokens, in percent: dropped by the second selection, and kept by all."""


class _Run(NamedTuple):
    start: int
    stop: int
    passed: int
    """Selections."""
    asks: bool
    """Whether its queries ranked."""
    image: int | None = None
    folded: bool = False


def marked(row: RowReport, tokenizer: Any, ids: Sequence[int]) -> str:
    """The prompt's text, HTML that keeps its line ends."""
    runs = list(_folded(_runs(row)) if shade_count(row) else _runs(row))
    texts = pieces(tokenizer, ids, [0, *(run.stop for run in runs)])
    return "".join(_html(run, text, row) for run, text in zip(runs, texts, strict=True))


def legend(row: RowReport) -> str:
    """What the marks mean, with the tokens of each."""
    selections = spans_of(row)
    if not selections:
        why = "No token was dropped." if not row.pruned else "The report has no record of which tokens were kept."
        return f"<p>{why}</p>\n"
    left = [row.prompt_tokens, *(sum(stop - start for start, stop in spans) for spans in selections)]
    layers = [selection.layer for selection in row.selections][-len(selections) :]
    lines = [
        f'<li><span class="k{passed}">dropped at layer {layer}</span>: {left[passed] - left[passed + 1]:,} tokens</li>'
        for passed, layer in enumerate(layers)
    ]
    lines.append(f'<li><mark class="k{len(layers)}">kept</mark>: {left[-1]:,} tokens</li>')
    if row.ranking_spans:
        lines.append('<li><span class="asks">ranked the others</span></li>')
    return f'<ul class="legend s{shade_count(row)}">{"".join(lines)}</ul>\n'


def shade_count(row: RowReport) -> int:
    """How many shades of kept tokens the row has; none where no token was dropped, or it is not known which."""
    return len(row.selections) if spans_of(row) else 0


def shades(rows: Iterable[RowReport]) -> str:
    """Style rules of the marks of these rows."""
    rules = []
    for count in sorted({len(row.selections) for row in rows} - {0}):
        for passed in range(1, count + 1):
            share = 1.0 if count == 1 else (passed - 1) / (count - 1)
            percent = round(LIGHTEST + (DARKEST - LIGHTEST) * share)
            rules.append(f".flexasl .s{count} .k{passed} {{ --shade: {percent}%; }}\n")
    return "".join(rules)


def spans_of(row: RowReport) -> tuple[Spans, ...]:
    """What is kept below each selection; of a report that does not have this, below the last one alone, where that is
    known."""
    if row.selection_spans or not row.selections or not row.kept_positions:
        return row.selection_spans
    places = enumerate(row.kept_positions)
    runs = (list(run) for _, run in groupby(places, key=lambda place: place[1] - place[0]))
    return (tuple((run[0][1], run[-1][1] + 1) for run in runs),)


def _runs(row: RowReport) -> Iterable[_Run]:
    """Neighbouring tokens that the same became of."""
    passed, asks = [0] * row.prompt_tokens, [False] * row.prompt_tokens
    images: list[int | None] = [None] * row.prompt_tokens
    selections = spans_of(row)
    first = len(row.selections) - len(selections)
    for number, spans in enumerate(selections, first + 1):
        for start, stop in spans:
            passed[start:stop] = [number] * (stop - start)
    for start, stop in row.ranking_spans:
        asks[start:stop] = [True] * (stop - start)
    for index, image in enumerate(row.images):
        images[image.first : image.first + image.tokens] = [index] * image.tokens
    # Of an image's tokens, one number tells what became of them.
    fates = ((one, ask, None) if at is None else (0, False, at) for one, ask, at in zip(passed, asks, images))
    start = 0
    for fate, tokens in groupby(fates):
        stop = start + sum(1 for _ in tokens)
        yield _Run(start, stop, *fate)
        start = stop


def _folded(runs: Iterable[_Run]) -> Iterable[_Run]:
    """The same, with the middle of long runs of dropped tokens apart."""
    for run in runs:
        if run.passed or run.image is not None or run.stop - run.start <= FOLDED:
            yield run
            continue
        first, last = run.start + EDGE, run.stop - EDGE
        yield run._replace(stop=first)
        yield run._replace(start=first, stop=last, folded=True)
        yield run._replace(start=last)


def _html(run: _Run, text: str, row: RowReport) -> str:
    if run.image is not None:
        image = row.images[run.image]
        return f'<span class="image">image: {image.kept_tokens:,} of {image.tokens:,} tokens kept</span>'
    tokens, shown = run.stop - run.start, safe(text)
    if run.folded:
        label = f"{tokens:,} dropped tokens"
        return f'{FOLD} data-label="{label}" aria-label="Show {label}"><s>{shown}</s>'
    kind = f"k{run.passed}{' asks' if run.asks else ''}"
    if run.passed:
        return f'<mark class="{kind}">{shown}</mark>'
    return f'<span class="asks">{shown}</span>' if run.asks else shown
