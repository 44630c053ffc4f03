"""The evaluation itself: every prompt is answered by the unpatched model once, then under each setting."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flexasl
from flexasl.evaluation.costs import LayerCost, layer_costs, prefill_share
from flexasl.evaluation.plans import Item, Plan, Setting
from flexasl.evaluation.samples import Sample, encode
from flexasl.evaluation.storage import Journal, agree, held, read_keys
from flexasl.evaluation.tasks import build, find_task

PROMPTS, ANSWERS = "prompts", "answers"


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
    """Answer what the folder `out` does not hold yet, and return whether the whole plan is answered now.

    Of several processes, each with its `rank`, every one answers its share; the whole plan is done when the last is.
    With `together`, all answers to a prompt are made at once: several times faster, the same but for rounding, and
    without measured seconds. A folder's answers are all made one way or the other.
    `on_progress` gets the stage, "prompts" or "answers", how many of this process's are done, and how many there are.

    Raises FlexASLError, before the model runs, where a policy does not fit the model, a prompt and its answer do not
    fit the context, a length is too short for a task, or `out` holds results of something else.
    """
    from flexasl import run

    out = Path(out)
    for setting in plan.settings:
        if setting.policy is not None:
            flexasl.patch(model, setting.config, policy=setting.policy).remove()
    for name in plan.tasks:
        for length in plan.lengths:
            run.check_fits(model, length, find_task(name).max_new_tokens)
    with held(out, rank):
        agree(out, _identity(plan, model, tokenizer, together), _about(model))
        prompts, answers = Journal(out, PROMPTS, rank, prompt_key), Journal(out, ANSWERS, rank, answer_key)
        try:
            items = plan.items(rank, world_size)
            for done, item in enumerate(items):
                on_progress(PROMPTS, done, len(items))
                if item not in prompts:
                    sample = build(item.task, tokenizer, item.length, plan.seed, item.index, plan.sources)
                    most = sample.max_new_tokens if plan.answer_tokens is None else plan.answer_tokens
                    prompts.append(sample.to_dict() | {"max_new_tokens": min(most, sample.max_new_tokens)})
            answer_all = _answer_together if together else _answer_all
            answer_all(plan, model, tokenizer, items, prompts, answers, on_progress)
        finally:
            prompts.close()
            answers.close()
    stored = read_keys(out, ANSWERS, answer_key)
    return all((item, setting.label) in stored for item in plan.items() for setting in plan.settings)


def _answer_all(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    items: list[Item],
    prompts: Journal,
    answers: Journal,
    on_progress: Callable[[str, int, int], None],
) -> None:
    from flexasl import run

    costs = layer_costs(model)
    wanted = [(item, setting) for item in items for setting in plan.settings]
    missing = [(item, setting) for item, setting in wanted if (item, setting.label) not in answers]
    on_progress(ANSWERS, len(wanted) - len(missing), len(wanted))
    for number, (item, setting) in enumerate(missing, 1):
        sample = Sample.from_dict(prompts[item])
        ids = encode(tokenizer, sample.prompt)
        if number == 1:
            run.warm_up(model, tokenizer, ids, config=plan.settings[-1].config, policy=plan.settings[-1].policy)
        answer = run.answer(
            model,
            tokenizer,
            ids,
            max_new_tokens=sample.max_new_tokens,
            config=setting.config,
            policy=setting.policy,
        )
        answers.append(_record(sample, setting, answer, costs))
        on_progress(ANSWERS, len(wanted) - len(missing) + number, len(wanted))


def _answer_together(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    items: list[Item],
    prompts: Journal,
    answers: Journal,
    on_progress: Callable[[str, int, int], None],
) -> None:
    from flexasl.evaluation.together import answer_together

    costs = layer_costs(model)
    missing = {item: [one for one in plan.settings if (item, one.label) not in answers] for item in items}
    total = len(items) * len(plan.settings)
    done = total - sum(map(len, missing.values()))
    on_progress(ANSWERS, done, total)
    for item, settings in missing.items():
        if not settings:
            continue
        sample = Sample.from_dict(prompts[item])
        ids = encode(tokenizer, sample.prompt)
        said = answer_together(model, tokenizer, ids, settings, max_new_tokens=sample.max_new_tokens)
        # In one go: a batch of other settings may round differently, so a prompt is rather answered whole or not at all
        answers.append(*(_record(sample, one, answer, costs) for one, answer in zip(settings, said, strict=True)))
        done += len(settings)
        on_progress(ANSWERS, done, total)


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
        "counted_prefill": 1.0,
        "kv_share": 1.0,
        "tau": None,
        "eval_layers": [],
        "variance_ratio": [],
        "first_token_seconds": answer.first_token_seconds,
        "total_seconds": answer.total_seconds,
    }
    if answer.report is not None:
        row = answer.report.to_dict()["rows"][0]
        record |= {name: row[name] for name in ("kept_tokens", "selected_layer", "eval_layers")}
        record["variance_ratio"] = [None if ratio is None else float(f"{ratio:.6g}") for ratio in row["variance_ratio"]]
        record["counted_prefill"] = prefill_share(costs, answer.report)
        record["kv_share"] = answer.report.kv_share
        record["tau"] = answer.report.config.get("tau")
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
    """The model's hub id, or the last part of its folder."""
    path = Path(model.name_or_path)
    return path.name if path.is_absolute() or path.exists() else model.name_or_path
