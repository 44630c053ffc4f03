"""From a model to settings: prompts, one read of each, candidates, the choice, and the check of it by answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from flexasl import checks
from flexasl.checks import instance, integer, several
from flexasl.config import LOOKUP_SCORES, ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.patching import patch, without_peft
from flexasl.tools.calibration.checking import ANSWER_TOKENS, CHOSEN, DEFAULT, FULL, answered, falls_short
from flexasl.tools.calibration.choosing import Judged, candidates, choose, default_of, settings_of
from flexasl.tools.calibration.evidence import Calibration, Used
from flexasl.tools.calibration.recording import Prompt, locate, record
from flexasl.tools.calibration.tables import Table
from flexasl.tools.evaluation.costs import layer_costs
from flexasl.tools.evaluation.runner import model_name
from flexasl.tools.evaluation.samples import USUAL, Wording, check_samples
from flexasl.tools.evaluation.sources import Sources
from flexasl.tools.evaluation.tasks import build, find_task

TASKS = ("needle", "niah_multikey_1", "niah_multivalue", "by_meaning", "uniform")
UNSEEN = "niah_single_2"
SAMPLES, LENGTH, SELECT_TOKENS = 5, 1536, 256
WORDINGS = (USUAL, Wording(after_question="rules", answer_prefix=False))
"""How prompts end, in turn."""
PROMPTS, READS, CANDIDATES, ANSWERS = "prompts", "reads", "candidates", "answers"
T = TypeVar("T")


@dataclass(frozen=True)
class _Asked:
    """A prompt to be made."""

    task: str
    index: int
    wording: Wording


def calibrate(
    model: Any,
    tokenizer: Any,
    config: ASLConfig | None = None,
    *,
    tasks: Sequence[str] = TASKS,
    unseen: str | None = UNSEEN,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    sources: Sources | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Calibration:
    """Finds the settings of adaptive layer selection that keep the answer's tokens at the least prefill cost, and
    checks them by answers to other prompts.

    The choice is made by replaying the rule on one read of each prompt; half of the prompts have rules for the answer
    after the question. Then the model answers half as many other prompts, with its full cache, by the default and by
    the chosen settings. Where the chosen settings lose answers that the default does not lose, the default is kept.

    Args:
        model: A transformers model in eval mode.
        tokenizer: Its tokenizer, a fast one.
        config: Settings that are not searched for, above all `select_tokens`. What is searched for is ignored in it.
            None: `ASLConfig(select_tokens=256)`.
        tasks: Tasks of `flexasl.evaluation` whose answers stand in the prompt.
        unseen: A task that is only answered, as many prompts as of each of the others. None: no such task.
        samples: Prompts of each task to choose on.
        length: Most tokens of a prompt.
        seed: Chooses the prompts.
        sources: Files that tasks need. None: none.
        on_progress: Called with a stage, how much of it is done, and how much there is.

    Returns:
        The settings with their evidence; `calibration.config` is for `flexasl.patch`.

    Raises:
        FlexASLError: Before the model runs: the model cannot be patched, there are too few samples, or prompts do not
            fit the context or lose no token to the budget.

    Examples:
        >>> calibration = flexasl.calibrate(model, tokenizer, length=4096)  # doctest: +SKIP
        >>> patch = flexasl.patch(model, calibration.config, tokenizer=tokenizer)  # doctest: +SKIP
    """
    from flexasl.integrations.transformers.fingerprint import calibrated_for
    from flexasl.tools import run

    config = instance("config", config, (ASLConfig, type(None)), "an ASLConfig or None")
    config = default_of(config or ASLConfig(select_tokens=SELECT_TOKENS)).scored(LOOKUP_SCORES)
    config = config.replace(calibrated_for=None)
    sources = instance("sources", sources, (Sources, type(None)), "a flexasl.evaluation.Sources or None") or Sources()
    tasks = tuple(dict.fromkeys(several("tasks", tasks, str, "tasks such as 'needle'")))
    samples, length, seed = integer("samples", samples, 1), integer("length", length, 1), integer("seed", seed)
    checks.tokenizer(tokenizer)
    model = without_peft(model)
    _check(model)
    check_tasks(tasks, unseen, samples)
    patch(model, config, profile=False).remove()
    made_for = calibrated_for(model, model_name(model))
    run.check_fits(model, length, ANSWER_TOKENS)
    choosing, checking = _plan(tasks, unseen, samples)
    prompts = [
        locate(tokenizer, build(one.task, tokenizer, length, seed, one.index, sources, one.wording), sentences=True)
        for one in _counted(PROMPTS, [*choosing, *checking], on_progress)
    ]
    _check_budget(config, prompts)
    run.check_tokens(model, max(max(prompt.ids) for prompt in prompts))
    judged, fixed = _replayed(model, tokenizer, config, prompts[: len(choosing)], on_progress)
    default, chosen = judged[0], choose(judged, judged[0])
    assert default.rule is not None and chosen.rule is not None
    rules = {DEFAULT: default.rule} | ({} if chosen is default else {CHOSEN: chosen.rule})
    others = prompts[len(choosing) :]
    said = answered(model, tokenizer, others, rules, layer_costs(model))
    by_prompt = [next(said) for _ in _counted(ANSWERS, others, on_progress)]
    answers = {name: tuple(one[name] for one in by_prompt) for name in (FULL, *rules)}
    answers.setdefault(CHOSEN, answers[DEFAULT])
    kept_default = falls_short(answers[FULL], answers[CHOSEN], answers[DEFAULT])
    taken = default.rule if kept_default else chosen.rule
    versions = {name: version(name) for name in ("flexasl", "torch", "transformers")}
    return Calibration(
        config=config.replace(**settings_of(taken), calibrated_for=made_for),
        about={**dataclasses.asdict(made_for), "length": length, "seed": seed, "versions": versions},
        prompts=_used(choosing, prompts),
        checked=_used(checking, others),
        candidates=tuple(judged),
        chosen=chosen,
        default=default,
        fixed_layers=fixed,
        fixed_layer=choose(fixed),
        answers=answers,
        kept_default=kept_default,
    )


def calibrate_visibly(model: Any, tokenizer: Any, **arguments: Any) -> Calibration:
    """`calibrate` with a bar for each stage on standard error, where that is a terminal.

    Args:
        model: As for `calibrate`.
        tokenizer: As for `calibrate`.
        arguments: All other arguments of `calibrate` but `on_progress`.
    """
    from flexasl.tools.cli.terminal import counted_progress

    with counted_progress(hidden=False) as advance:
        return calibrate(model, tokenizer, **{"on_progress": advance} | arguments)


def _plan(tasks: Sequence[str], unseen: str | None, samples: int) -> tuple[list[_Asked], list[_Asked]]:
    """The prompts to choose on, and those to check on."""
    checks_each = max(1, samples // 2)

    def asked(name: str, place: int, indices: range) -> list[_Asked]:
        return [_Asked(name, index, WORDINGS[(place + index) % len(WORDINGS)]) for index in indices]

    seen = [asked(name, place, range(samples + checks_each)) for place, name in enumerate(tasks)]
    last = asked(unseen, len(tasks), range(checks_each)) if unseen else []
    return [one for own in seen for one in own[:samples]], [one for own in seen for one in own[samples:]] + last


def _used(asked: Sequence[_Asked], prompts: Sequence[Prompt]) -> tuple[Used, ...]:
    return tuple(
        Used(one.task, one.index, len(prompt.ids), one.wording.after_question or "")
        for one, prompt in zip(asked, prompts)
    )


def _replayed(
    model: Any,
    tokenizer: Any,
    config: ASLConfig,
    prompts: Sequence[Prompt],
    on_progress: Callable[[str, int, int], None],
) -> tuple[list[Judged], tuple[Judged, ...]]:
    """What all candidates, the default first, and all fixed layers make of the prompts, each of which is read once."""
    on_progress(READS, 0, len(prompts))
    recordings, ranking_layers = record(
        model, prompts, config, tokenizer, lambda done: on_progress(READS, done, len(prompts))
    )
    costs = layer_costs(model)
    tables = [Table(recording, costs, ranking_layers) for recording in recordings]
    rules = candidates(config, len(costs), ranking_layers)
    judged = [
        Judged(name=f"candidate {place}", rule=rule, outcomes=tuple(table.outcome(rule) for table in tables))
        for place, rule in enumerate(_counted(CANDIDATES, rules, on_progress))
    ]
    return judged, _fixed_layers(tables, rules[0])


def _counted(stage: str, things: Sequence[T], on_progress: Callable[[str, int, int], None]) -> Iterator[T]:
    """The things, one by one; on_progress is called before each, and after the last."""
    for done, thing in enumerate(things):
        on_progress(stage, done, len(things))
        yield thing
    on_progress(stage, len(things), len(things))


def _fixed_layers(tables: Sequence[Table], default: ASLConfig) -> tuple[Judged, ...]:
    """Selection once, at each layer, whatever was looked up."""
    fixed = []
    for layer in tables[0].ranking_layers:
        assert default.score_from is not None
        at: dict[str, Any] = {"stages": (), "score_from": min(layer, default.score_from)}
        at |= dict.fromkeys(("min_layer", "min_layer_unasked", "max_layer"), layer)
        outcomes = tuple(table.outcome(default.replace(**at)) for table in tables)
        fixed.append(Judged(name=f"fixed layer {layer}", rule=None, outcomes=outcomes))
    return tuple(fixed)


def _check(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"model is a {type(model).__name__}; calibration takes a transformers causal language model"
        )


def check_tasks(tasks: Sequence[str], unseen: str | None, samples: int) -> None:
    """Raises FlexASLError where settings cannot be chosen on such prompts."""
    if not tasks:
        raise FlexASLError("tasks=() is empty; give at least one task to choose settings on")
    for name in (*tasks, *([] if unseen is None else [unseen])):
        find_task(name)
    if unseen in tasks:
        raise FlexASLError(f"unseen={unseen!r} is among the tasks that settings are chosen on; give another, or None")
    integer("samples", samples, 1)
    check_samples(samples, len(tasks) + (unseen is not None))


def _check_budget(config: ASLConfig, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        tokens = len(prompt.ids)
        if config.token_budget(tokens) >= tokens:
            raise FlexASLError(
                f"select_tokens={config.select_tokens} is not smaller than a prompt of task {prompt.task!r}, which has "
                f"{tokens} tokens; give a smaller select_tokens or a greater length"
            )
