"""The thirteen tasks of RULER (arXiv 2404.06654): what is hidden, what is asked, and in which sizes. The sizes are the
benchmark's; texts and wording are our own."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from random import Random
from typing import Literal

from flexasl.tools.evaluation.haystack import Haystack, hide
from flexasl.tools.evaluation.samples import Draft, Recipe
from flexasl.tools.evaluation.sources import Questions, Sources, pick
from flexasl.tools.evaluation.words import distinct, identifier, key_words, number, vocabulary

MAKERS = {"word": key_words, "number": number, "uuid": identifier}
KINDS = {"number": "magic number", "uuid": "magic identifier"}
SHORT = 4096
"""Below this length common words are repeated less often, as in the benchmark."""


def niah(
    rng: Random,
    sources: Sources,
    *,
    haystack: Literal["noise", "prose", "needles"],
    key: Literal["word", "uuid"] = "word",
    value: Literal["number", "uuid"] = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Recipe:
    """Needles in a haystack: `keys` keys with `values` values each are hidden, and `queries` of the keys asked for.

    A haystack of needles is made of further keys with a value each.
    """
    kind = KINDS[value]
    names = distinct(MAKERS[key], keys, rng)
    facts = {name: distinct(MAKERS[value], values, rng) for name in names}
    needles = [f"One special {kind} for {name} is {fact}." for name in names for fact in facts[name]]
    rng.shuffle(needles)
    depths = [rng.random() for _ in needles]
    if haystack == "needles":
        hay = _needles(Random(rng.random()), kind, MAKERS[key], MAKERS[value], set(names))
    else:
        hay = (sources.prose if haystack == "prose" else Haystack.noise()).read_from(rng).first

    answers = tuple(fact for name in names[:queries] for fact in facts[name])
    plural, verb, all_ = ("s", "are", " all") if len(answers) > 1 else ("", "is", "")
    what = f"special {kind}{plural} for {_listing(names[:queries])}"
    intro = f"Special {kind}s are hidden in the text below. Remember them: you will be asked for them after it."
    question = f"What {verb}{all_} the {what} stated in the text?"
    prefix = f"The {what} stated in the text {verb}"

    def draft(units: int) -> Draft:
        depth = depths[0] if len(needles) == 1 else None
        return Draft(f"{intro}\n\n{hide(needles, depths, hay(units))}\n\n{question}", prefix, answers, depth)

    return Recipe(draft)


def variable_tracking(rng: Random, *, hops: int = 4) -> Recipe:
    """A number that is passed on from variable to variable; asked for is every variable that has it. One solved example
    comes first."""
    example, *solved = _chain(rng, hops)
    spread = [step / (hops + 1) for step in range(hops + 1)]
    solved_text = _chain_text(example, spread, Haystack.noise().read_from(rng).first(4))
    lines, question, prefix, names = _chain(rng, hops)
    depths = sorted(rng.random() for _ in lines)
    hay = Haystack.noise().read_from(rng)
    shown = f"{solved_text}\n{solved[0]} {solved[1]} {', '.join(solved[2])}"

    def draft(units: int) -> Draft:
        return Draft(f"{shown}\n\n{_chain_text(lines, depths, hay.first(units))}\n{question}", prefix, names)

    return Recipe(draft)


def common_words(rng: Random, length: int, *, common: int = 10) -> Recipe:
    """A numbered list in which some words come often and the others seldom; asked for are the frequent ones."""
    often, seldom = (30, 3) if length >= SHORT else (6, 1)
    shown = (40, 10, 3) if length >= SHORT else (20, 3, 1)
    words = rng.sample(vocabulary(), len(vocabulary()))
    examples, words = words[: shown[0]], words[shown[0] :]
    order = rng.random()
    wanted = words[:common]
    prefix = f"Answer: The {common} words that occur most often in the list are:"
    question = f"Question: Which {common} words occur most often in the list?"

    def listing(chosen: list[str], many: int, few: int) -> str:
        entries = chosen[:common] * many + chosen[common:] * few
        Random(order).shuffle(entries)
        return f"Some words occur more often than others in the numbered list below.\n{_numbered(entries)}\n{question}"

    solved = f"{listing(examples, *shown[1:])}\n{prefix} {_numbered(examples[:common])}"

    def draft(units: int) -> Draft:
        return Draft(f"{solved}\n\n{listing(words[: common + units], often, seldom)}", prefix, tuple(wanted))

    return Recipe(draft, most=len(words) - common)


def frequent_words(rng: Random, *, alpha: float = 2.0, letters: int = 6, wanted: int = 3) -> Recipe:
    """Made-up words whose frequency falls with their rank as a zeta distribution; the first rank is three dots, and
    asked for are the next ones."""
    seed, order = rng.random(), rng.random()
    zeta = math.fsum(rank**-alpha for rank in range(1, 100_000))

    def made_up(rng: Random) -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(letters))

    names = distinct(made_up, wanted, Random(seed))

    def draft(units: int) -> Draft:
        counts: list[int] = []
        while (times := int(units * (len(counts) + 1) ** -alpha / zeta)) > 0:
            counts.append(times)
        ranked = ["...", *distinct(made_up, max(len(counts) - 1, wanted), Random(seed))]
        text = [word for word, times in zip(ranked, counts) for _ in range(times)]
        Random(order).shuffle(text)
        message = (
            "The text below is in code: its words are made up, and the dots between them stand for nothing.\n"
            f"{' '.join(text)}\n"
            f"Question: Leaving the dots aside, which {wanted} words occur most often in the coded text?"
        )
        prefix = f"Answer: The {wanted} words that occur most often in the coded text are:"
        return Draft(message, prefix, tuple(names))

    return Recipe(draft, least=64)  # from here on the wanted ranks have different counts


def question_answering(rng: Random, questions: Questions, order: str, index: int) -> Recipe:
    """A question over documents, of which most do not help: first those of the same subject, then any others."""
    asked = pick(order, index, questions.questions)
    own = {*asked.needed, *asked.near}
    rest = [text for text in questions.documents if text not in own]
    rng.shuffle(rest)
    others = list(asked.near) + rest
    places = rng.random()

    def draft(units: int) -> Draft:
        times = -(-units // len(others)) if others else 0
        documents = list(asked.needed) + (others * times)[:units]
        Random(places).shuffle(documents)
        text = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
        instruction = "Answer the question from the documents. Give the answer alone, without any other words."
        message = f"{instruction}\n\n{text}\n\n{instruction}\n\nQuestion: {asked.question}"
        return Draft(message, "Answer:", asked.answers)

    return Recipe(draft, most=None if others else 0)


def _needles(
    rng: Random, kind: str, key: Callable[[Random], str], value: Callable[[Random], str], taken: set[str]
) -> Callable[[int], list[str]]:
    lines: list[str] = []

    def first(count: int) -> list[str]:
        while len(lines) < count:
            name = key(rng)
            if name not in taken:
                taken.add(name)
                lines.append(f"One special {kind} for {name} is {value(rng)}.")
        return lines[:count]

    return first


def _chain(rng: Random, hops: int) -> tuple[list[str], str, str, tuple[str, ...]]:
    """Assignments, question, start of the answer, and the variables."""

    def variable(rng: Random) -> str:
        return "".join(rng.choice(string.ascii_uppercase) for _ in range(5))

    names, value = distinct(variable, hops + 1, rng), number(rng, 5)
    lines = [f"VAR {name} = {before}" for name, before in zip(names, [value, *(f"VAR {name}" for name in names)])]
    question = f"Question: Which variables have the value {value} by the assignments in the text above?"
    prefix = f"Answer: By the assignments in the text above, {hops + 1} variables have the value {value}:"
    return lines, question, prefix, tuple(names)


def _chain_text(lines: list[str], depths: list[float], sentences: list[str]) -> str:
    text = hide(lines, depths, sentences)
    return f"The text below contains assignments of variables. Follow them from one to the next.\n\n{text}\n"


def _listing(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _numbered(entries: list[str]) -> str:
    return " ".join(f"{place}. {entry}" for place, entry in enumerate(entries, 1))
