"""What a policy returns, checked where it is returned: policies may be anybody's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.checks import article, integer, shown
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.policies.base import Policy
from flexasl.retention import Retention
from flexasl.rows import Rows
from flexasl.rows_attention import Scored
from flexasl.selectors.base import Prompts, Selection, Selector

MODES = ("propagate", "later_turns", "kv_dtype")
"""Settings that a policy can refuse, but not exchange for others."""

FORMER = {
    "steps": "return a ScheduledSelector from selector(config, prompts)",
    "cache_budget": "return top_k(...) from retention(config, num_layers)",
    "sinks": "return first_and_last(...) from retention(config, num_layers)",
}
"""What policies said before in other ways."""


def resolved(
    policy: Policy, config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None
) -> ASLConfig:
    """What the policy makes of a config, which says all that runs need to know."""
    if not isinstance(getattr(policy, "name", None), str):
        raise ConfigError(f"policy={shown(policy)} has no name; give its class one, a text")
    for name, instead in FORMER.items():
        if hasattr(policy, name):
            raise ConfigError(f"policy {policy.name!r} has {name}, which is not used any more; {instead}")
    for name in ("score", "scoring_tokens"):
        if getattr(policy, name) is not None and not callable(getattr(policy, name)):
            raise ConfigError(f"policy {policy.name!r} has {name}={shown(getattr(policy, name))}; make it a method")
    if policy.second_pass:
        for name, plain in (("propagate", "gather"), ("later_turns", "keep")):
            if getattr(config, name) != plain:
                policy.check(config)
                raise ConfigError(
                    f"{name}={getattr(config, name)!r} does not go with policy {policy.name!r}, which reads tokens "
                    f"twice; give {name}={plain!r}"
                )
    rule = policy.resolve(config, num_layers, ranking_layers)
    if not isinstance(rule, ASLConfig):
        raise ConfigError(f"policy {policy.name!r} resolves settings to {article(rule)}; return an ASLConfig")
    refuse_open(rule, num_layers, f"policy {policy.name!r} resolves settings to")
    for name in MODES:
        asked, made = getattr(config, name), getattr(rule, name)
        if asked != made:
            raise ConfigError(f"policy {policy.name!r} makes {name}={made!r} of {name}={asked!r}; raise ConfigError")
    return rule


def selector_of(policy: Policy, config: ASLConfig, prompts: Prompts) -> Selector:
    """The policy's selector of these prompts."""
    try:
        made = policy.selector(config, prompts)
    except ConfigError as error:
        raise ConfigError(f"policy {policy.name!r}: {error}") from error
    if not isinstance(made, Selector):
        raise ConfigError(f"policy {policy.name!r} returned {article(made)} as its selector; return a Selector")
    who = f"policy {policy.name!r}, whose {type(made).__name__}"
    rows = range(len(prompts.lengths))
    if not isinstance(made.rows, Sequence) or list(made.rows) != [row for row in rows if row in made.rows]:
        raise ConfigError(f"{who} has rows={shown(made.rows)}; give some of {shown(list(rows))}, ascending")
    for name, plain, can, does in (
        ("propagate", "gather", made.masks, "has no mask"),
        ("later_turns", "keep", made.once or made.masks, "selects several times"),
    ):
        if made.rows and getattr(config, name) != plain and not can:
            raise ConfigError(f"{name}={getattr(config, name)!r} does not go with {who} {does}; give {name}={plain!r}")
    if made.rows and config.propagate == "mask" and policy.scoring_tokens is not None and not made.once:
        raise ConfigError(
            f"propagate='mask' does not go with policy {policy.name!r}, which names the tokens that score, and a "
            "selection in stages; give propagate='gather', or stages=()"
        )
    return made


def checked_selections(
    policy: Policy, made: Any, layer: int, first_layer: int | None, rows: Rows, window: int
) -> list[Selection]:
    """What the policy's selector gives after a layer, which must be selections from these rows."""
    who, seen = f"policy {policy.name!r}: selection", set()
    found = list(made) if isinstance(made, Sequence) else [made]
    for place, one in enumerate(found):
        if not isinstance(one, Selection):
            raise ConfigError(f"{who} is {article(one)}; return a list of Selection")
        if one.layer != layer:
            raise ConfigError(f"{who}: layer={shown(one.layer)} is given after layer {layer}; give that")
        if first_layer is None or layer < first_layer:
            raise ConfigError(f"{who} is given after layer {layer}, with first_layer={first_layer}; give the earliest")
        row = integer(f"{who}: row", one.row, 0, len(rows.lengths) - 1, error=ConfigError)
        if row in seen:
            raise ConfigError(f"{who}: row {row} is selected from twice at layer {layer}; give one selection")
        seen.add(row)
        left, keep = rows.lengths[row], one.keep
        name = f"{who}: count of row {row}, window={window} included"
        count = integer(name, one.count, window, left, error=ConfigError)
        if not _is(keep, torch.bool, rows) or keep.dim() != 1 or len(keep) < left:
            raise ConfigError(f"{who}: keep of row {row} is {_told(keep)}; give bool [{left}]")
        wanted = torch.tensor([count, window], dtype=torch.int64, device="cpu")
        if _can_look(keep) and not torch.equal(torch.stack([keep[-left:].sum(), keep[-window:].sum()]), wanted):
            raise ConfigError(f"{who}: keep of row {row} is not {count} tokens with the last {window} among them")
        found[place] = dataclasses.replace(one, row=row, count=count)
    return found


