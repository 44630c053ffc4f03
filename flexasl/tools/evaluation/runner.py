"""The evaluation itself: every prompt is answered by the unpatched model once, then under each setting."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flexasl
from flexasl import checks
from flexasl.checks import instance, integer
from flexasl.errors import FlexASLError
from flexasl.stored import nameable
from flexasl.tools.evaluation.costs import LayerCost, layer_costs, prefill_share
from flexasl.tools.evaluation.plans import Item, Plan, Setting
from flexasl.tools.evaluation.records import ANSWERS, PROMPTS
from flexasl.tools.evaluation.samples import Sample
from flexasl.tools.evaluation.storage import Journal, agree, held, read_keys
from flexasl.tools.evaluation.tasks import build, find_task
from flexasl.tools.text import encode


def prompt_key(record: dict[str, Any]) -> Item:
    """The prompt of a stored record."""
    return Item(record["task"], record["length"], record["index"])


def answer_key(record: dict[str, Any]) -> tuple[Item, str]:
    """The prompt of a stored answer, and the label of its setting."""
    return prompt_key(record), record["setting"]


def evaluate(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    together: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> bool:
    """Answers what the folder `out` does not hold yet.

    The same call continues a stopped run. A folder's answers are all made together or all one by one.

    Args:
        plan: What is to be evaluated.
        model: A transformers model in eval mode, not patched.
        tokenizer: Its tokenizer.
        out: Folder for prompts and answers.
        rank: Of several processes, the index of this one; every process answers its share of the prompts.
        world_size: How many processes there are.
        together: Whether all answers to a prompt are made at once: several times faster, the same but for rounding,
            and without measured seconds.
        on_progress: Called with the stage, "prompts" or "answers", how many of this process's are done, and how many
            there are.

    Returns:
        Whether the whole plan is answered now.

    Raises:
        FlexASLError: Before the model runs: a policy does not fit the model, a prompt and its answer do not fit the
            context, a length is too short for a task, or `out` holds results of something else.
    """
    instance("plan", plan, Plan, "what flexasl.evaluation.plan returns")
    checks.transformers_model(model)
    checks.tokenizer(tokenizer)
    world_size = integer("world_size", world_size, 1)
    instance("together", together, bool, "True or False")
    rank, out = integer("rank", rank, 0, world_size - 1), checks.path("out", out)
    _check_fit(plan, model, together)
    with held(out, rank):
        agree(out, _identity(plan, model, tokenizer, together), _about(model))
        prompts, answers = Journal(out, PROMPTS, rank, prompt_key), Journal(out, ANSWERS, rank, answer_key)
        try:
            items = plan.items(rank, world_size)
            _make_prompts(plan, tokenizer, items, prompts, on_progress)
            _answer_all(plan, model, tokenizer, items, prompts, answers, together, on_progress)
        finally:
            prompts.close()
            answers.close()
    stored = read_keys(out, ANSWERS, answer_key)
    return all((item, setting.label) in stored for item in plan.items() for setting in plan.settings)


def _check_fit(plan: Plan, model: Any, together: bool) -> None:
    """Raises FlexASLError where a setting does not fit the model, or a prompt and its answer not its context."""
    from flexasl.tools import run

    for setting in plan.settings:
        if together and setting.config is not None and setting.config.kv_dtype is not None:
            raise FlexASLError(
                f"together=True decodes from caches in the model's dtype, which {setting.label!r} excludes by "
                f"kv_dtype={setting.config.kv_dtype!r}; give together=False"
            )
        if setting.policy is not None:
            flexasl.patch(model, setting.config, policy=setting.policy, profile=setting.profile).remove()
    for name in plan.tasks:
        for length in plan.lengths:
            run.check_fits(model, length, plan.max_new_tokens(name))


def _make_prompts(
    plan: Plan, tokenizer: Any, items: list[Item], prompts: Journal, on_progress: Callable[[str, int, int], None]
) -> None:
    for done, item in enumerate(items):
        on_progress(PROMPTS, done, len(items))
        if item not in prompts:
            sample = build(item.task, tokenizer, item.length, plan.seed, item.index, plan.sources, plan.wording)
            prompts.append(sample.to_dict() | {"max_new_tokens": plan.max_new_tokens(item.task)})


def _answer_all(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    items: list[Item],
    prompts: Journal,
    answers: Journal,
    together: bool,
    on_progress: Callable[[str, int, int], None],
) -> None:
    from flexasl.tools import run

    costs, answered = layer_costs(model), _together if together else _one_by_one
    missing = {item: [one for one in plan.settings if (item, one.label) not in answers] for item in items}
    total = len(items) * len(plan.settings)
    done = total - sum(map(len, missing.values()))
    on_progress(ANSWERS, done, total)
    cold = not together
    for item, settings in missing.items():
        if not settings:
            continue
        sample = Sample.from_dict(prompts[item])
        ids = encode(tokenizer, sample.prompt)
        if not ids:
            raise FlexASLError(f"prompt {item.index} of task {item.task!r} has no tokens; remove it from {PROMPTS}")
        run.check_fits(model, len(ids), sample.max_new_tokens)
        if cold:
            _warm_up(model, tokenizer, ids, plan.settings[-1])
            cold = False
        for said in answered(model, tokenizer, ids, settings, sample.max_new_tokens):
            answers.append(*(_record(sample, setting, answer, costs) for setting, answer in said))
            done += len(said)
            on_progress(ANSWERS, done, total)


def _warm_up(model: Any, tokenizer: Any, ids: list[int], setting: Setting) -> None:
    from flexasl.tools import run

    run.warm_up(model, tokenizer, ids, config=setting.config, policy=setting.policy, profile=setting.profile)


def _one_by_one(model: Any, tokenizer: Any, ids: list[int], settings: list[Setting], most: int) -> Iterator[list[Any]]:
    """Each setting and its answer, to be stored as they come."""
    from flexasl.tools import run

    for one in settings:
        patching: dict[str, Any] = {"config": one.config, "policy": one.policy, "find_question": one.by_question}
        patching["profile"] = one.profile
        yield [(one, run.answer(model, tokenizer, ids, max_new_tokens=most, **patching))]


def _together(model: Any, tokenizer: Any, ids: list[int], settings: list[Setting], most: int) -> Iterator[list[Any]]:
    """All settings and their answers in one go: a batch of others may round differently, so a prompt is rather answered
    whole or not at all."""
    from flexasl.tools.evaluation.together import answer_together

    said = answer_together(model, tokenizer, ids, settings, max_new_tokens=most)
    yield list(zip(settings, said, strict=True))


def _record(sample: Sample, setting: Setting, answer: Any, costs: list[LayerCost]) -> dict[str, Any]:
    """One line of results. Floats of the report are rounded to six digits, which keeps the files small."""
    record = {
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "setting": setting.label,
        "policy": setting.spec,
        "budget": setting.budget,
        "score": find_task(sample.task).score(answer.text, sample.references),
        "answer": answer.text,
        "depth": sample.depth,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "num_layers": len(costs),
        "kept_tokens": answer.prompt_tokens,
        "selected_layer": None,
        "selections": [],
        "ranked_by": "",
        "counted_prefill": 1.0,
        "kv_share": 1.0,
        "tau": None,
        "thresholds": [],
        "eval_layers": [],
        "variance_ratio": [],
        "lookup": [],
        "first_token_seconds": answer.first_token_seconds,
        "total_seconds": answer.total_seconds,
    }
    if answer.report is not None:
        row = answer.report.to_dict()["rows"][0]
        of_row = ("kept_tokens", "selected_layer", "selections", "ranked_by", "eval_layers")
        record |= {name: row[name] for name in of_row}
        for name in ("variance_ratio", "lookup"):
            record[name] = [None if value is None else float(f"{value:.6g}") for value in row[name]]
        record["counted_prefill"] = prefill_share(costs, answer.report)
        record["kv_share"] = answer.report.kv_share
        record["tau"] = answer.report.config.get("tau")
        record["thresholds"] = [list(stage) for stage in answer.report.thresholds]
    return record


def _identity(plan: Plan, model: Any, tokenizer: Any, together: bool) -> dict[str, Any]:
    """What must not change while results are added to a folder."""
    return {
        "model": model_name(model),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": tokenizer.chat_template,
        "vocabulary": len(tokenizer),
        "seed": plan.seed,
        "together": together,
        "answer_tokens": plan.answer_tokens,
        "rank_by": plan.rank_by,
        "profile": plan.profile,
        "after_question": plan.wording.after_question,
        "answer_prefix": plan.wording.answer_prefix,
        "question_first": plan.wording.question_first,
        "config": None if plan.config is None else plan.config.to_dict(),
        **plan.sources.fingerprint(),
    }


def _about(model: Any) -> dict[str, Any]:
    packages = {name: version(name) for name in ("flexasl", "torch", "transformers")}
    return {
        "device": str(model.device),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **packages,
    }


def model_name(model: Any) -> str:
    """The model's hub id, or the last part of its path."""
    path = Path(model.name_or_path)
    return nameable(path.name if path.is_absolute() or path.exists() else model.name_or_path)
