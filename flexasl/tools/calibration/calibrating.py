"""From a model to settings: prompts, one run of each, candidates, the choice, and the check of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flexasl import checks
from flexasl.checks import instance, integer, several
from flexasl.config import OWN_SCORES, ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.patching import patch, without_peft
from flexasl.replaying import replay_scores
from flexasl.tools.calibration.choosing import Judged, candidates, choose, paper_of, settings_of
from flexasl.tools.calibration.evidence import Calibration
from flexasl.tools.calibration.recording import Prompt, Recording, locate, record
from flexasl.tools.calibration.tables import Table, holds_answers
from flexasl.tools.evaluation.costs import layer_costs
from flexasl.tools.evaluation.runner import model_name
from flexasl.tools.evaluation.samples import check_samples
from flexasl.tools.evaluation.sources import Sources
from flexasl.tools.evaluation.tasks import build, find_task

TASKS = ("needle", "passkey", "number_string", "niah_multikey_1")
UNSEEN = "niah_single_2"
SAMPLES, LENGTH, SELECT_TOKENS = 6, 1536, 256
PROMPTS, RUNS, CANDIDATES = "prompts", "runs", "candidates"
T = TypeVar("T")


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
    """Finds the settings of adaptive layer selection that keep the answer's tokens at the least prefill cost.

    model is a transformers model, tokenizer a fast one. config says what is not looked for, above all `select_tokens`
    (default: 256); its `SETTINGS` are ignored. tasks are those of `flexasl.evaluation` whose answers stand in the
    prompt, each with so many samples of at most `length` tokens: the choice is made on the even ones and checked on the
    odd ones, and on all of the task `unseen` (None: no such task). Each prompt is read once, with its full cache; no
    answer is generated. on_progress gets a stage, how much of it is done, and how much there is.

    Raises FlexASLError, before the model runs, for a model that cannot be patched, too few samples, and prompts that
    do not fit the context or lose no token to the budget.
    """
    from flexasl.integrations.transformers.fingerprint import calibrated_for
    from flexasl.tools import run

    config = instance("config", config, (ASLConfig, type(None)), "an ASLConfig or None")
    config = (config or ASLConfig(select_tokens=SELECT_TOKENS)).scored(OWN_SCORES).replace(calibrated_for=None)
    if config.rule == "lookup":
        raise FlexASLError("settled_by='lookup' is not calibrated; give settled_by='variance', or None")
    sources = instance("sources", sources, (Sources, type(None)), "a flexasl.evaluation.Sources or None") or Sources()
    tasks = tuple(dict.fromkeys(several("tasks", tasks, str, "tasks such as 'needle'")))
    samples, length, seed = integer("samples", samples), integer("length", length, 1), integer("seed", seed)
    checks.tokenizer(tokenizer)
    model = without_peft(model)
    _check(model)
    check_tasks(tasks, unseen, samples)
    patch(model, config).remove()
    made_for = calibrated_for(model, model_name(model))
    run.check_fits(model, length, 1)
    asked = [(task, index) for index in range(samples) for task in (*tasks, *([unseen] if unseen else []))]
    prompts = [
        locate(tokenizer, build(task, tokenizer, length, seed, index, sources))
        for task, index in _counted(PROMPTS, asked, on_progress)
    ]
    _check_budget(config, prompts)
    on_progress(RUNS, 0, len(prompts))
    recordings, ranking_layers = record(model, prompts, config, lambda done: on_progress(RUNS, done, len(prompts)))
    costs = layer_costs(model)
    tables = [Table(recording, config, costs, ranking_layers) for recording in recordings]
    rules = candidates(config, len(costs), ranking_layers)
    judged = [
        _judge(f"candidate {place}", rule, tables)
        for place, rule in enumerate(_counted(CANDIDATES, rules, on_progress))
    ]
    choosing = [at for at, prompt in enumerate(prompts) if prompt.task != unseen and prompt.index % 2 == 0]
    chosen = choose(judged, choosing, rules[0])
    assert chosen.rule is not None
    _agree(recordings, chosen, ranking_layers)
    fixed = _fixed_layers(tables)
    return Calibration(
        config=config.replace(**settings_of(chosen.rule), calibrated_for=made_for),
        about={**dataclasses.asdict(made_for), "samples": samples, "length": length, "seed": seed},
        prompts=tuple((prompt.task, prompt.index, len(prompt.ids)) for prompt in prompts),
        choosing=tuple(choosing),
        candidates=tuple(judged),
        chosen=chosen,
        default=judged[0],
        paper=_judge("paper", paper_of(config).resolve(len(costs), ranking_layers), tables),
        fixed_layers=fixed,
        fixed_layer=choose(fixed, choosing),
    )


def _counted(stage: str, things: Sequence[T], on_progress: Callable[[str, int, int], None]) -> Iterator[T]:
    """The things, one by one; on_progress is called before each, and after the last."""
    for done, thing in enumerate(things):
        on_progress(stage, done, len(things))
        yield thing
    on_progress(stage, len(things), len(things))


def _fixed_layers(tables: Sequence[Table]) -> tuple[Judged, ...]:
    """Selection at each layer alone, whatever the variance of ranks."""
    return tuple(
        Judged(name=f"fixed layer {layer}", rule=None, outcomes=tuple(table.fixed(layer) for table in tables))
        for layer in tables[0].ranking_layers
    )


def _judge(name: str, rule: ASLConfig, tables: Sequence[Table]) -> Judged:
    return Judged(name=name, rule=rule, outcomes=tuple(table.outcome(rule) for table in tables))


def _agree(recordings: Sequence[Recording], chosen: Judged, ranking_layers: Sequence[int] | None) -> None:
    """That the choice does what was looked up, by the rule itself."""
    for recording, outcome in zip(recordings, chosen.outcomes, strict=True):
        told = replay_scores(recording.scores, chosen.rule, ranking_layers=ranking_layers)
        kept = told.selected is None or holds_answers(recording.prompt, told.selected.tolist())
        assert (told.selected_layer, kept) == (outcome.layer, outcome.kept)


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
    if samples < 2:
        raise FlexASLError(f"samples={samples} is too few to choose on some and check on others; give at least 2")
    check_samples(samples, len(tasks) + (unseen is not None))


def _check_budget(config: ASLConfig, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        tokens = len(prompt.ids)
        if config.token_budget(tokens) >= tokens:
            raise FlexASLError(
                f"select_tokens={config.select_tokens} is not smaller than a prompt of task {prompt.task!r}, which has "
                f"{tokens} tokens; give a smaller select_tokens or a greater length"
            )