def score_of(policy: Policy, seen: Scored) -> Tensor:
    """The policy's own score of what a layer's attention saw."""
    assert policy.score is not None
    made: Any = policy.score(seen)
    shape = [*seen.key.shape[:2], max(0, seen.key.shape[2] - seen.scoring.window)]
    floating = isinstance(made, Tensor) and made.is_floating_point()
    if not floating or list(made.shape) != shape or made.device != seen.key.device:
        raise ConfigError(f"policy {policy.name!r}: score is {_told(made)}; return float32 {shape}")
    if _can_look(made) and bool(made.isnan().any()):
        raise ConfigError(f"policy {policy.name!r}: score has NaN; return numbers")
    return made.float()


def scoring_tokens_of(policy: Policy, rows: Rows, config: ASLConfig) -> Sequence[Tensor] | None:
    """The tokens of each row whose queries score under this policy; None for those of the window."""
    if policy.scoring_tokens is None:
        return None
    made: Any = policy.scoring_tokens(rows, config)
    if not isinstance(made, Sequence) or len(made) != len(rows.lengths):
        raise ConfigError(f"policy {policy.name!r}: scoring_tokens is {shown(made)}; return a tensor for each row")
    for row, (places, length) in enumerate(zip(made, rows.lengths)):
        right = _is(places, torch.int64, rows) and places.dim() == 1 and len(places) > 0
        if right and _can_look(places):
            right = int(places[0]) >= 0 and int(places[-1]) < length and bool((places.diff() > 0).all())
        if not right:
            told = shown(places.tolist()) if _is(places, torch.int64, rows) else _told(places)
            raise ConfigError(
                f"policy {policy.name!r}: scoring_tokens of row {row} is {told}; return int64 places from 0 to "
                f"{length - 1}, ascending, one at least"
            )
    return made


def entries_of(
    policy: Policy, retention: Retention, seen: Tensor | None, limits: Tensor, window: int, rows: Rows, groups: int
) -> Tensor:
    """The cache entries [B, G, M] bool that the policy's retention keeps, all in rows within their limits [B]; seen as
    `Retention.keep` takes it."""
    assert retention.keep is not None
    made: Any = retention.keep(seen, limits, window, rows)
    shapes, who = [[len(rows.lengths), heads, rows.width] for heads in (groups, 1)], f"policy {policy.name!r}"
    if not _is(made, torch.bool, rows) or list(made.shape) not in shapes:
        raise ConfigError(f"{who}: keep of its retention is {_told(made)}; return bool {shapes[0]}")
    real = rows.as_batch()[1]
    keep: Tensor = made.expand(-1, groups, -1) | (rows.lengths_on_device <= limits)[:, None, None]
    keep = keep if real is None else keep & real[:, None]
    if _can_look(keep):
        whole = bool((keep if real is None else keep | ~real[:, None])[..., -window:].all())
        if not whole or (retention.exact and not bool((keep.sum(-1) == limits[:, None]).all())):
            few = "as many entries as its limit" if retention.exact else "entries"
            raise ConfigError(f"{who}: keep of its retention is not {few} with the last {window} among them")
    return keep


def _is(value: Any, dtype: torch.dtype, rows: Rows) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.device == rows.positions.device


def _told(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else article(value)


def _can_look(values: Tensor) -> bool:
    """Whether a look at the numbers waits for no device and breaks no graph."""
    return values.is_cpu and not torch.compiler.is_compiling()


def limits_of(
    policy: Policy, config: ASLConfig, retention: Retention, num_layers: int, prompts: Sequence[int]
) -> list[list[int | None]]:
    """By layer and row, whose tokens are given, how many cache entries per KV head the policy's retention keeps; None
    where it keeps all."""
    if not isinstance(retention, Retention):
        raise ConfigError(f"policy {policy.name!r} returned {article(retention)} as its retention; return a Retention")
    name = f"policy {policy.name!r}: limit of layer {{}}, window={config.window} included"
    asked_for = [[retention.limit(layer, tokens) for tokens in prompts] for layer in range(num_layers)]
    limits = [
        [one if one is None else integer(name.format(layer), one, config.window, error=ConfigError) for one in of_layer]
        for layer, of_layer in enumerate(asked_for)
    ]
    given = {limit for of_layer in limits for limit in of_layer} - {None}
    if given and retention.keep is None:
        raise ConfigError(f"policy {policy.name!r} has a retention with limits and without keep; give it keep")
    asked = next((name for name in ("kv_budget", "kv_top_p") if getattr(config, name) is not None), None)
    if given and config.propagate == "mask":
        raise ConfigError(f"propagate='mask' does not go with policy {policy.name!r}, which drops cache entries")
    if asked is not None and (not given or (asked == "kv_top_p") != (retention.goes_by == "attention")):
        raise ConfigError(
            f"{asked}={getattr(config, asked)} does not go with policy {policy.name!r}, whose retention goes by "
            "something else"
        )
    return limits
