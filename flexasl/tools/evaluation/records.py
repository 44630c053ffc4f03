"""What the lines of an evaluation's files hold."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from flexasl.stored import Count, Range, Share, Unfit, fit
from flexasl.tools.evaluation.plans import FULL
from flexasl.tools.evaluation.samples import Sample
from flexasl.tools.evaluation.tasks import TASKS

PROMPTS, ANSWERS = "prompts", "answers"
MOST_LAYERS = 10_000
RIGHT = "A 0"
"""An answer on which a score looks at references of every kind."""

Seconds = Annotated[float, Range(1e-9)] | None
Ratio = Annotated[float, Range(0)]


class Selected(TypedDict):
    """One selection from a prompt."""

    layer: Count
    kept_tokens: Count


class Answered(TypedDict):
    """A line of answers. Some lack what older versions did not tell."""

    task: str
    length: Count
    index: Count
    setting: str
    policy: str
    budget: Annotated[int | float, Range(0)] | None
    score: Share
    answer: str
    depth: Share | None
    prompt_tokens: Count
    new_tokens: Count
    num_layers: Annotated[int, Range(1, MOST_LAYERS)]
    kept_tokens: Count
    selected_layer: Count | None
    selections: NotRequired[list[Selected]]
    ranked_by: NotRequired[str]
    counted_prefill: Ratio
    kv_share: Ratio
    tau: float | None
    thresholds: NotRequired[list[tuple[float, Count, Count]]]
    """Of each stage, the final one last: what a look-up must reach at its first layer, that layer, and the last one."""
    eval_layers: list[Count]
    variance_ratio: list[float | None]
    lookup: NotRequired[list[float | None]]
    first_token_seconds: Seconds
    total_seconds: Seconds


class Identity(TypedDict):
    """What the results of a folder depend on, as far as reports tell it."""

    model: str
    parameters: Count
    dtype: str
    chat_template: str | None
    seed: int
    files: dict[str, str]
    together: NotRequired[bool]
    answer_tokens: NotRequired[Count | None]
    rank_by: NotRequired[str]
    profile: NotRequired[bool]
    after_question: NotRequired[str | None]
    answer_prefix: NotRequired[bool]
    question_first: NotRequired[bool]


class About(TypedDict):
    """What a folder's results were made with."""

    device: str
    processor: str
    python: str
    torch: str
    transformers: str
    flexasl: str


class Run(TypedDict):
    """The content of `run.json`."""

    identity: Identity
    about: About


def check(kind: str, record: Any) -> dict[str, Any]:
    """A line of prompts or answers, once it has been found right; raises `Unfit`."""
    return _prompt(record) if kind == PROMPTS else _answer(record)


def _prompt(record: Any) -> dict[str, Any]:
    sample = Sample.from_dict(record)
    task = TASKS.get(sample.task)
    try:
        if task is not None:
            task.score(RIGHT, sample.references)
    except (ValueError, IndexError) as error:
        raise Unfit(f"references are none that task {sample.task!r} can compare an answer with") from error
    return dict(record)


def _answer(record: Any) -> dict[str, Any]:
    found: dict[str, Any] = fit(Answered, record)
    last = found["selected_layer"]
    only = [] if last is None else [{"layer": last, "kept_tokens": found["kept_tokens"]}]
    since: dict[str, Any] = {"selections": only, "ranked_by": "", "thresholds": [], "lookup": []}
    found |= {name: value for name, value in since.items() if name not in found}
    chosen = [selection["layer"] for selection in found["selections"]]
    if chosen[-1:] != ([] if last is None else [last]):
        raise Unfit(f"selected_layer is {last}, and not the last of its selections {chosen}")
    layers = [*found["eval_layers"], *chosen]
    if max(layers, default=0) >= found["num_layers"]:
        raise Unfit(f"a layer is {max(layers)}, where num_layers is {found['num_layers']}")
    seen = "lookup" if found["lookup"] else "variance_ratio"
    if len(found["eval_layers"]) != len(found[seen]):
        raise Unfit(f"{seen} has not an entry for each of eval_layers")
    label = FULL if found["budget"] is None else f"{found['policy']}@{found['budget']}"
    if found["setting"] != label or not label.isprintable():
        raise Unfit(f"setting is {found['setting']!r:.60}, and not its policy with its budget")
    if (found["first_token_seconds"] is None) != (found["total_seconds"] is None):
        raise Unfit("of first_token_seconds and total_seconds, one is there and the other not")
    return found
