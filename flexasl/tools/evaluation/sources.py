"""What samples are made from: prose, the user's files, and the depths of a needle."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cache, cached_property
from numbers import Real
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NotRequired, TypedDict

from flexasl import stored
from flexasl.checks import path, several
from flexasl.errors import FlexASLError
from flexasl.tools.evaluation.haystack import Haystack
from flexasl.tools.text import prose, read_text

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SQUAD, HOTPOTQA = "SQuAD", "HotpotQA"
LETTERS = "ABCD"
"""Of the options of a multiple choice."""


class Question(NamedTuple):
    """A question over documents."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    """Documents that hold the answer."""
    near: tuple[str, ...]
    """Documents of the same subject that do not."""


class Questions(NamedTuple):
    """A file of questions, and every document in it."""

    questions: list[Question]
    documents: list[str]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files and depths. Every file is read and checked when the object is made, and raises FlexASLError, or
    FileNotFoundError, in one sentence."""

    haystack: Path | None = None
    """Text that needles are hidden in; None: English prose that is installed with Python."""
    qa_files: tuple[Path, ...] = ()
    """Questions over documents, JSON as SQuAD or HotpotQA have it; which of them, the content tells."""
    infinitebench: Path | None = None
    """Folder with InfiniteBench's files, `<task>.jsonl`."""
    depths: tuple[float, ...] = DEPTHS
    """Depths that the needle task goes through, 0 start to 1 end."""
    _read: dict[str, Questions] = field(default_factory=dict, init=False, repr=False, compare=False)
    _records: dict[str, list[dict[str, Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("haystack", "infinitebench"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, path(name, getattr(self, name)))
        files = several("qa_files", self.qa_files, (str, os.PathLike), "paths of files")
        object.__setattr__(self, "qa_files", tuple(map(Path, files)))
        depths = tuple(several("depths", self.depths, Real, "numbers in [0, 1]"))
        object.__setattr__(self, "depths", depths)
        if not depths or not all(0 <= depth <= 1 for depth in depths):
            raise FlexASLError(f"depths={list(depths)} are not shares of the document; give numbers in [0, 1]")
        if self.infinitebench is not None and not self.infinitebench.is_dir():
            raise FlexASLError(f"infinitebench={self.infinitebench} is not a folder; give the one with <task>.jsonl")
        for file in self.qa_files:
            kind, questions = _questions(file)
            if kind in self._read:
                raise FlexASLError(f"qa_files={file} is a second file in {kind}'s format; give one")
            self._read[kind] = questions
        _ = self.prose  # read now, so that a bad file is refused now

    @cached_property
    def prose(self) -> Haystack:
        """The text that needles are hidden in."""
        return _installed_prose() if self.haystack is None else Haystack(read_text(self.haystack))

    def questions(self, kind: str) -> Questions | None:
        """The questions of a kind, `SQUAD` or `HOTPOTQA`; None where no such file was given."""
        return self._read.get(kind)

    def records(self, task: str) -> list[dict[str, Any]] | None:
        """InfiniteBench's records of a task; None where there is no such file."""
        if self.infinitebench is None or not (self.infinitebench / f"{task}.jsonl").is_file():
            return None
        if task not in self._records:
            self._records[task] = _records(self.infinitebench / f"{task}.jsonl")
        return self._records[task]

    def fingerprint(self) -> dict[str, Any]:
        """What the samples depend on, in JSON's own types: depths, and a digest of each file."""
        files = [self.haystack, *self.qa_files]
        if self.infinitebench is not None:
            files += sorted(self.infinitebench.glob("*.jsonl"))
        digests = {stored.nameable(path.name): _digest(path) for path in files if path is not None}
        return {"depths": list(self.depths), "files": digests}


def pick(seed: str, index: int, items: list[Any]) -> Any:
    """The item of a sample: items in an order that the seed shuffles, each taken once."""
    order = list(range(len(items)))
    Random(seed).shuffle(order)
    return items[order[index]]


@cache
def _installed_prose() -> Haystack:
    return Haystack(prose())


class _SquadAnswer(TypedDict):
    text: str


class _SquadQuestion(TypedDict):
    question: str
    answers: list[_SquadAnswer]
    is_impossible: NotRequired[bool]


class _SquadParagraph(TypedDict):
    context: str
    qas: list[_SquadQuestion]


class _SquadArticle(TypedDict):
    paragraphs: list[_SquadParagraph]


class _Squad(TypedDict):
    data: list[_SquadArticle]


class _HotpotQuestion(TypedDict):
    question: str
    answer: str
    context: list[tuple[str, list[str]]]
    """Title and sentences of each document."""
    supporting_facts: NotRequired[list[tuple[str, int]]]
    """Title and number of a sentence."""


class _InfiniteBenchRecord(TypedDict):
    context: str
    input: str
    answer: str | int | float | list[str | int | float]
    options: NotRequired[list[str]]


def _questions(path: Path) -> tuple[str, Questions]:
    try:
        data = stored.read(path)
        if isinstance(data, list):
            kind, questions = HOTPOTQA, _hotpotqa(stored.fit(list[_HotpotQuestion], data))
        else:
            kind, questions = SQUAD, _squad(stored.fit(_Squad, data)["data"])
    except stored.Unfit as error:
        raise FlexASLError(f"{path} is neither SQuAD's nor HotpotQA's: {error}; give one of them") from error
    if not questions.questions:
        raise FlexASLError(f"{path} has no question with an answer; give a file that has")
    return kind, questions


def _squad(articles: list[_SquadArticle]) -> Questions:
    questions: list[Question] = []
    documents: list[str] = []
    for article in articles:
        texts = [paragraph["context"] for paragraph in article["paragraphs"]]
        documents += texts
        for paragraph in article["paragraphs"]:
            near = tuple(text for text in texts if text != paragraph["context"])
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible"):
                    questions.append(Question(asked["question"], answers, (paragraph["context"],), near))
    return Questions(questions, list(dict.fromkeys(documents)))


def _hotpotqa(records: list[_HotpotQuestion]) -> Questions:
    questions: list[Question] = []
    documents: list[str] = []
    for record in records:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]}
        documents += texts.values()
        supporting = {title for title, _ in record.get("supporting_facts", [])} & set(texts) or set(texts)
        needed = tuple(text for title, text in texts.items() if title in supporting)
        near = tuple(text for title, text in texts.items() if title not in supporting)
        questions.append(Question(record["question"], (record["answer"],), needed, near))
    return Questions(questions, list(dict.fromkeys(documents)))


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, (_, line) in enumerate(stored.lines(path), 1):
        if line.strip():
            try:
                record = stored.fit(_InfiniteBenchRecord, stored.parse(line))
                _check_options(record)
            except stored.Unfit as error:
                raise FlexASLError(f"{path}, line {number}: {error}; give InfiniteBench's file") from error
            records.append(record)
    return records


def _check_options(record: dict[str, Any]) -> None:
    """That there is an answer, and that it is one of the options, where there are any."""
    options, answer = record.get("options"), record["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    if not answers:
        raise stored.Unfit("answer is an empty list")
    if options and str(answers[0]) not in options[: len(LETTERS)]:
        raise stored.Unfit(f"the answer {answers[0]!r:.60} is none of the options A to {LETTERS[-1]}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
