"""Texts to read: files that a user names, prose that is on every machine, needles hidden in it; and as token ids."""

import random
import re
import sys
import textwrap
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from flexasl.errors import FlexASLError
from flexasl.stored import MOST_BYTES
from flexasl.tools.extras import need

INTRODUCTION = (
    "One sentence of the following text states a special magic number. You will be asked for it after the text."
)
THINGS = (
    *("red fox", "old bridge", "glass lamp", "north gate", "silver spoon", "quiet river", "paper kite", "stone tower"),
    *(
        "blue ladder",
        "wooden boat",
        "green door",
        "tall chimney",
        "copper bell",
        "white horse",
        "winter coat",
        "apple tree",
    ),
)


class TextError(FlexASLError):
    """A text that cannot be read, or a document that cannot be made."""


class Fact(NamedTuple):
    """A needle, and how to ask for it; an answer is right if it contains `answer`."""

    needle: str
    question: str
    answer_prefix: str
    """Start of the answer, to be put after the generation prompt, as RULER (arXiv 2404.06654) does."""
    answer: str


def read_text(source: str | Path | None = None) -> str:
    """The text of a UTF-8 file; of standard input where `source` is None or "-".

    Raises FileNotFoundError for a missing file, TextError for one that is a folder, empty, binary or not UTF-8.
    """
    if source is None or str(source) == "-":
        if sys.stdin is None:
            raise TextError("standard input is closed; give a text file")
        name, data = "standard input", sys.stdin.buffer.read(MOST_BYTES + 1)
    else:
        name, path = str(source), Path(source)
        if path.is_dir():
            raise TextError(f"{name} is a folder; give a text file")
        if not path.exists():
            raise FileNotFoundError(f"{name} does not exist; give a text file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise TextError(f"{name} has more than {MOST_BYTES:,} bytes; give a shorter text")
    if b"\0" in data:
        raise TextError(f"{name} is binary (it contains NUL bytes); give a text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{name} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert it") from error
    if not text.strip():
        raise TextError(f"{name} is empty; give a text to read")
    return text


def prose(tokens: int | None = None, tokenizer: Any = None, *, seed: int = 0) -> str:
    """English prose: paragraphs of the language reference that is installed with Python, without code and markup.

    At most `tokens` tokens of `tokenizer`, cut after a sentence; all of it (some 33,000 tokens) for None.
    Longer texts repeat it. Another `seed` starts at another place; 0 at the beginning.

    Raises TextError where `tokens` has no tokenizer to count with, or is too few for one sentence.
    """
    sentences = _sentences(seed)
    if tokens is None:
        return _join(sentences)
    if tokenizer is None:
        raise TextError(f"tokens={tokens} cannot be counted without a tokenizer; give one")
    return _join(_longest(sentences, tokens, tokenizer, lambda kept: len(bare_ids(tokenizer, _join(kept)))))


def magic_number(seed: int = 0) -> Fact:
    """A fact that no model knows: a five-digit number for a thing."""
    choose = random.Random(seed)
    thing, number = THINGS[seed % len(THINGS)], str(choose.randint(10000, 99999))
    return Fact(
        needle=f"The special magic number for the {thing} is {number}.",
        question=f"What is the special magic number for the {thing} mentioned in the text?",
        answer_prefix=f"The special magic number for the {thing} mentioned in the text is",
        answer=number,
    )


def needle_prompt(
    tokenizer: Any, tokens: int, depth: float, needle: str, question: str, seed: int = 0, *, answer_prefix: str = ""
) -> str:
    """A user's message: prose with `needle` between two sentences at `depth` (0 start, 1 end), then the question.

    `prompt_ids` of the message and `answer_prefix` has at most `tokens` tokens, and less than a sentence fewer.

    Raises TextError for a depth outside [0, 1], or too few tokens for needle and question.
    """
    if not 0 <= depth <= 1:
        raise TextError(f"depth={depth} is not a share of the document; give a number in [0, 1]")

    def message(kept: list[str]) -> str:
        starts = list(accumulate(map(len, kept), initial=0))
        place = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * starts[-1]))
        break_here = "\n\n" if place and kept[place - 1].endswith("\n\n") else ""
        document = kept[:place] + [needle + break_here] + kept[place:]
        return f"{INTRODUCTION}\n\n{_join(document)}\n\n{question}"

    def count(kept: list[str]) -> int:
        return len(prompt_ids(tokenizer, message(kept), answer_prefix))

    return message(_longest(_sentences(seed), tokens, tokenizer, count))


