"""What a policy returns, checked before the first layer runs: policies may be anybody's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexasl.checks import article, integer, shown
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.policies.base import Policy
from flexasl.retention import Retention
from flexasl.rows import Rows
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
    for name, plain in (("propagate", "gather"), ("later_turns", "keep")):
        if made.rows and not made.once and getattr(config, name) != plain:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not go with policy {policy.name!r}, whose "
                f"{type(made).__name__} selects several times; give {name}={plain!r}"
            )
    return made


def check_selections(policy: Policy, made: Sequence[Selection], rows: Rows, window: int) -> None:
    """Raises `ConfigError` where what the policy's selector gives is no selection from these rows."""
    who, seen = f"policy {policy.name!r}: selection", set()
    for one in made:
        row = integer(f"{who}: row", one.row, 0, len(rows.lengths) - 1, error=ConfigError)
        if row in seen:
            raise ConfigError(f"{who}: row {row} is selected from twice at layer {one.layer}; give one selection")
        seen.add(row)
        left = rows.lengths[row]
        name = f"{who}: count of row {row}, window={window} included"
        count, keep = integer(name, one.count, window, left, error=ConfigError), one.keep
        if keep.dtype != torch.bool or keep.dim() != 1 or len(keep) < left:
            raise ConfigError(f"{who}: keep of row {row} is {keep.dtype} {list(keep.shape)}; give bool [{left}]")
        if keep.is_cpu:  # a look at the numbers, which on another device would have to be waited for
            found = torch.stack([keep[-left:].sum(), keep[-window:].sum()])
            if torch.equal(found, torch.tensor([count, window], dtype=torch.int64, device="cpu")):
                continue
            raise ConfigError(f"{who}: keep of row {row} is not {count} tokens with the last {window} among them")


def limits_of(
    policy: Policy, config: ASLConfig, retention: Retention, num_layers: int, prompts: Sequence[int]
) -> list[list[int | None]]:
    """By layer and row, whose tokens are given, how many cache entries per KV head the policy's retention keeps; None
    where it keeps all."""
    if not isinstance(retention, Retention):
        raise ConfigError(f"policy {policy.name!r} returned {article(retention)} as its retention; return a Retention")
    limits = [[retention.limit(layer, tokens) for tokens in prompts] for layer in range(num_layers)]
    given = {limit for of_layer in limits for limit in of_layer} - {None}
    for layer, of_layer in enumerate(limits):
        for limit in filter(lambda one: one is not None, of_layer):
            name = f"policy {policy.name!r}: limit of layer {layer}, window={config.window} included"
            integer(name, limit, config.window, error=ConfigError)
    asked = next((name for name in ("kv_budget", "kv_top_p") if getattr(config, name) is not None), None)
    if given and config.propagate == "mask":
        raise ConfigError(f"propagate='mask' does not go with policy {policy.name!r}, which drops cache entries")
    if asked is not None and (not given or (asked == "kv_top_p") != (retention.goes_by == "attention")):
        raise ConfigError(
            f"{asked}={getattr(config, asked)} does not go with policy {policy.name!r}, whose retention goes by "
            "something else"
        )
    return limits
