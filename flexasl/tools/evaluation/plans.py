"""What is to be evaluated, checked before any model is loaded: prompts, policies and budgets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from flexasl.checks import instance, integer, one_of, several
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.policies import Policy
from flexasl.policies.grammar import PAPER, Named, number, parse, parse_several, parts
from flexasl.tools.evaluation.samples import MOST_PROMPTS, USUAL, Wording, check_samples
from flexasl.tools.evaluation.sources import Sources
from flexasl.tools.evaluation.tasks import check_supply, find_suite, find_task, tasks

FULL = "full"
RANK_BY = ("policy", "question", "window")
OWN_WORDS = 32
"""Tokens that an answer gets beyond its benchmark's, where it has no start."""
_ELSEWHERE = {"select_tokens": "--budget sets it"}


@dataclass(frozen=True)
class Item:
    """One prompt of a plan."""

    task: str
    length: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the results: a policy with its settings, at one budget."""

    label: str
    """Its name in results and pictures, such as `asl@256`."""
    policy: Policy | None = None
    """None for the unpatched model, with its full cache."""
    config: ASLConfig | None = None
    spec: str = FULL
    """The policy as it was given."""
    budget: int | float | None = None
    by_question: bool = False
    """Whether the question's tokens rank, where one is found; else the window's do."""
    profile: Literal[False] | None = None
    """As for `flexasl.patch`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be evaluated. Made by `plan`, which checks it."""

    suite: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    settings: tuple[Setting, ...]
    """The unpatched model first."""
    seed: int
    sources: Sources
    config: ASLConfig | None = None
    """Settings that policies of adaptive selection start from, where some were given."""
    answer_tokens: int | None = None
    """Most tokens of an answer, where its benchmark allows more; None: as the benchmark has it."""
    rank_by: str = "policy"
    """Of `RANK_BY`."""
    profile: bool = True
    """Whether the model's profile fills in what settings leave open."""
    wording: Wording = USUAL
    """How prompts end."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks of the suite that need a file which was not given, and what they need."""

    def max_new_tokens(self, task: str) -> int:
        """Most tokens of an answer to this task."""
        most = find_task(task).max_new_tokens + (0 if self.wording.answer_prefix else OWN_WORDS)
        return most if self.answer_tokens is None else min(most, self.answer_tokens)

    def items(self, rank: int = 0, world_size: int = 1) -> list[Item]:
        """The prompts that one process of so many answers; together they answer each once."""
        every = [
            Item(task, length, index) for index in range(self.samples) for length in self.lengths for task in self.tasks
        ]
        # Turned by one each round: else a process would get the same task and length again and again.
        return [item for place, item in enumerate(every) if (place + place // world_size) % world_size == rank]


def plan(
    suite: str = "quick",
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
    policies: Sequence[str] = ("asl", "fixed_layer", "snapkv"),
    budgets: Sequence[int | float] | None = None,
    seed: int = 0,
    config: ASLConfig | None = None,
    sources: Sources | None = None,
    answer_tokens: int | None = None,
    rank_by: str = "policy",
    profile: bool = True,
    after_question: str | None = None,
    answer_prefix: bool = True,
    question_first: bool = False,
) -> Plan:
    """What is to be evaluated, checked. What is None comes from the suite.

    The unpatched model is always in the plan; `full` names it.

    Args:
        suite: `"quick"`, `"niah"`, `"recall"`, `"ruler"` or `"infinitebench"`.
        tasks: Names of tasks, of any suite.
        lengths: Lengths of prompts, in tokens.
        samples: Prompts of each task and length.
        policies: Names of `flexasl.policies.POLICIES`, or `paper` for the published rule of ASL, alone or with
            settings: `fixed_layer:layer=15`, `asl:tau=0.3,min_layer=10`.
        budgets: Values of `ASLConfig.select_tokens`: tokens, or shares of the prompt.
        seed: Chooses the prompts.
        config: Settings that `asl` and `asl_two_pass` start from; their own settings and the budget win over it.
        sources: Files that tasks need. None: none.
        answer_tokens: Most tokens of an answer; it cuts answers that would be longer, as the quick suite's own tasks
            are cut.
        rank_by: What ranks the tokens of a prompt: `"question"`, `"window"`, or `"policy"`: the question where
            adaptive selection starts from `config`, the window under `paper` and the other policies, as in their
            papers.
        profile: Whether settings that are left open come from the model's profile, where there is one.
        after_question: Text after the question of every prompt: rules for the answer, some 60 tokens of them
            (`"rules"`), 30 (`"rules-30"`) or 120 (`"rules-120"`). None: none.
        answer_prefix: Whether prompts end with the start of the answer. Without it an answer gets some more tokens.
        question_first: Whether the question stands before the text. Tasks that come from a user's file do not take it.

    Raises:
        FlexASLError: An argument has a value that it cannot have; the message names it and what is allowed.

    Examples:
        >>> made = plan("ruler", lengths=[4096], policies=["asl", "fixed_layer:layer=15"], budgets=[512], samples=2)
        >>> [setting.label for setting in made.settings]
        ['full', 'asl@512', 'fixed_layer:layer=15@512']
        >>> len(made.items()), made.items()[0].length  # prompts: two of each task of the suite
        (22, 4096)
    """
    instance("config", config, (ASLConfig, type(None)), "an ASLConfig or None")
    sources = instance("sources", sources, (Sources, type(None)), "a flexasl.evaluation.Sources or None") or Sources()
    defaults = find_suite(suite)
    chosen, left_out = _tasks(defaults.tasks, tasks, sources)
    lengths = _distinct("lengths", lengths, Integral, "numbers of tokens, such as 4096", defaults.lengths)
    budgets = _distinct("budgets", budgets, Real, "counts of tokens (512) or shares (0.25)", defaults.budgets)
    samples = defaults.samples if samples is None else few("samples", samples, MOST_PROMPTS)
    if answer_tokens is None and tasks is None:
        answer_tokens = defaults.answer_tokens
    for length in lengths:
        if isinstance(length, bool) or length < 1:
            raise FlexASLError(f"length={length!r} is not a number of tokens; give a whole number of at least 1")
    one_of("rank_by", rank_by, RANK_BY)
    wording = Wording(after_question, answer_prefix, question_first)
    answer_tokens = None if answer_tokens is None else few("answer_tokens", answer_tokens)
    check_samples(samples, len(chosen) * len(lengths))
    for name in chosen:
        check_supply(find_task(name), sources, samples)
        if question_first and find_task(name).needs is not None:
            raise FlexASLError(
                f"question_first=True does not go with task {name!r}, whose questions a file words; give tasks of the "
                "package's own"
            )
    return Plan(
        suite=suite,
        tasks=chosen,
        lengths=lengths,
        samples=samples,
        settings=_settings(
            several("policies", policies, str, "policies such as 'asl'"), budgets, config, rank_by, profile
        ),
        seed=integer("seed", seed),
        sources=sources,
        config=config,
        answer_tokens=answer_tokens,
        rank_by=rank_by,
        profile=instance("profile", profile, bool, "True or False"),
        wording=wording,
        left_out=left_out,
    )


def parse_lengths(text: str) -> list[int]:
    """`"1k,2k,4096"` as tokens; k is 1,024."""
    return [_length(part) for part in parts("lengths", text)]


def parse_budgets(text: str) -> list[int | float]:
    """`"256,4k,0.25"` as amounts: counts of tokens, shares of the prompt."""
    budgets = []
    for part in parts("budget", text):
        value = number(part)
        if value is None:
            raise FlexASLError(f"budget={part} is not an amount; give a count of tokens (512, 4k) or a share (0.25)")
        budgets.append(value)
    return budgets


def parse_depths(text: str) -> tuple[float, ...]:
    """`"0,0.5,1"` as shares of the document."""
    try:
        return tuple(float(part) for part in parts("depths", text))
    except ValueError as error:
        raise FlexASLError(f"depths={text!r} are not shares of the document; give numbers in [0, 1]") from error


def parse_policies(text: str) -> list[str]:
    """`"asl:tau=0.3,min_layer=10,full"` as policies with their settings: two here."""
    return parse_several(text)


def parse_names(name: str, text: str) -> list[str]:
    """Names between commas."""
    return parts(name, text)


def _length(text: str) -> int:
    value = number(text) if re.fullmatch(r"\d+(\.\d+)?k|\d+", text, re.IGNORECASE) else None
    if not isinstance(value, int):
        raise FlexASLError(f"length={text} is not a number of tokens; give one such as 4096 or 4k")
    return value


def few(name: str, value: Any, most: int | None = None) -> int:
    """A number of things, of which there is at least one."""
    count = integer(name, value)
    if count < 1:
        raise FlexASLError(f"{name}={count} is too few; give at least 1")
    return integer(name, count, most=most)


def _distinct(name: str, values: Any, kind: Any, allowed: str, defaults: Sequence[Any]) -> tuple[Any, ...]:
    """The values, each once; the defaults where None was given."""
    found = tuple(dict.fromkeys(defaults if values is None else several(name, values, kind, allowed)))
    if not found:
        raise FlexASLError(f"{name} is empty; give {allowed}")
    return found


def _tasks(
    suite: tuple[str, ...], named: Sequence[str] | None, sources: Sources
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The tasks to run, and those of the suite that lack a file; a task that is named must have it."""
    if named is not None:
        chosen = _distinct("tasks", named, str, "tasks such as 'needle'", ())
        return tuple(find_task(name).name for name in chosen), {}
    lacking = {name: tasks()[name].needs or "" for name in suite if tasks()[name].supply(sources) == 0}
    return tuple(name for name in suite if name not in lacking), lacking


def _settings(
    policies: Iterable[str], budgets: Sequence[int | float], base: ASLConfig | None, rank_by: str, profile: bool
) -> tuple[Setting, ...]:
    settings = {FULL: Setting(label=FULL)}
    for spec in policies:
        name, _, rest = spec.partition(":")
        if name == FULL:
            if rest:
                raise FlexASLError(f"policy={spec!r} is the unpatched model, which has no settings; give 'full'")
            continue
        named = parse(spec, _ELSEWHERE)
        if len(budgets) > 1 and not named.policy.prunes_tokens and named.settings.get("kv_budget") is not None:
            raise FlexASLError(
                f"policy={spec!r} has a budget of its own, the same at each of {budgets}; give one of them"
            )
        for budget in budgets:
            label = f"{spec}@{budget}"
            settings[label] = _setting(label, named, budget, base, rank_by, profile)
    if base is not None and len(settings) > 1 and not any(_starts(one.policy, one.spec) for one in settings.values()):
        raise FlexASLError(
            "config has no effect: of the policies, 'asl' and 'asl_two_pass' start from it, and neither is there; give "
            "settings with a policy, such as 'snapkv:kernel_size=5'"
        )
    return tuple(settings.values())


def _setting(
    label: str, named: Named, budget: int | float, base: ASLConfig | None, rank_by: str, profile: bool
) -> Setting:
    spec = named.text
    adaptive = _starts(named.policy, spec)
    start = base if base is not None and adaptive else ASLConfig()
    config = named.onto(start, {"select_tokens": budget})
    named.policy.check(config)
    by_question = rank_by == "question" or (rank_by == "policy" and adaptive)
    return Setting(
        label=label,
        policy=named.policy,
        config=config,
        spec=spec,
        budget=budget,
        by_question=by_question,
        profile=None if profile else False,
    )


def _starts(policy: Policy | None, spec: str) -> bool:
    """Whether it starts from the plan's config, which says where adaptive selection selects."""
    return policy is not None and policy.takes_profiles and spec.partition(":")[0] != PAPER
