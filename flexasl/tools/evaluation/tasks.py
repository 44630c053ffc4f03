"""The table of tasks: how a sample is made, how many tokens an answer gets, how it is scored, what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from flexasl import checks
from flexasl.checks import instance, integer
from flexasl.errors import FlexASLError
from flexasl.tools.evaluation import infinitebench, recall, ruler, scoring
from flexasl.tools.evaluation.haystack import hide
from flexasl.tools.evaluation.samples import USUAL, Draft, Recipe, Sample, Wording, fill
from flexasl.tools.evaluation.sources import HOTPOTQA, SQUAD, Sources
from flexasl.tools.text import INTRODUCTION, magic_number

Make = Callable[[Random], Recipe]


class Which(NamedTuple):
    """Which sample of a task is to be made."""

    task: str
    length: int
    seed: int
    number: int

    def random(self) -> Random:
        """The source of everything random in this sample."""
        return Random(f"{self.task}/{self.length}/{self.seed}/{self.number}")

    def order(self) -> str:
        """The seed of the order in which a file's records are taken: the same for all lengths and samples."""
        return f"{self.task}/{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a benchmark."""

    name: str
    """Its name, as `--tasks` takes it."""
    about: str
    """What it asks, in a few words."""
    max_new_tokens: int
    """Tokens that an answer gets, as its benchmark has it."""
    score: scoring.Score
    """From an answer and the references to a number in [0, 1]."""
    recipe: Callable[[Which, Sources], Recipe]
    needs: str | None = None
    """What the user must give, as a sentence names it; None where nothing is needed."""
    supply: Callable[[Sources], int | None] = lambda sources: None
    """How many samples the user's file holds: 0 where there is no such file, None where samples never run out."""


