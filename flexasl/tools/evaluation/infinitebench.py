"""InfiniteBench (arXiv 2402.13718): its three retrieval tasks made here, its other tasks read from its files. Sizes are
the benchmark's; wording is our own."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any, NamedTuple

from flexasl.tools.evaluation.haystack import Haystack, hide
from flexasl.tools.evaluation.samples import Draft, Recipe
from flexasl.tools.evaluation.sources import LETTERS, pick
from flexasl.tools.evaluation.words import identifier, number


class Wording(NamedTuple):
    """How a task of the files is put: what comes before the context, after it, and before the answer."""

    before: str
    after: str
    answer_prefix: str = ""


WORDINGS = {
    "longbook_sum_eng": Wording("Read the book below; then summarize it.", "Summarize the book.", "Summary:"),
    "longbook_qa_eng": Wording(
        "Read the book below; then answer a question about it, as briefly as you can.", "Question: {input}", "Answer:"
    ),
    "longbook_choice_eng": Wording(
        "Read the book below; then choose the right answer to a question about it.",
        "Question: {input}\n\n{options}\n\nGive the letter of the only right option.",
        "The letter of the right answer is",
    ),
    "longbook_qa_chn": Wording("请阅读下面的书，然后简短回答问题。", "问题：{input}", "答案："),
    "longdialogue_qa_eng": Wording(
        'In the dialogue below, the name of one character is replaced by "$$MASK$$". Find out who it is.',
        'Which name stands behind "$$MASK$$"? Give the name alone.',
        "The name is",
    ),
    "code_debug": Wording(
        "One function in the code below contains a deliberate, plain mistake. Find it.",
        "Which function contains the mistake?\n\n{options}\n\nGive the letter of the only right option.",
        "The right option is:",
    ),
    "code_run": Wording(
        "The Python file below defines many small functions that call each other.", "{input}", "The value is"
    ),
    "math_find": Wording("{input}", "{input}", "The number is"),
    "math_calc": Wording(
        "Work out the expression below from left to right, and give the value after every operation.",
        "Give all intermediate values in order, separated by commas, and nothing else.",
        "[",
    ),
}


def passkey(rng: Random) -> Recipe:
    """A five-digit key, stated twice in one line of a text that says nothing."""
    key = number(rng, 5)
    return _in_noise(rng, f"The pass key is {key}. Remember it: {key} is the pass key.", "pass key", key)


def number_string(rng: Random) -> Recipe:
    """Ten digits, most of them in runs, stated twice in one line of a text that says nothing."""
    digits = str(rng.randrange(1, 10))
    while len(digits) < 10:
        digits += digits[-1] if rng.random() < 0.6 else str(rng.randrange(10))
    needle = f"The sequence of digits is {digits}. Remember it: {digits} is the sequence of digits."
    return _in_noise(rng, needle, "sequence of digits", digits)


def key_value(rng: Random) -> Recipe:
    """A JSON object of identifiers, of which one is asked for by its key."""
    key, value, depth = identifier(rng), identifier(rng), rng.random()
    others = Random(rng.random())
    pairs: list[tuple[str, str]] = []

    def draft(units: int) -> Draft:
        while len(pairs) < units:
            pairs.append((identifier(others), identifier(others)))
        place = int(depth * (units + 1))
        data = json.dumps(dict([*pairs[:place], (key, value), *pairs[place:units]]))
        question = f"What is the value of the key {json.dumps(key)}?"
        message = f"Find the value of a key in the JSON object below.\n\n{data}\n\n{question}"
        return Draft(message, "The value of the key is", (value,), depth)

    return Recipe(draft)


def from_file(task: str, records: list[dict[str, Any]], order: str, index: int) -> Recipe:
    """A record of one of the benchmark's files. A unit is a character of its context, which is cut out of the middle
    where it is too long, as in the benchmark."""
    record = pick(order, index, records)
    context, wording = record["context"], WORDINGS[task]
    options = record.get("options") or []
    fields = {
        "input": record["input"],
        "options": "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options)),
    }
    before, after = _put(wording.before, fields), _put(wording.after, fields)
    references = _references(record["answer"], options)

    def draft(units: int) -> Draft:
        left = (units + 1) // 2
        middle = context if units == len(context) else context[:left] + context[len(context) - units + left :]
        return Draft(f"{before}\n\n{middle}\n\n{after}", wording.answer_prefix, references)

    return Recipe(draft, most=len(context))


def _in_noise(rng: Random, needle: str, what: str, answer: str) -> Recipe:
    depth, hay = rng.random(), Haystack.noise().read_from(rng)
    intro = f"A {what} is hidden in a long text that says nothing else. Find it and remember it."

    def draft(units: int) -> Draft:
        text = hide([needle], [depth], hay.first(units))
        return Draft(f"{intro}\n\n{text}\n\nWhat is the {what}?", f"The {what} is", (answer,), depth)

    return Recipe(draft)


def _put(template: str, fields: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], template)


def _references(answer: Any, options: list[str]) -> tuple[str, ...]:
    """The answers as strings; of a multiple choice the right option and its letter."""
    answers = tuple(str(one) for one in (answer if isinstance(answer, list) else [answer]))
    if not options:
        return answers
    return answers[0], LETTERS[options.index(answers[0])]
