"""The page of a report: the text with the kept tokens marked, the figures, and nothing that a browser obeys."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, STAGED, left_padded, prompts, tiny
from test_report import full_row, looked_up_row, make_report, pruned_row
from tiny_chat import tiny_tokenizer

import flexasl
from flexasl.page.figures import ticks
from flexasl.page.marking import EDGE, FOLDED
from flexasl.prompt_text import decoded, pieces
from flexasl.report import ImageReport, Report, RowReport, SelectionReport

pytestmark = pytest.mark.cpu("reads pages and files, not tensors")

VOID = {"meta", "input"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "dl", "div", "dt", "dd", "section"),
    *("ul", "li", "p", "mark", "span", "s", "input", "label", "figure", "figcaption", "details", "summary"),
    *("table", "tr", "th", "td", "svg", "g", "path", "text", "polyline", "circle", "rect"),
}
"""All elements that a page may have: none of them loads or runs anything."""


class Parsed(HTMLParser):
    """A page's elements, which must be closed in order, and its texts by what they are in."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.prompts = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("class") or ""))
            if tag == "div" and self.open[-1][1].startswith("text "):
                self.prompts.append([])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [kind for tag, kind in self.open]
        where = next((at for at, kind in enumerate(inside) if kind.startswith("text ")), None)
        if where is None:
            self.texts.append(data)
        else:  # a piece of a prompt, with the elements around it
            self.prompts[-1].append((data, [one for one in self.open[where + 1 :]]))

    def of(self, tag, kind=None):
        return [its for name, its in self.elements if name == tag and kind in (None, its.get("class"))]

    @property
    def said(self):
        return " ".join(" ".join(self.texts).split())


class Bytes:
    """A tokenizer of one token a byte."""

    pad_token_id = 256

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def row_of(length, kept, layers=(7, 10), **changes):
    """A row of which these positions were kept, one set for each layer."""
    spans = []
    for positions in kept:
        marks = [at in positions for at in range(length)]
        edges = [at for at, (one, two) in enumerate(zip([False, *marks], [*marks, False])) if one != two]
        spans.append(tuple(zip(edges[::2], edges[1::2])))
    made = tuple(SelectionReport(layer=at, kept_tokens=len(one)) for at, one in zip(layers, kept))
    told = {"selections": made, "selected_layer": layers[len(kept) - 1], "selection_spans": tuple(spans)}
    told |= {"kept_tokens": len(kept[-1]), "kept_positions": tuple(sorted(kept[-1])), "reason": "because"}
    return RowReport(**({"prompt_tokens": length} | told | changes))


def passed_by(parsed, row=0):
    """Of each letter of a prompt, how many selections it passed, as the page marks it."""
    made = []
    for text, around in parsed.prompts[row]:
        kinds = [kind for tag, kind in around if tag == "mark"]
        made += [int(re.search(r"\bk(\d+)", kinds[0])[1]) if kinds else 0] * len(text)
    return made


def text_of(parsed, row=0):
    return "".join(text for text, _ in parsed.prompts[row])


