"""What a policy returns, checked before the first layer runs: policies may be anybody's."""

from __future__ import annotations

from collections.abc import Sequence

from flexasl.checks import article, integer, shown
from flexasl.config import ASLConfig, refuse_open
from flexasl.errors import ConfigError
from flexasl.policies.base import Policy

MODES = ("propagate", "later_turns", "kv_dtype")
"""Settings that a policy can refuse, but not exchange for others."""


def resolved(policy: Policy, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
    """What the policy makes of a config, which says all that runs need to know."""
    if not isinstance(getattr(policy, "name", None), str):
        raise ConfigError(f"policy={shown(policy)} has no name; give its class one, a text")
    if policy.second_pass:
        for name, plain in (("propagate", "gather"), ("later_turns", "keep")):
            if getattr(config, name) != plain:
                policy.check(config)
                raise ConfigError(
                    f"{name}={getattr(config, name)!r} does not go with policy {policy.name!r}, which reads tokens "
                    f"twice; give {name}={plain!r}"
                )
    rule = policy.resolve(config, num_layers, voters)
    if not isinstance(rule, ASLConfig):
        raise ConfigError(f"policy {policy.name!r} resolves settings to {article(rule)}; return an ASLConfig")
    refuse_open(rule, num_layers, f"policy {policy.name!r} resolves settings to")
    for name in MODES:
        asked, made = getattr(config, name), getattr(rule, name)
        if asked != made:
            raise ConfigError(f"policy {policy.name!r} makes {name}={made!r} of {name}={asked!r}; raise ConfigError")
    return rule


def steps_of(
    policy: Policy,
    config: ASLConfig,
    num_layers: int,
    prompts: dict[int, int],
    voters: Sequence[int] | None = None,
) -> dict[int, dict[int, int]] | None:
    """Where each of these rows, whose tokens are given, drops tokens step by step, by layer; None where the rows are
    selected once."""
    returned = {row: policy.steps(config, num_layers, tokens) for row, tokens in prompts.items()}
    if all(plan is None for plan in returned.values()):
        return None
    who, steps = f"policy {policy.name!r}: steps", {}
    for mode in ("propagate='mask'", "later_turns='prune'"):
        name, _, value = mode.partition("=")
        if repr(getattr(config, name)) == value:
            raise ConfigError(f"{mode} does not go with policy {policy.name!r}, which drops tokens step by step")
    for row, plan in returned.items():
        if not isinstance(plan, dict):
            what = "None for some prompts and not for others" if plan is None else shown(plan)
            raise ConfigError(f"{who} returned {what}; return how many tokens go on, by layer, as a dict")
        steps[row] = {
            integer(f"{who}: layer", layer, 0, num_layers - 1, error=ConfigError): integer(
                f"{who}: tokens after layer {layer}, window={config.window} included",
                count,
                config.window,
                error=ConfigError,
            )
            for layer, count in plan.items()
        }
        for layer, count in steps[row].items():
            if voters is not None and layer not in voters and count < prompts[row]:
                raise ConfigError(
                    f"{who} drops tokens after layer {layer}, which does not see the whole prompt; "
                    f"layers that do are {', '.join(map(str, voters))}"
                )
    return steps


def budgets_of(policy: Policy, config: ASLConfig, num_layers: int, prompts: Sequence[int]) -> list[list[int | None]]:
    """By layer and row, whose tokens are given, the cache entries per KV head that stay; None where all do."""
    every = [
        [policy.cache_budget(config, layer, num_layers, tokens) for tokens in prompts] for layer in range(num_layers)
    ]
    for layer, budgets in enumerate(every):
        for budget in budgets:
            if budget is None:
                continue
            name = f"policy {policy.name!r}: cache_budget of layer {layer}, window={config.window} included"
            integer(name, budget, config.window, error=ConfigError)
            if config.propagate == "mask" or config.kv_top_p is not None:
                mode = "propagate='mask'" if config.propagate == "mask" else f"kv_top_p={config.kv_top_p}"
                raise ConfigError(f"{mode} does not go with policy {policy.name!r}, which sets cache budgets")
    return every
