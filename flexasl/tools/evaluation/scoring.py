"""Scores of an answer against its references, in [0, 1], as RULER and InfiniteBench define them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Score = Callable[[str, Sequence[str]], float]

MARKS = "\n:\"'.,?!{}"
WIDE_MARKS = "。、，；：？！「」『』（）《》〈〉【】〔〕—…·“”‘’～＂＃＄％＆＇＊＋－／＜＝＞＠［＼］＾＿｀｛｜｝"


def match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains, whatever the case (RULER)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains any of the references, whatever the case (RULER, question answering)."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def first_number(answer: str, references: Sequence[str]) -> float:
    """1 if the first run of digits is the reference, digit by digit (InfiniteBench, passkey and number string)."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] == references[0])


def one_word(answer: str, references: Sequence[str]) -> float:
    """1 if the first reference is a word of the answer (InfiniteBench, key-value retrieval)."""
    return float(references[0] in _words(answer))


def one_name(answer: str, references: Sequence[str]) -> float:
    """1 if the first reference, a name in capitals, is a word of the answer, whatever its case (InfiniteBench,
    dialogue)."""
    return float(references[0] in [word.upper() for word in _words(answer)])


def last_integer(answer: str, references: Sequence[str]) -> float:
    """1 if the last word is the reference as an integer (InfiniteBench, running code)."""
    words = _words(answer, "\n.`'\":")
    return float(bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None and _equal(words[-1], references[0]))


def first_value(answer: str, references: Sequence[str]) -> float:
    """1 if the first number, whole or decimal, equals the reference (InfiniteBench, finding numbers)."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return float(found is not None and _equal(found[0], references[0]))


def leading_share(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer's whole numbers give, from the first on without a mistake
    (InfiniteBench, calculating)."""
    right = 0
    for given, wanted in zip(re.findall(r"[0-9]+", answer), references):
        if not _equal(given, wanted):
            break
        right += 1
    return right / len(references)


def chosen_letter(answer: str, references: Sequence[str]) -> float:
    """1 if the answer chooses the reference's option (InfiniteBench, multiple choice on books).

    References are the option's text and its letter. The choice is the first character if that is A to D; else what
    follows "answer is:" and the like; else the first word that is such a letter.
    """
    text, letter = references
    if answer[:1] in tuple("ABCD"):
        return float(answer[0] == letter)
    plain = " ".join(_words(answer, "\n\"'.,?!{}"))
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = plain.partition(lead)
        if found:
            return float(rest[1:].startswith((text, letter)))
    letters = [word for word in plain.split() if word in tuple("ABCD")]
    return float(letters[:1] == [letter])


def chosen_function(answer: str, references: Sequence[str]) -> float:
    """1 if the answer chooses the reference's function (InfiniteBench, debugging code).

    References are the function's name and its letter. The choice is the last letter from A to J that stands alone; if
    that is not it, what follows "answer is:", "is:" or "answer:".
    """
    name, letter = references
    if re.findall(r"\b[A-J]\b", answer)[-1:] == [letter]:
        return 1.0
    plain = " ".join(re.sub(r"[\n`'\"*-]|[Oo]ption", " ", answer).split())
    for lead in ("answer is:", "is:", "answer:"):
        _, found, rest = plain.partition(lead)
        if found:
            return float(rest[1:].startswith((letter, name)))
    return 0.0


def word_f1(answer: str, references: Sequence[str]) -> float:
    """Highest F1 of the words over the references, without articles, marks and case (SQuAD; InfiniteBench, English
    questions)."""

    def words(text: str) -> list[str]:
        bare = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    return max(_f1(words(answer), words(reference)) for reference in references)


def character_f1(answer: str, references: Sequence[str]) -> float:
    """Highest F1 of the characters over the references, without marks and blanks (InfiniteBench, Chinese
    questions)."""

    def characters(text: str) -> list[str]:
        return [one for one in text.lower() if not one.isspace() and one not in string.punctuation + WIDE_MARKS]

    return max(_f1(characters(answer), characters(reference)) for reference in references)


def rouge_l_sum(answer: str, references: Sequence[str]) -> float:
    """ROUGE-Lsum F-measure against the first reference, without stemming (InfiniteBench, summaries)."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeLsum"]).score(references[0], answer)["rougeLsum"].fmeasure)


def _words(text: str, marks: str = MARKS) -> list[str]:
    return text.translate(str.maketrans(marks, " " * len(marks))).split()


def _equal(given: str, wanted: str) -> bool:
    """Whether two numbers are the same, whole ones exactly."""
    try:
        return int(given) == int(wanted)
    except ValueError:
        return float(given) == float(wanted)


def _f1(given: list[str], wanted: list[str]) -> float:
    common = (Counter(given) & Counter(wanted)).total()
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
