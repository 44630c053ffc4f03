"""Texts: what is read, what is refused, and where a needle lies."""

import io
import re
import sys
from pathlib import Path

import pytest
from tiny_chat import tiny_tokenizer

from flexasl.tools.text import Fact, TextError, magic_number, needle_prompt, prompt_ids, prose, read_text

NEEDLE = "The special magic number for the red fox is 48213."
QUESTION = "What is the special magic number for the red fox mentioned in the text?"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_prose_reads_as_prose() -> None:
    text = prose()
    assert len(text) > 100_000
    paragraphs = text.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    for paragraph in paragraphs:
        assert paragraph[0].isupper() and paragraph.endswith("."), paragraph
        assert "\n" not in paragraph
    assert not re.search(r"::=|>>>|\*\*|====|----", text)
    assert text == prose()


@pytest.mark.parametrize("tokens", [100, 1000, 100_000])
def test_prose_of_a_length(tokenizer, tokens: int) -> None:
    text = prose(tokens, tokenizer)
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert tokens - 100 < count <= tokens
    assert text.endswith((".", "!", "?"))


def test_prose_starts_elsewhere_with_another_seed(tokenizer) -> None:
    starts = {prose(200, tokenizer, seed=seed)[:60] for seed in range(5)}
    assert len(starts) == 5
    assert prose(200, tokenizer, seed=3) == prose(200, tokenizer, seed=3)


def test_prose_without_tokenizer_is_refused() -> None:
    with pytest.raises(TextError, match="tokens=100 cannot be counted without a tokenizer"):
        prose(100)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("tokens", [300, 2000])
@pytest.mark.parametrize("depth", [0, 0.3, 0.5, 1])
def test_needle_prompt(chat: bool, tokens: int, depth: float) -> None:
    tokenizer = tiny_tokenizer(chat=chat)
    prefix = "The number is"
    message = needle_prompt(tokenizer, tokens, depth, NEEDLE, QUESTION, answer_prefix=prefix)
    assert tokens - 100 < len(prompt_ids(tokenizer, message, prefix)) <= tokens
    assert message.count(NEEDLE) == 1
    assert message.endswith(QUESTION)
    document = message.split("\n\n", 1)[1].removesuffix("\n\n" + QUESTION)
    before, after = document.split(NEEDLE)
    assert len(before) / len(before + after) == pytest.approx(depth, abs=0.5 * 400 / len(document))
    assert not before or re.search(r"[.!?]\s$|\n\n$", before), "the needle starts where a sentence ends"
    assert not after.strip() or re.match(r"\s+\S", after)


@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_needle_depth_out_of_range(tokenizer, depth: float) -> None:
    with pytest.raises(TextError, match=rf"depth={depth}"):
        needle_prompt(tokenizer, 500, depth, NEEDLE, QUESTION)


def test_needle_prompt_too_short(tokenizer) -> None:
    with pytest.raises(TextError, match=r"tokens=20 is too few; give at least (\d+)") as caught:
        needle_prompt(tokenizer, 20, 0.5, NEEDLE, QUESTION)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    message = needle_prompt(tokenizer, least, 0.5, NEEDLE, QUESTION)
    assert len(prompt_ids(tokenizer, message)) == least


def test_magic_numbers() -> None:
    facts = [magic_number(seed) for seed in range(20)]
    assert len({fact.answer for fact in facts}) > 15
    for fact in facts:
        assert isinstance(fact, Fact)
        assert fact.answer in fact.needle and re.fullmatch(r"\d{5}", fact.answer)
        assert fact.answer not in fact.question + fact.answer_prefix + prose()
    assert magic_number(7) == facts[7]


def test_prompt_ids_use_the_chat_template() -> None:
    chat, plain = tiny_tokenizer(chat=True), tiny_tokenizer(chat=False)
    assert chat.decode(prompt_ids(chat, "hello", "It is")) == "<user>hello<end><assistant>It is"
    assert plain.decode(prompt_ids(plain, "hello")) == "hello"
    assert plain.decode(prompt_ids(plain, "hello", "It is")) == "hello\nIt is"


def test_read_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffGrüße, 世界\n".encode())
    assert read_text(file) == read_text(str(file)) == "Grüße, 世界\n"


@pytest.mark.parametrize("source", [None, "-"])
def test_read_standard_input(monkeypatch: pytest.MonkeyPatch, source: str | None) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    assert read_text(source) == "Grüße"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        read_text(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"PNG\0\1\2", "is binary"),
        ("caf\u00e9".encode("latin-1"), "is not UTF-8 .byte 3 is 0xe9."),
    ],
)
def test_unusable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(data)
    with pytest.raises(TextError, match=rf"bad\.txt {message}"):
        read_text(file)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(TextError, match=f"standard input {message}"):
        read_text()


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a folder"):
        read_text(tmp_path)
