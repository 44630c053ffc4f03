"""What the model answers to prompts that settings were not chosen on: with its full cache, and under each setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from flexasl.config import ASLConfig
from flexasl.policies.asl import ASL
from flexasl.report import THE_LAST, RowReport
from flexasl.selectors.base import Trace
from flexasl.selectors.staged import waited
from flexasl.tools.calibration.recording import Prompt
from flexasl.tools.calibration.tables import Outcome, holds_answers
from flexasl.tools.evaluation.costs import LayerCost, prefill_share
from flexasl.tools.evaluation.plans import FULL, Setting
from flexasl.tools.evaluation.tasks import find_task
from flexasl.tools.evaluation.together import answer_together

ANSWER_TOKENS = 40
"""Most tokens of an answer."""
DEFAULT, CHOSEN = "default", "chosen"
"""Names of settings that are checked, beside `FULL`."""
NO_LESS = 0.02
"""By how much fewer answers than with the full cache settings may give."""


class Answered(NamedTuple):
    """What a setting makes of one prompt in a real run."""

    score: float
    """Of the answer, in [0, 1]."""
    outcome: Outcome
    text: str


def answered(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], rules: Mapping[str, ASLConfig], costs: Sequence[LayerCost]
) -> Iterator[dict[str, Answered]]:
    """Of each prompt, what the unpatched model answers, by the name `full`, and what it answers under each of the
    rules, which are resolved."""
    settings = [Setting(label=FULL)]
    for label, rule in rules.items():  # caches of several settings are joined, which those in eight bits cannot be
        settings.append(Setting(label=label, policy=ASL(), config=rule.replace(kv_dtype=None), by_question=True))
    for prompt in prompts:
        said = answer_together(model, tokenizer, prompt.ids, settings, max_new_tokens=ANSWER_TOKENS)
        score, made = find_task(prompt.task).score, {}
        for setting, answer in zip(settings, said, strict=True):
            outcome = Outcome(None, True, 1.0)
            if setting.config is not None and answer.report is not None:
                cost = prefill_share(costs, answer.report)
                outcome = _outcome(prompt, setting.config, answer.report.rows[0], cost)
            made[setting.label] = Answered(score(answer.text, prompt.references), outcome, answer.text)
        yield made


def mean_score(side: Sequence[Answered]) -> float:
    """Of several prompts, the share of them that is answered."""
    return fmean(one.score for one in side)


def mean_cost(side: Sequence[Answered]) -> float:
    """Of several prompts, the mean cost of the prefill."""
    return fmean(one.outcome.cost for one in side)


def falls_short(full: Sequence[Answered], chosen: Sequence[Answered], default: Sequence[Answered]) -> bool:
    """Whether the chosen settings lose answers against the full cache that the default does not lose."""
    score = mean_score(chosen)
    return score < mean_score(full) - NO_LESS and score < mean_score(default)


def _outcome(prompt: Prompt, rule: ASLConfig, row: RowReport, cost: float) -> Outcome:
    layer = row.selected_layer
    if layer is None:
        return Outcome(None, True, cost)
    trace = Trace(eval_layers=list(row.eval_layers), lookup=list(row.lookup))
    layers = tuple(made.layer for made in row.selections)
    held = holds_answers(prompt, row.kept_positions)
    return Outcome(layer, held, cost, layers, waited(rule, layer, trace, not row.ranked_by.startswith(THE_LAST)))
