"""Stored JSON: what is read, what is refused, and how it is said; and files that are written over."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import pytest

from flexasl import stored, writing
from flexasl.errors import FlexASLError


class Part(TypedDict):
    name: str
    count: NotRequired[stored.Count]


@dataclass(frozen=True)
class Whole:
    parts: list[Part]
    share: stored.Share
    pair: tuple[str, int]
    ratio: Annotated[float, stored.NULL_IS_NAN]
    budget: int | float | None
    names: dict[str, str]
    places: Annotated[tuple[int, ...], stored.AtLeast(1)]


RIGHT: dict[str, Any] = {
    "parts": [{"name": "a", "count": 0, "more": []}, {"name": "b"}],
    "share": 1,
    "pair": ["x", 2],
    "ratio": None,
    "budget": None,
    "names": {"a b": "c"},
    "places": [3, 4],
}


def test_what_fits_becomes_what_is_said() -> None:
    found = stored.fit(Whole, RIGHT)
    assert found.parts == RIGHT["parts"] and found.pair == ("x", 2) and found.places == (3, 4)
    assert type(found.share) is float and math.isnan(found.ratio) and found.names == {"a b": "c"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": [{"name": 3}]}, "parts[0].name is 3, where a text is needed"),
        ({"parts": [{}]}, "parts[0].name is missing"),
        ({"parts": [{"name": "a", "count": -1}]}, "parts[0].count is -1, where a whole number from 0 to"),
        ({"parts": {}}, "parts is an object, where a list is needed"),
        ({"share": 1.5}, "share is 1.5, where a number from 0 to 1 is needed"),
        ({"share": True}, "share is true, where a number is needed"),
        ({"share": math.inf}, "share is inf, where a number is needed"),
        ({"pair": ["x"]}, "pair has 1 entries, where 2 are needed"),
        ({"pair": ["x", 1.0]}, "pair[1] is 1.0, where a whole number is needed"),
        ({"budget": "x"}, "budget is 'x', where a whole number or a number or null is needed"),
        ({"names": {"a b": None}}, "names.'a b' is null, where a text is needed"),
        ({"names": {3: "x"}}, "a name in names is 3, where a text is needed"),
        ({"places": []}, "places is a list, where a list of at least 1 entries is needed"),
        ({"more": 1}, "more is not known; the fields of Whole are parts, share, pair"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(stored.Unfit) as caught:
        stored.fit(Whole, RIGHT | change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is not JSON (Expecting value in line 1, column 1)"),
        (b'{"a": 1,\n "b"}', "in line 2, column 5"),
        (b"\xff{}", "it is not UTF-8"),
        (b"[" * 100_000, "it is nested deeper than 64"),
        (b'{"a":' * 100_000, "it is nested deeper than 64"),
        (b'{"a": 1, "b": 2, "a": 1}', "it names 'a' twice"),
        (b"[NaN]", "it has NaN for a number"),
        (b"[-Infinity]", "it has -Infinity for a number"),
        (b"[1e999]", "it has 1e999 for a number"),
        (b"[" + b"9" * 5000 + b"]", "it has a number of 5000 digits"),
        (b'["\\ud800"]', "it has half a character"),
        (b'{"\\udc00": 1}', "it has half a character"),
        ("\ud800", "it is not UTF-8"),
    ],
)
def test_what_is_no_json_of_ours(data: bytes | str, words: str) -> None:
    with pytest.raises(stored.Unfit) as caught:
        stored.parse(data)
    assert words in str(caught.value)


def test_what_is_json_all_the_same() -> None:
    brackets = {"a": "[" * 1000 + '\\"{'}
    assert stored.parse(json.dumps(brackets)) == brackets
    assert stored.parse(b'\xef\xbb\xbf["\\ud83d\\ude00"]') == ["\U0001f600"]
    assert stored.parse("[" * stored.MOST_DEPTH + "]" * stored.MOST_DEPTH)


def test_a_file_without_an_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST_BYTES", 1000)
    with pytest.raises(stored.Unfit, match="it has more than 1,000 bytes"):
        stored.read("/dev/zero")
    assert next(stored.lines("/dev/zero")) == (0, bytes(1001))


def test_what_a_terminal_would_obey_is_made_visible() -> None:
    assert stored.visible("a\tb\nç “…”") == "a\tb\nç “…”"
    assert stored.visible("\x1b]0;x\x07\x9b2J\u202e\r") == "\\x1b]0;x\\x07\\x9b2J\\u202e\\r"


# ---------------------------------------------------------------- files that are written


def test_whose_file_is_it(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"

    def check(**settings: Any) -> None:
        writing.check_file("--out", target, ours=lambda path: path.read_bytes().startswith(b"ours"), **settings)

    check()
    for content in (b"", b"ours, or the beginning of it"):
        target.write_bytes(content)
        check(inputs=(None, "none.txt", "-"))
    with pytest.raises(FlexASLError, match=r"^--out .*out.txt is a file that is read; give another name$"):
        check(inputs=(target,))
    os.link(target, tmp_path / "same.txt")
    with pytest.raises(FlexASLError, match="is a file that is read"):
        check(inputs=(tmp_path / "same.txt",))
    target.write_bytes(b"the lease")
    with pytest.raises(
        FlexASLError, match=r"^--out .*out.txt was not written by flexasl; give another name, or remove"
    ):
        check()
    assert target.read_bytes() == b"the lease"
    target = Path("/dev/null")
    with pytest.raises(FlexASLError, match="/dev/null is a device"):
        check()


def test_errors_name_the_path_that_was_given(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    for error in (OSError(28, "No space left on device"), OSError(13, "Permission denied", ".flexasl-x/out.txt")):
        words = f"^{target} cannot be written: {error.strerror}$"
        with pytest.raises(FlexASLError, match=words), writing.replaced(target) as new:
            new.write_text("half")
            raise error
    assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["out.txt"]
