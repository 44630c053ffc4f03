"""What a pruned prefill decided and saved: as data, as text, as a picture and as a page."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

from flexasl.stored import NULL_IS_NAN, Count, Unfit, fit, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Number = Annotated[float, NULL_IS_NAN]
Spans = tuple[tuple[Count, Count], ...]
"""Runs of prompt positions, ascending: the first of each, and its last plus 1."""

THE_LAST = "the last "
"""How `RowReport.ranked_by` begins where no question ranked."""
MIB = 2**20
WIDTH = 100
ROWS_IN_FULL = 8
IMAGES_IN_FULL = 8
CURVE_COLUMNS = 11
LONGEST_TEXT = 300
"""Characters of the text that ranked, as a report prints it."""


class _Positions:
    """A field that is given a tuple, or a range for it, and is read as a tuple, which is made when it is first read: of
    a long prompt that was not pruned, 131,072 numbers that hardly anybody looks at."""

    def __get__(self, row: Any, owner: type | None = None) -> tuple[int, ...]:
        if row is None:
            return ()
        held: tuple[int, ...] = row.__dict__["kept_positions"]
        if not isinstance(held, tuple):
            held = row.__dict__["kept_positions"] = tuple(held)
        return held

    def __set__(self, row: Any, positions: Sequence[int]) -> None:
        row.__dict__["kept_positions"] = positions


class _Seconds:
    """A field that is given a number, or what measures it, and is measured when it is first read: on a GPU that waits
    for the end of what is timed."""

    def __get__(self, report: Any, owner: type | None = None) -> float:
        if report is None:
            raise AttributeError("prefill_seconds has no default")
        held = report.__dict__["prefill_seconds"]
        if callable(held):
            held = report.__dict__["prefill_seconds"] = held()
        seconds: float = held
        return seconds

    def __set__(self, report: Any, seconds: float | Callable[[], float]) -> None:
        report.__dict__["prefill_seconds"] = seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """One selection from a prompt."""

    layer: Count
    """Layer that selected, counted from 0."""
    kept_tokens: Count
    """Tokens that pass to deeper layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReport:
    """What became of an image or a video frame, or of a part of one that has text around it."""

    first: Count
    """Where its tokens begin in the prompt."""
    tokens: Count
    kept_tokens: Count
    """How many of them the last selection kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowReport:
    """What was decided for one prompt of the batch."""

    prompt_tokens: Count
    """Tokens of the prompt, padding excluded."""
    kept_tokens: Count
    """Tokens that pass to the layers after `selected_layer`; `prompt_tokens` where nothing was selected."""
    selected_layer: Count | None
    """The last layer that selected, counted from 0; None where nothing was selected."""
    reason: str
    """Why this layer, or why none: one sentence."""
    scored_layers: tuple[Count, ...] = ()
    """Layers whose tokens were scored."""
    eval_layers: tuple[Count, ...] = ()
    """Layers at which the rule could select."""
    variance: tuple[Number, ...] = ()
    """Under `settled_by="variance"`: rank variance, one per layer of `eval_layers`, in squared ranks."""
    variance_ratio: tuple[Number, ...] = ()
    """Likewise: variance over the reference variance."""
    lookup: tuple[Number, ...] = ()
    """Under `settled_by="lookup"`: the highest score of a far token, one per layer of `eval_layers`; with
    `score_power="max"` the largest share of its attention that a head gives to one."""
    kept_positions: tuple[Count, ...] = _Positions()  # type: ignore[assignment]
    """Prompt positions that were kept, ascending; 0 is the first token that is not padding. May be given as a range,
    and becomes a tuple when it is read."""
    layer_tokens: tuple[Count, ...] = ()
    """Tokens that each layer ran on."""
    selections: tuple[SelectionReport, ...] = ()
    """All selections, in order of layers; where none is given, the one that `selected_layer` and `kept_tokens` tell."""
    selection_spans: tuple[Spans, ...] = ()
    """For each of `selections`, the prompt positions that it kept; empty where they were not recorded."""
    reread_layers: Count = 0
    """How many layers, from the first on, ran a second time, on the kept tokens alone."""
    ranked_by: str = ""
    """Whose queries ranked the tokens: `the last 32 tokens`, the text of the prompt's question, or `tokens 1,990 to
    2,011`; empty where nothing was ranked."""
    ranking_spans: Spans = ()
    """The prompt positions of these tokens; empty where a policy of its own names them, or nothing was ranked."""
    images: tuple[ImageReport, ...] = ()
    """Of a model that reads images, what became of each, in order."""

    def __post_init__(self) -> None:
        if not self.selections and self.selected_layer is not None:
            only = SelectionReport(layer=self.selected_layer, kept_tokens=self.kept_tokens)
            object.__setattr__(self, "selections", (only,))

    @property
    def pruned(self) -> bool:
        """True where at least one token was dropped."""
        return self.kept_tokens < self.prompt_tokens

    @property
    def curve_title(self) -> str:
        """What a curve of `lookup` or `variance_ratio` shows, as a question."""
        if not self.lookup:
            return "Has the ranking of tokens settled?"
        if self.ranked_by.startswith(THE_LAST):
            return "Have the last tokens found what they look for?"
        return "Has the question found its answer?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one prefill decided, row by row, and what it saved."""

    policy: str
    """Name of the policy."""
    config: dict[str, Any]
    """Settings, with every default that depends on the model resolved."""
    num_layers: Count
    """Decoder layers of the model."""
    rows: tuple[RowReport, ...]
    """One entry per row of the batch."""
    kv_tokens: tuple[Count, ...]
    """Entries stored after prefill, per row and KV head; one entry per layer, 0 for one without keys and values."""
    kv_bytes: Count
    """Bytes of keys and values stored after prefill, scales included, over all rows and layers."""
    kv_bytes_full: Count
    """Bytes that an unpruned cache would hold in the model's dtype, over all rows and layers."""
    prefill_seconds: Number = _Seconds()  # type: ignore[assignment]
    """Wall time of the prefill, in seconds. On a GPU it is the GPU's time, and reading it waits for the end of the
    prefill; a function that measures it may be given."""
    state_bytes: Count = 0
    """Bytes of the states that layers keep in place of keys and values, or beside them, over all rows and layers; the
    same whatever is pruned."""
    profile: str | None = None
    """Name of the profile that filled in settings which were left open, and where it was found; None where none did."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"prefill_seconds": self.prefill_seconds}

    @property
    def kv_share(self) -> float:
        """Stored KV bytes as a share of the unpruned cache's; 1.0 for an empty cache."""
        return self.kv_bytes / self.kv_bytes_full if self.kv_bytes_full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers, strings and None, ready for strict JSON.

        A number that is not finite becomes None.
        """
        data: dict[str, Any] = _plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        data["kv_share"] = self.kv_share
        return data

    @property
    def thresholds(self) -> list[tuple[float, int, int]]:
        """Under `settled_by="lookup"`, for each stage, the final one last: the threshold at the first layer of its
        range, that layer, and the last layer. The threshold falls from layer to layer."""
        if not any(row.lookup for row in self.rows):
            return []
        stages = (*(self.config.get("stages") or ()), self.config)
        found = [(stage.get("tau"), stage.get("min_layer"), stage.get("max_layer")) for stage in stages]
        return [one for one in found if None not in one]

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """The inverse of `to_dict`, None for a float being NaN; raises `FlexASLError` for anything else."""
        if isinstance(data, dict):
            # Of a report that was written before there were profiles, or states.
            data = {"profile": None, "state_bytes": 0} | data
            data["profile"] = data.pop("preset", None) or data["profile"]  # as they were called then
            data.pop("kv_share", None)
            if isinstance(data.get("rows"), (list, tuple)):  # likewise, before a row said so
                since = {"selections": (), "ranked_by": "", "lookup": (), "images": ()}
                since |= {"selection_spans": (), "ranking_spans": ()}
                data["rows"] = [since | row if isinstance(row, dict) else row for row in data["rows"]]
        report: Report = fit(cls, data)
        fit(_Shown, report.config, "config")
        for index, row in enumerate(report.rows):
            _check_row(row, report.num_layers, f"rows[{index}]")
        return report

    def __str__(self) -> str:
        lines = [f"policy {self.policy}, {self.num_layers} layers{self._threshold()}"]
        if self.profile is not None:
            lines.append(f"settings that were left open: profile {self.profile}")
        for index, row in enumerate(self.rows[:ROWS_IN_FULL]):
            lines += self._row_lines(index, row)
        if len(self.rows) > ROWS_IN_FULL:
            more = len(self.rows) - ROWS_IN_FULL
            lines.append(f"... and {more} more row{'s' if more > 1 else ''}")
        lines.append(f"KV cache: {self.cache_size}")
        if self.kv_tokens:
            lines += _wrap(f"KV entries per head: {ranges(self.kv_tokens)}", indent="  ")
        if self.state_bytes:
            lines.append(f"states of layers without keys: {self.state_bytes / MIB:,.1f} MiB")
        lines.append(f"prefill: {self.prefill_seconds:.2f} s")
        return visible("\n".join(lines))

    @property
    def cache_size(self) -> str:
        """Bytes of keys and values in words: `63.0 MiB of 90.0 MiB (70% of full)`."""
        kept_in = self.config.get("kv_dtype")
        return (
            f"{self.kv_bytes / MIB:,.1f} MiB of {self.kv_bytes_full / MIB:,.1f} MiB ({self.kv_share:.0%} of full)"
            + (f", kept in {kept_in}" if kept_in else "")
        )

    def _threshold(self) -> str:
        tau, reference = self.config.get("tau"), self.config.get("variance_reference")
        if tau is None or not any(row.eval_layers for row in self.rows):
            return ""
        if any(row.lookup for row in self.rows):
            return f"; threshold: a look-up of {tau:g}"
        return f"; threshold: rank variance below {tau:g} of its {reference or 'reference'} value"

    def _row_lines(self, index: int, row: RowReport) -> list[str]:
        head = f"row {index}: {row.prompt_tokens:,} tokens in, {outcome(row, self.num_layers)}"
        lines = [head, *_wrap(f"why: {row.reason}", indent="  ")]
        if row.ranked_by:
            lines += _wrap(f"ranked by: {textwrap.shorten(row.ranked_by, LONGEST_TEXT)}", indent="  ")
        if row.images:
            kept = ", ".join(f"{image.kept_tokens:,} of {image.tokens:,}" for image in row.images)
            if len(row.images) > IMAGES_IN_FULL:
                going, all_ = (sum(getattr(one, name) for one in row.images) for name in ("kept_tokens", "tokens"))
                kept = f"{going:,} of {all_:,} in {len(row.images)} images"
            lines += _wrap(f"image tokens kept: {kept}", indent="  ")
        return [*lines, *_curve_lines(row)]

    def plot(self, path: str | Path | None = None, row: int = 0) -> Figure:
        """Picture of one row: the rule's scores by layer, and where in the prompt the kept tokens are.

        Writes it to `path` if given (format by suffix: PNG, SVG, PDF) and returns the matplotlib figure.
        Raises ImportError without matplotlib, ValueError where the batch has no such row.
        """
        if not 0 <= row < len(self.rows):
            held = f"0 to {len(self.rows) - 1}" if self.rows else "none: the report is empty"
            raise ValueError(f"row={row} is not in this report; rows are {held}")
        try:
            from flexasl.picture import draw
        except ImportError as error:
            raise ImportError("Report.plot needs matplotlib; install it with: pip install 'flexasl[plot]'") from error
        figure = draw(self, row)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_html(
        self, tokenizer: Any, ids: Any, path: str | Path | None = None, *, answer: str | Sequence[str] | None = None
    ) -> str:
        """A page for a browser: the report, and each prompt as text with its kept tokens marked, in a shade for each
        selection. It is one file without scripts, and loads nothing.

        ids: ids of the tokens that were read, [N] for one row, or [B, N] as a tensor or as lists; rows may be padded on
        the left with the tokenizer's padding token. answer: what the model said, a text, or one for each row. Writes
        the page to `path` if given, in UTF-8, and returns it. Raises `FlexASLError` where ids or answers are not those
        of the report's rows.
        """
        from flexasl.page import page

        made = page(self, tokenizer, ids, answer)
        if path is not None:
            Path(path).write_text(made, encoding="utf-8")
        return made

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from flexasl.page import summary

        return summary(self)


def also(report: Report, **fields: Any) -> Report:
    """`dataclasses.replace`, which would read the time, and so wait for the GPU."""
    made = object.__new__(type(report))
    made.__dict__.update(vars(report) | fields)
    return made


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


class _ShownStage(TypedDict):
    """What they show of a stage."""

    tau: NotRequired[float | None]
    min_layer: NotRequired[Count | None]
    max_layer: NotRequired[Count | None]


class _Shown(_ShownStage):
    """The settings that texts and pictures of a report show."""

    stages: NotRequired[list[_ShownStage] | None]
    variance_reference: NotRequired[str | None]
    kv_dtype: NotRequired[str | None]


def _check_row(row: RowReport, num_layers: int, where: str) -> None:
    """Raises `Unfit` for what no prefill decides."""
    selected = [selection.layer for selection in row.selections]
    last = [] if row.selected_layer is None else [row.selected_layer]
    layers = (*row.eval_layers, *row.scored_layers, *selected, *last)
    if any(layer >= num_layers for layer in layers):
        raise Unfit(f"{where} names layer {max(layers)} of {num_layers}")
    seen = [row.lookup] if row.lookup else [row.variance, row.variance_ratio]
    if any(len(values) != len(row.eval_layers) for values in seen) or (row.lookup and row.variance):
        of = "lookup" if row.lookup else "variance and variance_ratio"
        raise Unfit(f"{where} has no {of} for each of its eval_layers")
    kept = [row.prompt_tokens, *(selection.kept_tokens for selection in row.selections), row.kept_tokens]
    if (selected[-1] if selected else None) != row.selected_layer or any(one >= two for one, two in pairwise(selected)):
        raise Unfit(
            f"{where} selects at layer {row.selected_layer}, which is not the last of its selections {selected}"
        )
    if any(one < two for one, two in pairwise(kept[:-1])) or (selected and kept[-2] != kept[-1]):
        raise Unfit(f"{where} keeps {row.kept_tokens} tokens, which its selections do not end with: {kept[1:-1]}")
    if row.kept_tokens > row.prompt_tokens:
        raise Unfit(f"{where} keeps {row.kept_tokens} of {row.prompt_tokens} tokens")
    if any(one >= other for one, other in pairwise((*row.kept_positions, row.prompt_tokens))):
        raise Unfit(f"{where}.kept_positions do not ascend within the prompt's {row.prompt_tokens} tokens")
    for name, spans in (("ranking_spans", row.ranking_spans), *(("selection_spans", x) for x in row.selection_spans)):
        ends = [end for span in spans for end in span]
        if any(one >= other for one, other in pairwise((*ends, row.prompt_tokens + 1))):
            raise Unfit(f"{where}.{name} do not ascend within the prompt's {row.prompt_tokens} tokens")
    counts = [sum(stop - start for start, stop in spans) for spans in row.selection_spans]
    if counts and counts != kept[1:-1]:
        raise Unfit(f"{where}.selection_spans hold {counts} tokens, where its selections keep {kept[1:-1]}")


def outcome(row: RowReport, num_layers: int) -> str:
    """How many tokens were kept, and from where on."""
    if row.selected_layer is None:
        return f"{row.kept_tokens:,} kept" if row.pruned else "nothing pruned"
    if row.selected_layer + 1 == num_layers:
        return f"{row.kept_tokens:,} selected at the last layer, {row.selected_layer}"
    # The selection layer itself still runs on every token.
    kept = f"{row.kept_tokens:,} kept from layer {row.selected_layer + 1} of {num_layers} on"
    return f"{kept} (selected at {layers_of(row)})"


def layers_of(row: RowReport) -> str:
    """`layer 9`, or `layers 4 (1,024 tokens), 9`."""
    *before, last = row.selections
    earlier = [f"{selection.layer} ({selection.kept_tokens:,} tokens)" for selection in before]
    return f"layer{'s' if earlier else ''} {', '.join([*earlier, str(last.layer)])}"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _short(value: float) -> str:
    """A number in at most six characters."""
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 0.01 or abs(value) >= 10_000:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def ranges(entries: tuple[int, ...]) -> str:
    """Entries per layer, equal neighbours together: `layers 0-18: 512, 19-29: 480`."""
    parts = []
    first = 0
    for layer in range(1, len(entries) + 1):
        if layer == len(entries) or entries[layer] != entries[first]:
            span = f"{first}-{layer - 1}" if layer - 1 > first else f"{first}"
            parts.append(f"{span}: {entries[first]:,}")
            first = layer
    return ("layers " if len(entries) > 1 else "layer ") + ", ".join(parts)


def _curve_lines(row: RowReport) -> list[str]:
    """The rule's scores by layer, `CURVE_COLUMNS` layers to a block; a star marks layers that selected."""
    selected = {selection.layer for selection in row.selections}
    seen = [("look-up", row.lookup)] if row.lookup else [("variance", row.variance), ("ratio", row.variance_ratio)]
    lines = []
    for start in range(0, len(row.eval_layers), CURVE_COLUMNS):
        block = slice(start, start + CURVE_COLUMNS)
        layers = [f"*{layer}" if layer in selected else f"{layer}" for layer in row.eval_layers[block]]
        for name, cells in (("layer", layers), *((name, map(_short, values[block])) for name, values in seen)):
            lines.append(f"  {name:<8}" + "".join(f"{cell:>8}" for cell in cells))
    return lines
