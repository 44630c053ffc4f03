"""Prompts of a given length: a task drafts a message of any number of units, and the longest that fits becomes the
sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from flexasl.checks import instance, one_of
from flexasl.errors import FlexASLError
from flexasl.stored import AtLeast, Count, Range, Share, fit
from flexasl.tools.text import encode, render

MOST_CHARACTERS = 1000
"""That a token can stand for; a tokenizer that needs fewer tokens than that leaves text out."""
MOST_PROMPTS = 1_000_000
"""Of one evaluation or calibration, which lists them: far more would fill the memory before the first one is made."""


class Draft(NamedTuple):
    """A prompt of some number of units, before it is counted in tokens."""

    message: str
    answer_prefix: str
    """Start of the answer, put after the generation prompt."""
    references: tuple[str, ...]
    """What a right answer contains; how it is compared is the task's score."""
    depth: float | None = None
    """Where in the document the one needle lies (0 start, 1 end); None where there is not exactly one."""


RULES = (
    "Rules for the answer: keep it to a single sentence, written in plain English. Rely on the text above and "
    "on nothing else.",
    "Do not use lists, headings, bold or quotation marks. Do not explain the steps, do not apologise, "
    "and add no remarks of any kind. Stop as soon as the sentence ends.",
    "Write for a reader who has never seen the text and has no time to look anything up. Prefer short words to long "
    "ones, and never use an abbreviation without its meaning. Do not repeat these rules, do not refer to them, and do "
    "not say that you follow them. If you are not sure, give the answer that is most likely right.",
)
AFTER_QUESTION = {
    None: "",
    "rules-30": f"\n\n{RULES[0]}",
    "rules": f"\n\n{RULES[0]} {RULES[1]}",
    "rules-120": f"\n\n{' '.join(RULES)}",
}
"""Some 30, 60 and 120 tokens."""


@dataclass(frozen=True)
class Wording:
    """How the prompts of all tasks are put."""

    after_question: str | None = None
    """What stands behind the message of the task: a key of `AFTER_QUESTION`."""
    answer_prefix: bool = True
    """Whether the start of the answer is there."""
    question_first: bool = False
    """Whether the last line of the message, which is the question, comes first."""

    def __post_init__(self) -> None:
        one_of("after_question", self.after_question, tuple(AFTER_QUESTION))
        for name in ("answer_prefix", "question_first"):
            instance(name, getattr(self, name), bool, "True or False")

    def of(self, draft: Draft) -> Draft:
        """The draft, put like this."""
        message = draft.message
        if self.question_first:
            text, _, question = message.rpartition("\n")
            message = f"{question}\n\n{text.rstrip()}"
        message += AFTER_QUESTION[self.after_question]
        return draft._replace(message=message, answer_prefix=draft.answer_prefix if self.answer_prefix else "")


USUAL = Wording()


@dataclass(frozen=True)
class Recipe:
    """One sample of a task, still of any length. Everything random is settled: the same count gives the same draft."""

    draft: Callable[[int], Draft]
    """The prompt with so many units (sentences, words, pairs, documents, characters)."""
    least: int = 0
    """Fewest units that still make the task."""
    most: int | None = None
    """Most units there are; None where they never run out."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with its references."""

    task: str
    length: Count
    """Tokens that the prompt was to have."""
    index: Count
    """Which sample of its task and length, from 0."""
    prompt: str
    """The prompt as the model reads it: chat template, message and start of the answer."""
    prompt_tokens: Count
    """Tokens that it has: at most `length`."""
    references: Annotated[tuple[str, ...], AtLeast(1)]
    """What a right answer contains."""
    max_new_tokens: Annotated[int, Range(1)]
    """Most tokens of the answer."""
    depth: Share | None = field(default=None)
    """Place of the one needle, 0 start to 1 end; None where there is not exactly one."""

    def to_dict(self) -> dict[str, Any]:
        """The sample in JSON's own types."""
        return dataclasses.asdict(self) | {"references": list(self.references)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`; raises FlexASLError for anything else."""
        sample: Sample = fit(cls, data)
        return sample


def check_samples(samples: int, each: int) -> None:
    """Raise FlexASLError for so many samples of so many tasks and lengths that their list alone would not end."""
    if samples * each > MOST_PROMPTS:
        raise FlexASLError(
            f"samples={samples} makes {samples * each:,} prompts in all; give at most {MOST_PROMPTS // each:,}"
        )


def fill(recipe: Recipe, tokenizer: Any, tokens: int, wording: Wording = USUAL) -> tuple[Draft, str, int]:
    """The longest draft whose prompt has at most `tokens` tokens, that prompt, and its tokens.

    Raises FlexASLError, which says how many are needed, where not even the shortest fits.
    """

    def prompt(units: int) -> tuple[Draft, str, int]:
        draft = wording.of(recipe.draft(units))
        text = render(tokenizer, draft.message, draft.answer_prefix)
        return draft, text, len(encode(tokenizer, text))

    best = prompt(recipe.least)
    if best[2] > tokens:
        raise FlexASLError(f"length={tokens} is too short; give at least {best[2]} tokens")
    low, over, over_tokens, tries = recipe.least, None, 0, 0
    while low != recipe.most and (over is None or over - low > 1):
        if over is None:  # double until it no longer fits
            units = low + 2**tries if recipe.most is None else min(low + 2**tries, recipe.most)
        else:  # tokens grow nearly evenly with units: the estimate is as good as right, and halving keeps it honest
            share = (tokens - best[2]) / (over_tokens - best[2]) if tries % 2 else 0.5
            units = min(max(low + int(share * (over - low)), low + 1), over - 1)
        tries += 1
        found = prompt(units)
        if recipe.most is None and found[2] <= tokens and len(found[1]) > MOST_CHARACTERS * max(tokens, 1):
            raise FlexASLError(
                f"the tokenizer makes {found[2]} tokens of {len(found[1]):,} characters, so it leaves text out, and no "
                f"prompt has length={tokens}"
            )
        if found[2] <= tokens:
            low, best = units, found
        else:
            over, over_tokens = units, found[2]
    return best
