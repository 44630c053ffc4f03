"""Time to the first token and memory of settings of an evaluation, beside the unpatched model's.

`bench/grid.py time` runs it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from memory import LEAN, peak, reset_peak

from flexasl.tools import run
from flexasl.tools.evaluation.costs import layer_costs, prefill_share
from flexasl.tools.evaluation.plans import Setting


def times(
    model: Any, tokenizer: Any, ids: list[int], settings: Sequence[Setting], pairs: int
) -> dict[str, dict[str, Any]]:
    """By the label of a setting, its median share of the unpatched model's seconds, in pairs of runs, one by the other,
    and its counted cost."""
    costs = layer_costs(model)
    full, *others = settings
    _answer(model, tokenizer, ids, full)
    found: dict[str, dict[str, Any]] = {full.label: {"share": 1.0, "counted": 1.0}}
    for setting in others:
        report = _answer(model, tokenizer, ids, setting).report
        shares, seconds = [], []
        for turn in range(pairs):
            both = {}
            for one in (setting, full) if turn % 2 else (full, setting):
                both[one.label] = _answer(model, tokenizer, ids, one).first_token_seconds
            shares.append(both[setting.label] / both[full.label])
            seconds.append(both[full.label])
        counted = 1.0 if report is None else prefill_share(costs, report)
        found[setting.label] = {"share": round(statistics.median(shares), 3), "counted": round(counted, 3)}
        found[full.label]["seconds"] = round(statistics.median(seconds), 2)
        print(setting.label, found[setting.label], flush=True)
    return found


def peaks(model: Any, tokenizer: Any, ids: list[int], settings: Sequence[Setting]) -> dict[str, dict[str, int]]:
    """By the label of a setting, bytes by which resident memory peaks above its level before the prefill, and those of
    keys and values after it. In a process that was started with `LEAN`, on Linux."""
    if any(os.environ.get(name) != value for name, value in LEAN.items()):
        raise RuntimeError(f"peaks are counted in a process whose environment has {LEAN}")
    found = {}
    for setting in settings:
        _answer(model, tokenizer, ids[:256], setting)
        before = reset_peak()
        answer = _answer(model, tokenizer, ids, setting)
        found[setting.label] = {"peak": peak() - before, "kv": answer.kv_bytes}
    return found


def shares(timed: Mapping[str, Any], peaked: Mapping[str, Any], full: str) -> dict[str, dict[str, float]]:
    """Both by the label of a setting, memory as shares of the unpatched model's."""
    return {
        label: timed[label] | {name: round(peaked[label][name] / peaked[full][name], 3) for name in ("peak", "kv")}
        for label in timed
    }


def _answer(model: Any, tokenizer: Any, ids: list[int], one: Setting) -> run.Answer:
    patching: dict[str, Any] = {"config": one.config, "policy": one.policy, "find_question": one.by_question}
    return run.answer(model, tokenizer, ids, max_new_tokens=1, profile=one.profile, **patching)
