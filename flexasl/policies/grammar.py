"""Policies as words, alone or with settings: `fixed_layer:layer=15`, `asl:tau=0.3,min_layer=10`, `paper`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flexasl.checks import article, instance, shown
from flexasl.config import PAPER_RULE, SETTINGS, ASLConfig
from flexasl.errors import ConfigError, FlexASLError
from flexasl.policies.base import Policy
from flexasl.policies.table import POLICIES
from flexasl.stages import Stage

PAPER = "paper"
"""`asl` by the published rule."""
KILO = 1024


class Named(NamedTuple):
    """A policy that was given in words."""

    text: str
    policy: Policy
    settings: dict[str, Any]
    """Those of `ASLConfig` that came with it."""
    rule: dict[str, Any]
    """Those of `ASLConfig` that its name stands for."""

    def onto(self, config: ASLConfig, options: Mapping[str, Any]) -> ASLConfig:
        """The config with the policy's settings, and with options, which were given beside it and win over what its
        name stands for. Raises `ConfigError` where they contradict the policy's own settings."""
        for name, value in self.settings.items():
            if name in options and options[name] != value:
                raise ConfigError(f"{name}={shown(options[name])} contradicts policy={self.text!r}; give one of them")
        if self.rule and config.calibrated_for is not None:
            raise ConfigError(
                f"policy={self.text!r} has a rule of its own, and config was calibrated for {config.calibrated_for}; "
                "give policy='asl', or no config"
            )
        free = {name: value for name, value in self.rule.items() if getattr(config, name) == _DEFAULTS[name]}
        return config.replace(**(free | self.settings | dict(options)))


def choose(policy: str | Policy, config: ASLConfig | None = None) -> tuple[Policy, ASLConfig]:
    """The policy of that name, or the instance itself, and the config with the settings that came with the name.

    Args:
        policy: A name of `POLICIES` or `paper`, alone or with settings, or an instance.
        config: The settings. None: `ASLConfig()`.

    Raises:
        FlexASLError: The name is not known.
        ConfigError: A setting has a value that it cannot have, or config and policy give the same setting differently.
    """
    config = instance("config", ASLConfig() if config is None else config, ASLConfig, "an ASLConfig or None")
    if isinstance(policy, Policy):
        return policy, config
    named = parse(policy)
    given = {name: getattr(config, name) for name in SETTINGS if getattr(config, name) != _DEFAULTS[name]}
    return named.policy, named.onto(config, given)


def find_policy(policy: str | Policy) -> Policy:
    """The policy of that name, with its own settings where they come with the name, or the instance itself.

    Raises:
        FlexASLError: The name is not known, or comes with settings of `ASLConfig`.
    """
    if isinstance(policy, Policy):
        return policy
    named = parse(policy)
    if named.settings or named.rule:
        raise FlexASLError(f"policy={policy!r} comes with settings of ASLConfig; give it to flexasl.patch, as it is")
    return named.policy


def parse(text: str, elsewhere: Mapping[str, str] | None = None) -> Named:
    """The policy that `name` or `name:setting=value,...` names. elsewhere: settings that are not given here, and where
    they are."""
    if not isinstance(text, str):
        raise FlexASLError(
            f"policy={shown(text)} is {article(text)}; give a name such as 'asl', or an instance of a policy"
        )
    name, colon, rest = text.partition(":")
    if name != PAPER and name not in POLICIES:
        raise FlexASLError(f"policy={name!r} is not known; give one of {', '.join([*POLICIES, PAPER])}")
    kind = POLICIES["asl" if name == PAPER else name]
    elsewhere = elsewhere or {}
    own = list(inspect.signature(kind).parameters)
    shared = [setting for setting in SETTINGS if setting in kind.takes and setting not in elsewhere]
    given = _given(text, rest) if colon else {}
    for key in given:
        if key in SETTINGS and key not in kind.takes:
            kind().check(ASLConfig(**{key: given[key]}))
        if key not in (*own, *shared):
            hint = elsewhere.get(key, f"its settings are {', '.join(own + shared)}")
            raise FlexASLError(f"policy={text!r}: {key} is not a setting of {name}; {hint}")
    settings = {key: value for key, value in given.items() if key not in own}
    policy = kind(**{key: value for key, value in given.items() if key in own})
    return Named(text, policy, settings, PAPER_RULE if name == PAPER else {})


def parse_several(text: str) -> list[str]:
    """`"asl:tau=0.3,min_layer=10,full"` as policies with their settings: two here."""
    policies: list[str] = []
    for part in parts("policies", text):
        if policies and "=" in part and ":" not in part.partition("=")[0]:
            policies[-1] += f",{part}"
        else:
            policies.append(part)
    return policies


def parts(name: str, text: str) -> list[str]:
    """What stands between commas."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise FlexASLError(f"{name}={text!r} has an empty entry; give entries with single commas between them")
    return found


def number(text: str) -> int | float | None:
    """A count (`512`, `4k`, where k is 1,024) or a share (`0.25`); None for anything else."""
    kilo = re.fullmatch(r"(\d+(?:\.\d+)?)k", text, re.IGNORECASE)
    if kilo:
        return int(float(kilo[1]) * KILO)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _given(text: str, rest: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for part in rest.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise FlexASLError(f"policy={text!r}: {part!r} is not a setting; give name=value")
        if key in given:
            raise FlexASLError(f"policy={text!r} gives {key} twice; give it once")
        given[key] = Stage.several(value.lower()) if key == "stages" else _value(value)
    return given


def _value(text: str) -> Any:
    """A word as the number, truth value or None that it writes, else as itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    found = number(text)
    return text if found is None else found


_DEFAULTS = {name: getattr(ASLConfig(), name) for name in SETTINGS}