@st.composite
def marked_prompts(draw):
    length = draw(st.integers(1, 400))
    text = draw(st.text(st.sampled_from("ab <&>\"'\n\t;"), min_size=length, max_size=length))
    kept, left = [], set(range(length))
    for _ in range(draw(st.integers(1, 3))):
        starts = draw(st.lists(st.integers(0, length - 1), max_size=4))
        left = {at for at in left if any(start <= at < start + length // 4 for start in starts)}
        kept.append(left)
    asks = draw(st.integers(0, length - 1))
    return text, kept, ((asks, min(length, asks + 7)),)


@settings(max_examples=100)
@given(marked_prompts())
def test_each_token_is_marked_by_the_selections_that_it_passed(prompt):
    text, kept, asks = prompt
    row = row_of(len(text), kept, (3, 7, 10), ranking_spans=asks)
    parsed = Parsed(make_report(row).to_html(Bytes(), list(text.encode())))
    assert text_of(parsed) == text
    assert passed_by(parsed) == [sum(at in one for one in kept) for at in range(len(text))]
    asked = [any("asks" in kind for _, kind in around) for one, around in parsed.prompts[0] for _ in one]
    assert asked == [asks[0][0] <= at < asks[0][1] for at in range(len(text))]
    for one, around in parsed.prompts[0]:
        if ("s", "") in around:
            assert len(one) > FOLDED - 2 * EDGE, "short runs stay"
        elif not around:
            assert len(one) <= max(FOLDED, 2 * EDGE), "long runs are folded"
    told = [len(text) - len(kept[0]), *(len(one) - len(two) for one, two in zip(kept, [*kept[1:], set()]))]
    for layer, count in zip((3, 7, 10), told):
        assert f"dropped at layer {layer} : {count:,} tokens" in parsed.said or count == told[-1]
    assert f"kept : {told[-1]:,} tokens" in parsed.said


@settings(max_examples=200)
@given(st.lists(st.integers(0, 999), max_size=60), st.lists(st.integers(0, 60), max_size=9), st.booleans())
def test_pieces_of_a_prompt_make_up_its_text(ids, cuts, letters):
    tokenizer = tiny_tokenizer()
    if letters:
        ids = tokenizer("".join(chr(0x3040 + 37 * one % 20000) for one in ids))["input_ids"]
    cuts = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    made = pieces(tokenizer, ids, cuts)
    assert len(made) == len(cuts) - 1 and "".join(made) == decoded(tokenizer, ids)


def test_a_letter_of_several_tokens_is_whole():
    row = row_of(4, [{0, 1, 3}])
    parsed = Parsed(make_report(row).to_html(Bytes(), list("a€".encode())))
    assert text_of(parsed) == "a€"


def test_long_prompts_have_few_elements():
    length, rng = 32_768, torch.Generator().manual_seed(0)
    starts = torch.randint(length - 12, (160,), generator=rng).tolist()
    final = {at for start in starts for at in range(start, start + 12)}
    first = final | set(range(5_000, 12_000))
    page = make_report(row_of(length, [first, final])).to_html(Bytes(), [97 + at % 26 for at in range(length)])
    parsed = Parsed(page)
    assert len(text_of(parsed)) == length and sum(map(bool, passed_by(parsed))) == len(first)
    assert len(parsed.elements) < 4 * len(starts) + 600 and len(page) < 4 * length


HOSTILE = "</s></div><script>alert(1)</script>&amp;<img src=x onerror=y>\x00\x1b[31m\u202e\"'"


def test_nothing_that_a_browser_obeys_comes_from_a_text():
    encoded = list(HOSTILE.encode())
    row = row_of(len(encoded), [{0, 1, 5}], reason=HOSTILE, ranked_by=HOSTILE)
    report = make_report(row, row, policy=HOSTILE, profile=HOSTILE, config={HOSTILE: HOSTILE, "kv_dtype": HOSTILE})
    page = report.to_html(Bytes(), [encoded, encoded], answer=[HOSTILE, HOSTILE])
    shown = HOSTILE.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    for text in (page, report._repr_html_()):
        parsed = Parsed(text)
        assert {tag for tag, _ in parsed.elements} <= TAGS
        names = {name for _, its in parsed.elements for name in its}
        assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style", "srcset")]
        assert not re.search(r"url\(|@import|https?:", text) and "\x00" not in text and "\u202e" not in text
        assert parsed.texts.count(shown) >= 4
    parsed = Parsed(page)
    assert text_of(parsed, 0) == text_of(parsed, 1) == shown
    (policy,) = (its["content"] for its in parsed.of("meta") if its.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_tells_what_the_report_tells():
    row = looked_up_row(layer_tokens=(4012,) * 8 + (1323,) * 3 + (512,) * 19, ranked_by="Who was it?")
    stage = {"tokens": 0.33, "tau": 0.3, "min_layer": 5, "max_layer": 6}
    report = make_report(row, config={"tau": 0.5, "min_layer": 9, "max_layer": 40, "stages": [stage], "kv_dtype": None})
    ids = [97] * row.prompt_tokens
    parsed = Parsed(report.to_html(Bytes(), ids, answer="Nobody <knows>."))
    for words in (
        "4,012 tokens, 512 kept from layer 11 of 30 on (selected at layers 7 (1,323 tokens), 10)",
        "63.0 MiB of 90.0 MiB (70% of full)",
        "7.81 s",
        "Who was it?",
        "Nobody <knows>.",
        "KV entries per head: layers 0-18: 4,012, 19-29: 512",
        "selected at layers 7, 10",
        row.reason,
    ):
        assert words in parsed.said, words
    assert len(parsed.of("circle")) == len(row.eval_layers) and len(parsed.of("circle", "dot chosen")) == 2
    assert len(parsed.of("path", "chosen")) == 2 and len(parsed.of("polyline", "asked")) == 2
    assert len(parsed.of("rect", "read")) == len(parsed.of("rect", "held")) == 30
    heights = [float(its["height"]) for its in parsed.of("rect", "read")]
    assert heights[0] == pytest.approx(heights[8] * 4012 / 1323, rel=0.02)
    assert "Nobody" not in report._repr_html_() and "selected at layers 7, 10" in report._repr_html_()
    kept = [its for its in parsed.of("rect") if its["class"] == "bin k2"]
    assert kept and sum(float(its["width"]) * float(its["height"]) for its in kept) == pytest.approx(
        (420 - 48 - 8) * (190 - 12 - 34) * 512 / 4012, rel=0.03
    )


@pytest.mark.parametrize("row", [full_row(), full_row(kept_positions=()), pruned_row(kept_positions=())])
def test_a_prompt_of_which_no_token_is_known_to_be_dropped_has_no_marks(row):
    parsed = Parsed(make_report(row).to_html(Bytes(), [97] * row.prompt_tokens))
    assert text_of(parsed) == "a" * row.prompt_tokens and not parsed.of("mark") and not parsed.of("input")
    words = "The report has no record of which tokens were kept." if row.pruned else "No token was dropped."
    assert words in parsed.said


def test_an_older_report_marks_what_was_kept_in_the_end():
    row = looked_up_row()
    assert row.selection_spans == ()
    parsed = Parsed(make_report(row).to_html(Bytes(), [97] * row.prompt_tokens))
    kept = set(row.kept_positions)
    assert passed_by(parsed) == [2 * (at in kept) for at in range(row.prompt_tokens)]


def test_numbers_that_are_not_finite_are_left_out():
    row = pruned_row(variance_ratio=(math.nan, math.inf, *[1.0] * 6, 0.28))
    page = make_report(row)._repr_html_()
    assert len(Parsed(page).of("circle")) == 7 and "nan" not in page and "inf" not in page


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6), st.booleans())
def test_ticks_are_few_round_and_inside(low, width, whole):
    high = low + width
    made = ticks(low, high, whole=whole)
    assert len(made) <= 7 and made == sorted(set(made))
    assert all(low - 1e-6 * width <= one <= high + 1e-6 * width for one in made)
    assert not whole or all(one == int(one) for one in made)


def test_images_are_told_in_numbers():
    images = (ImageReport(first=10, tokens=20, kept_tokens=5),)
    row = row_of(60, [{*range(5), *range(12, 17), *range(50, 60)}], images=images)
    parsed = Parsed(make_report(row).to_html(Bytes(), [97] * 10 + [98] * 20 + [99] * 30))
    assert text_of(parsed) == "a" * 10 + "image: 5 of 20 tokens kept" + "c" * 30
    assert "image tokens kept 5 of 20" in parsed.said


def test_rows_of_a_batch_have_a_section_each():
    rows = [row_of(length, [set(range(length - 9, length))]) for length in (40, 25)]
    report, padded = make_report(*rows), [[97] * 40, [256] * 15 + [98] * 25]
    page = report.to_html(Bytes(), torch.tensor(padded), answer=["one", "two"])
    parsed = Parsed(page)
    assert [text_of(parsed, at) for at in (0, 1)] == ["a" * 40, "b" * 25]
    assert len(parsed.of("section")) == 2 and "Row 0" in parsed.said and "two" in parsed.said
    for ids in (padded, [padded[0], padded[1][15:]], [torch.tensor(row) for row in padded], tuple(map(tuple, padded))):
        assert report.to_html(Bytes(), ids, answer=("one", "two")) == page
    many = make_report(*[full_row()] * 10)._repr_html_()
    assert len(Parsed(many).of("section")) == 8 and "... and 2 more rows" in Parsed(many).said


@pytest.mark.parametrize(
    ("ids", "answer", "message"),
    [
        ([97] * 39, None, "ids has 39 tokens in row 0, where the report has 40; give those that were read"),
        ([97] * 41, None, "ids has 41 tokens in row 0, where the report has 40; give those that were read"),
        ([[97] * 40] * 2, None, "ids has 2 rows, where the report has 1; give as many"),
        ("text", None, "ids does not hold token ids"),
        (["a"] * 40, None, "ids does not hold token ids"),
        ([0.5] * 40, None, "ids does not hold token ids"),
        (None, None, "ids does not hold token ids"),
        ([97] * 40, ["a", "b"], "answer has 2 texts, where the report has 1 rows; give one for each"),
        ([97] * 40, [3], "answer=3 is an int; give a text for each row"),
        ([97] * 40, 3, "answer=3 is an int; give a text"),
    ],
)
def test_what_is_not_of_the_report_is_refused(ids, answer, message):
    with pytest.raises(flexasl.FlexASLError, match=re.escape(message)):
        make_report(full_row()).to_html(Bytes(), ids, answer=answer)


def test_a_tokenizer_must_decode():
    with pytest.raises(flexasl.FlexASLError, match="tokenizer is None; give the model's tokenizer"):
        make_report(full_row()).to_html(None, [97] * 40)
    without = SimpleNamespace(decode=Bytes().decode)
    assert make_report(full_row()).to_html(without, [97] * 40)
    with pytest.raises(flexasl.FlexASLError, match="ids has 41 tokens"):
        make_report(full_row()).to_html(without, [256] + [97] * 40)


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    page = make_report(full_row()).to_html(Bytes(), list("ä".encode() * 20), tmp_path / "why.html")
    assert (tmp_path / "why.html").read_bytes() == page.encode() and "ä" * 20 in page


@pytest.mark.parametrize("propagate", ["gather", "mask"])
@pytest.mark.parametrize("config", [SMALL, STAGED], ids=["once", "staged"])
def test_reports_hold_what_passed_each_selection(propagate, config):
    model, rows = tiny(), prompts(90, 20, 61)
    with flexasl.patch(model, config.replace(propagate=propagate), question=[(70, 80), None, (45, 51)]) as patch:
        model(**left_padded(rows))
        report = patch.report
        for row in report.rows:
            assert len(row.selection_spans) == len(row.selections)
            before = set(range(row.prompt_tokens))
            for spans, selection in zip(row.selection_spans, row.selections):
                now = {at for start, stop in spans for at in range(start, stop)}
                assert now < before and len(now) == selection.kept_tokens
                assert all(one[1] < two[0] for one, two in pairwise(spans)), "whole runs"
                before = now
            assert before == set(row.kept_positions)
        assert report.rows[0].selections and report.rows[1].selection_spans == report.rows[1].ranking_spans == ()
        assert (report.rows[0].ranking_spans, report.rows[2].ranking_spans) == (((70, 80),), ((45, 51),))
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    with flexasl.patch(model, config.replace(propagate=propagate)) as patch:
        model(**left_padded(rows))
    assert patch.report.rows[2].ranking_spans == ((53, 61),)


def test_stored_reports_without_positions_are_read_and_wrong_ones_refused():
    report = make_report(row_of(60, [set(range(9, 50)), set(range(20, 40))]))
    data = report.to_dict()
    for name in ("selection_spans", "ranking_spans"):
        del data["rows"][0][name]
    assert Report.from_dict(data) == make_report(dataclasses.replace(report.rows[0], selection_spans=()))
    for name, value, words in (
        ("ranking_spans", [[5, 5]], "ranking_spans do not ascend within the prompt's 60 tokens"),
        ("ranking_spans", [[5, 61]], "ranking_spans do not ascend"),
        ("selection_spans", [[[9, 50]], [[20, 30], [30, 40]]], "selection_spans do not ascend"),
        (
            "selection_spans",
            [[[9, 50]], [[20, 41]]],
            r"selection_spans hold \[41, 21\] tokens, where its selections keep",
        ),
        ("selection_spans", [[[20, 40]]], "selection_spans hold"),
        ("selection_spans", [[20, 40]], "selection_spans"),
    ):
        data = report.to_dict()
        data["rows"][0][name] = value
        with pytest.raises(flexasl.FlexASLError, match=words):
            Report.from_dict(data)
