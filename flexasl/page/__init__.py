"""The page of a report: what was decided, as figures and numbers, and the prompt with the kept tokens marked.

Pages have no scripts and load nothing. All that comes from a prompt, a model or a file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from flexasl.checks import article, instance
from flexasl.errors import FlexASLError
from flexasl.page.figures import curve, layers, places
from flexasl.page.marking import FOLD, legend, marked, shade_count, shades
from flexasl.page.writing import safe
from flexasl.report import MIB, ROWS_IN_FULL, Report, RowReport, outcome, ranges

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser lets the page load: nothing."""


def page(report: Report, tokenizer: Any, ids: Any, answer: str | Sequence[str] | None = None) -> str:
    """`Report.to_html`."""
    if not callable(getattr(tokenizer, "decode", None)):
        raise FlexASLError(f"tokenizer is {article(tokenizer)}; give the model's tokenizer")
    prompts, answers = _prompts(report, tokenizer, ids), _answers(report, answer)
    rows = [
        _row(report, index, answers[index]) + _text(row, tokenizer, prompts[index])
        for index, row in enumerate(report.rows)
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>What was pruned: policy {safe(report.policy)}</title>\n{_style(report)}\n</head>\n"
        '<body class="flexasl-page">\n<main class="flexasl">\n<h1>What was pruned</h1>\n'
        f"{_facts(report)}{''.join(map(_section, rows))}{_settings(report)}</main>\n</body>\n</html>\n"
    )


def summary(report: Report) -> str:
    """What a notebook shows of a report, without the prompts' text: part of a page."""
    shown = range(min(len(report.rows), ROWS_IN_FULL))
    more = len(report.rows) - len(shown)
    rest = f"<p>... and {more} more row{'s' if more > 1 else ''}</p>" if more else ""
    rows = "".join(_section(_row(report, index)) for index in shown)
    return f'{_style(report)}<div class="flexasl">{_facts(report)}{rows}{rest}</div>'


def _prompts(report: Report, tokenizer: Any, ids: Any) -> list[list[int]]:
    """The ids of each row without padding."""
    given = _list(ids)
    if not any(isinstance(_list(row), list) for row in given or ()):
        given = [given]
    if not isinstance(ids, str) and given is not None and len(given) != len(report.rows):
        raise FlexASLError(f"ids has {len(given)} rows, where the report has {len(report.rows)}; give as many")
    prompts, padding = [], getattr(tokenizer, "pad_token_id", None)
    for index, row in enumerate(report.rows):
        own = None if given is None else _list(given[index])
        if own is None or not all(isinstance(one, int) for one in own):
            raise FlexASLError("ids does not hold token ids; give the ids of each row, as numbers")
        before = len(own) - row.prompt_tokens
        if before < 0 or any(one != padding for one in own[:before]):
            raise FlexASLError(
                f"ids has {len(own)} tokens in row {index}, where the report has {row.prompt_tokens}; give "
                "those that were read, with padding before them at most"
            )
        prompts.append(own[before:])
    return prompts


def _list(value: Any) -> list[Any] | None:
    """A tensor, an array or another sequence as a list; None for anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple)) else None


def _answers(report: Report, answer: str | Sequence[str] | None) -> Sequence[str | None]:
    if answer is None:
        return [None] * len(report.rows)
    answers = [answer] if isinstance(answer, str) else list(instance("answer", answer, (list, tuple), "a text"))
    if len(answers) != len(report.rows):
        raise FlexASLError(
            f"answer has {len(answers)} texts, where the report has {len(report.rows)} rows; give one for each"
        )
    return [instance("answer", one, str, "a text for each row") for one in answers]


def _style(report: Report) -> str:
    css = files("flexasl.page").joinpath("page.css").read_text(encoding="utf-8")
    return f"<style>\n{css}{shades(report.rows)}</style>"


def _section(content: str) -> str:
    return f"<section>\n{content}</section>\n"


def _list_of(facts: Iterable[tuple[str, str]]) -> str:
    """A list of names and values, which are HTML."""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value) + "</dl>\n"


def _facts(report: Report) -> str:
    """What holds for all rows."""
    return _list_of(
        [
            ("policy", safe(report.policy)),
            ("profile", safe(report.profile or "")),
            ("KV cache", safe(report.cache_size)),
            ("states", f"{report.state_bytes / MIB:,.1f} MiB" if report.state_bytes else ""),
            ("prefill", f"{report.prefill_seconds:.2f} s"),
        ]
    )


def _row(report: Report, index: int, answer: str | None = None) -> str:
    row = report.rows[index]
    images = ", ".join(f"{image.kept_tokens:,} of {image.tokens:,}" for image in row.images)
    title = f"<h2>Row {index}</h2>\n" if len(report.rows) > 1 else ""
    facts = [
        ("prompt", f"{row.prompt_tokens:,} tokens, {outcome(row, report.num_layers)}"),
        ("why", safe(row.reason)),
        ("ranked by", safe(row.ranked_by)),
        ("image tokens kept", images),
        ("answer", f'<div class="answer" lang="">{safe(answer)}</div>' if answer else ""),
    ]
    held = f"KV entries per head: {ranges(report.kv_tokens)}" if report.kv_tokens else ""
    figures = f"{curve(report, row)}{layers(report, row, held)}{places(row)}"
    return f'{title}{_list_of(facts)}<div class="figures">\n{figures}</div>\n'


def _text(row: RowReport, tokenizer: Any, ids: list[int]) -> str:
    text = marked(row, tokenizer, ids)
    fold = '<label class="all"><input type="checkbox" class="unfold"> Show dropped text</label>\n'
    return (
        f'<h3>The prompt</h3>\n{legend(row)}<div class="prompt">{fold if FOLD in text else ""}'
        f'<div class="text s{shade_count(row)}" lang="">{text}</div></div>\n'
    )


def _settings(report: Report) -> str:
    cells = "".join(
        f"<tr><th>{safe(str(name))}</th><td>{safe(str(value))}</td></tr>" for name, value in report.config.items()
    )
    return f"<details><summary>Settings</summary><table>{cells}</table></details>\n" if cells else ""