class Suite(NamedTuple):
    """Tasks that are run together, and how they are run if nothing else is said."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    samples: int = 20
    budgets: tuple[int, ...] = (256, 512)
    answer_tokens: int | None = None
    """Most tokens of an answer; None: as the benchmark has it."""


def tasks(suite: str | None = None) -> dict[str, Task]:
    """Every task by its name, or those of a suite.

    Raises:
        FlexASLError: The suite is not known.

    Examples:
        >>> len(tasks()), list(tasks("niah"))
        (28, ['needle'])
        >>> tasks("ruler")["vt"].score("ABCDE", ("ABCDE", "FGHIJ"))
        0.5
    """
    if suite is None:
        return dict(TASKS)
    return {name: TASKS[name] for name in find_suite(suite).tasks}


def find_suite(name: str) -> Suite:
    """The suite of that name; raises FlexASLError where there is none."""
    if not isinstance(name, str) or name not in SUITES:
        raise FlexASLError(f"suite={name!r} is not known; give one of {', '.join(SUITES)}")
    return SUITES[name]


def find_task(name: str) -> Task:
    """The task of that name; raises FlexASLError where there is none."""
    if not isinstance(name, str) or name not in TASKS:
        raise FlexASLError(f"task={name!r} is not known; give one of {', '.join(TASKS)}")
    return TASKS[name]


def build(
    task: str,
    tokenizer: Any,
    length: int,
    seed: int = 0,
    index: int = 0,
    sources: Sources | None = None,
    wording: Wording = USUAL,
) -> Sample:
    """One prompt of a task: the longest of at most `length` tokens, chat template and start of the answer included.

    The same arguments give the same sample.

    Args:
        task: Name of a task, see `tasks`.
        tokenizer: The tokenizer of the model that will read the prompt.
        length: Most tokens of the prompt.
        seed: Chooses the samples.
        index: Which sample, from 0.
        sources: Files that tasks need. None: none.
        wording: How the prompt ends.

    Raises:
        FlexASLError: The task is not known, `length` is too short for it, or it needs a file that `sources` lacks or
            that has too few records.
    """
    sources = instance("sources", sources, (Sources, type(None)), "a flexasl.evaluation.Sources or None") or Sources()
    chosen, tokenizer = find_task(task), checks.tokenizer(tokenizer)
    length, seed, index = integer("length", length, 1), integer("seed", seed), integer("index", index, 0)
    check_supply(chosen, sources, index + 1)
    try:
        draft, prompt, tokens = fill(
            chosen.recipe(Which(task, length, seed, index), sources), tokenizer, length, wording
        )
    except FlexASLError as error:
        raise FlexASLError(f"task={task!r}: {error}") from error
    return Sample(
        task=task,
        length=length,
        index=index,
        prompt=prompt,
        prompt_tokens=tokens,
        references=draft.references,
        max_new_tokens=chosen.max_new_tokens,
        depth=draft.depth,
    )


def check_supply(task: Task, sources: Sources, samples: int) -> None:
    """Raise FlexASLError where the sources do not hold so many samples of the task."""
    held = task.supply(sources)
    if held == 0:
        raise FlexASLError(f"task={task.name!r} needs {task.needs}")
    if held is not None and held < samples:
        raise FlexASLError(f"samples={samples} is more than the file of task {task.name!r} holds; give at most {held}")


def _needle(which: Which, sources: Sources) -> Recipe:
    rng = which.random()
    fact = magic_number(rng.randrange(2**31))
    depth = sources.depths[which.number % len(sources.depths)]
    hay = sources.prose.read_from(rng)

    def draft(units: int) -> Draft:
        document = hide([fact.needle], [depth], hay.first(units))
        return Draft(f"{INTRODUCTION}\n\n{document}\n\n{fact.question}", fact.answer_prefix, (fact.answer,), depth)

    return Recipe(draft)


def _niah(name: str, about: str, **settings: Any) -> Task:
    return Task(
        name=f"niah_{name}",
        about=about,
        max_new_tokens=128,
        score=scoring.match_all,
        recipe=lambda which, sources: ruler.niah(which.random(), sources, **settings),
    )


def _ruler(name: str, about: str, max_new_tokens: int, recipe: Callable[[Which], Recipe]) -> Task:
    return Task(
        name=name,
        about=about,
        max_new_tokens=max_new_tokens,
        score=scoring.match_all,
        recipe=lambda which, sources: recipe(which),
    )


def _qa(name: str, kind: str) -> Task:
    def recipe(which: Which, sources: Sources) -> Recipe:
        questions = sources.questions(kind)
        assert questions is not None  # `supply` has been asked
        return ruler.question_answering(which.random(), questions, which.order(), which.number)

    def supply(sources: Sources) -> int:
        questions = sources.questions(kind)
        return len(questions.questions) if questions else 0

    return Task(
        name=name,
        about=f"a question over documents, from a file in {kind}'s format",
        max_new_tokens=32,
        score=scoring.match_part,
        recipe=recipe,
        needs=f"questions in {kind}'s format; give such a file with --qa-file",
        supply=supply,
    )


def _retrieval(
    name: str, about: str, max_new_tokens: int, score: scoring.Score, make: Callable[[Random], Recipe]
) -> Task:
    return Task(
        name=name,
        about=about,
        max_new_tokens=max_new_tokens,
        score=score,
        recipe=lambda which, sources: make(which.random()),
    )


def _from_file(name: str, about: str, max_new_tokens: int, score: scoring.Score) -> Task:
    def recipe(which: Which, sources: Sources) -> Recipe:
        return infinitebench.from_file(name, sources.records(name) or [], which.order(), which.number)

    return Task(
        name=name,
        about=about,
        max_new_tokens=max_new_tokens,
        score=score,
        recipe=recipe,
        needs=f"InfiniteBench's file {name}.jsonl; give its folder with --infinitebench",
        supply=lambda sources: len(sources.records(name) or []),
    )


_NEEDLE = Task(
    name="needle",
    about="one sentence in prose, over length and depth",
    max_new_tokens=16,
    score=scoring.match_all,
    recipe=_needle,
)
_RULER = (
    _niah("single_1", "one number in noise", haystack="noise"),
    _niah("single_2", "one number in prose", haystack="prose"),
    _niah("single_3", "one identifier in prose", haystack="prose", value="uuid"),
    _niah("multikey_1", "one of four keys in prose", haystack="prose", keys=4),
    _niah("multikey_2", "one key among nothing but others", haystack="needles"),
    _niah("multikey_3", "one identifier among nothing but others", haystack="needles", key="uuid", value="uuid"),
    _niah("multivalue", "four values of one key", haystack="prose", values=4),
    _niah("multiquery", "the values of four keys", haystack="prose", keys=4, queries=4),
    _ruler("vt", "variables that share a value", 30, lambda which: ruler.variable_tracking(which.random())),
    _ruler("cwe", "the common words of a list", 120, lambda which: ruler.common_words(which.random(), which.length)),
    _ruler("fwe", "the three frequent words of a coded text", 50, lambda which: ruler.frequent_words(which.random())),
    _qa("qa_1", SQUAD),
    _qa("qa_2", HOTPOTQA),
)
_INFINITEBENCH = (
    _retrieval("passkey", "five digits in noise", 6, scoring.first_number, infinitebench.passkey),
    _retrieval("number_string", "ten digits in noise", 12, scoring.first_number, infinitebench.number_string),
    _retrieval("kv_retrieval", "one value of a JSON object", 50, scoring.one_word, infinitebench.key_value),
    _from_file("longbook_sum_eng", "summary of a book", 1200, scoring.rouge_l_sum),
    _from_file("longbook_choice_eng", "multiple choice on a book", 40, scoring.chosen_letter),
    _from_file("longbook_qa_eng", "questions on a book", 40, scoring.word_f1),
    _from_file("longbook_qa_chn", "questions on a Chinese book", 40, scoring.character_f1),
    _from_file("longdialogue_qa_eng", "the speaker in a dialogue", 40, scoring.one_name),
    _from_file("math_find", "a number of a list", 3, scoring.first_value),
    _from_file("math_calc", "intermediate values of an expression", 30000, scoring.leading_share),
    _from_file("code_run", "the value of a function of many", 5, scoring.last_integer),
    _from_file("code_debug", "the function with a mistake", 5, scoring.chosen_function),
)
_RECALL = (
    Task(
        name="by_meaning",
        about="who does something, said in other words",
        max_new_tokens=32,
        score=scoring.match_all,
        recipe=lambda which, sources: recall.by_meaning(which.random(), sources, which.seed + which.number),
    ),
    Task(
        name="uniform",
        about="one of many sentences of one kind",
        max_new_tokens=32,
        score=scoring.match_all,
        recipe=lambda which, sources: recall.uniform(which.random(), which.seed + which.number),
    ),
)
TASKS = {task.name: task for task in (_NEEDLE, *_RULER, *_RECALL, *_INFINITEBENCH)}
SUITES = {
    "ruler": Suite(tuple(task.name for task in _RULER)),
    "infinitebench": Suite(tuple(task.name for task in _INFINITEBENCH)),
    "niah": Suite(("needle",)),
    "recall": Suite(tuple(task.name for task in _RECALL)),
    "quick": Suite(("needle", "number_string", "passkey", "niah_multivalue"), (1024,), 5, (256,), 64),
}