def prompt_ids(tokenizer: Any, message: str, answer_prefix: str = "") -> list[int]:
    """Token ids of a prompt: the message through the chat template, if there is one, then the start of the answer."""
    return encode(tokenizer, render(tokenizer, message, answer_prefix))


def render(tokenizer: Any, message: str, answer_prefix: str = "") -> str:
    """The text of a prompt: the message through the chat template, if there is one, then the start of the answer."""
    if tokenizer.chat_template is None:
        return f"{message}\n{answer_prefix}" if answer_prefix else message
    return through_template(tokenizer, message) + answer_prefix


def through_template(tokenizer: Any, message: str) -> str:
    """A user's message as the tokenizer's chat template writes it, up to where the answer begins.

    Raises TextError where the template fails, or does not have the message in it.
    """
    turns = [{"role": "user", "content": message}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, which can raise anything
        if isinstance(error, ImportError):
            need("a chat template", "transformers", "jinja2")
        reason = " ".join(str(error).split())
        raise TextError(
            f"the chat template of the tokenizer cannot be used ({type(error).__name__}: {reason})"
        ) from error
    if message.strip() not in text:
        raise TextError("the chat template changes the user's message, so that the model would not read it as it is")
    return text


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a rendered prompt, or of its beginning."""
    return list(encoding(tokenizer, prompt)["input_ids"])


def encoding(tokenizer: Any, prompt: str, **options: Any) -> Any:
    """All that the tokenizer says of a rendered prompt. A chat template writes its own special tokens; without one the
    tokenizer does."""
    return tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None, verbose=False, **options)


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _longest(sentences: list[str], tokens: int, tokenizer: Any, count: Callable[[list[str]], int]) -> list[str]:
    """The longest run of sentences from the first, repeated as needed, whose `count` is at most `tokens`."""
    if count(sentences[:1]) > tokens:
        raise TextError(f"tokens={tokens} is too few; give at least {count(sentences[:1])}")
    lengths = [len(ids) for ids in tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]]
    times = int(1.25 * tokens) // sum(lengths) + 1
    # Tokens merge across a sentence's end, so the sum of lengths is only nearly the count: a quarter more is searched.
    most = bisect_right(list(accumulate(lengths * times)), 1.25 * tokens)
    sentences = sentences * times
    return sentences[: bisect_right(range(1, most + 1), tokens, key=lambda number: count(sentences[:number]))]


def _sentences(seed: int) -> list[str]:
    """Sentences of the language reference, the last one of a paragraph with the blank line after it."""
    paragraphs = _paragraphs()
    start = random.Random(seed).randrange(len(paragraphs)) if seed else 0
    return [sentence for paragraph in paragraphs[start:] + paragraphs[:start] for sentence in _split(paragraph)]


def _split(paragraph: str) -> list[str]:
    *first, last = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z])", paragraph)
    return [*first, last + "\n\n"]


def _join(sentences: list[str]) -> str:
    return " ".join(sentences).replace("\n\n ", "\n\n").strip()


def _paragraphs() -> list[str]:
    from pydoc_data.topics import topics

    blocks = [block for name in sorted(topics) for block in topics[name].split("\n\n")]
    cleaned = [_clean(block) for block in blocks]
    return list(dict.fromkeys(text for text in cleaned if _is_prose(text)))  # several topics share a passage


def _clean(block: str) -> str:
    """One paragraph on one line, without list bullets, emphasis, quotes around code, and footnote marks."""
    text = re.sub(r"^(\*|\d+\.|-) +", "", " ".join(textwrap.dedent(block).split()))
    text = re.sub(r" ?\[\d+\]", "", text)
    return re.sub(r"\*\*?([^*\s][^*]*)\*\*?|\"([^\"\s]+)\"", lambda found: found[1] or found[2], text)


def _is_prose(text: str) -> bool:
    """Whether a cleaned paragraph is made of sentences, and not a heading, a grammar rule, code or a table."""
    words = sum(character.isalpha() or character == " " for character in text)
    code = ("::=", ">>>", "==", "**", "->", "|", "__(")
    return (
        len(text.split()) >= 12
        and text[0].isupper()
        and text.endswith(".")
        and words > 0.9 * len(text)
        and not any(mark in text for mark in code)
        and max(map(len, _split(text))) < 400
    )
