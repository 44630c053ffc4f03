"""The protocol of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flexasl.checks import shown
from flexasl.config import SETTINGS, ASLConfig
from flexasl.errors import ConfigError

RULE = frozenset(
    ("tau", "min_layer", "max_layer", "observe_layers", "variance_reference", "select_on", "if_never"),
)
"""Settings that say where adaptive selection selects, and on which scores."""
SCORES = frozenset(("window", "kernel_size", "pooling"))
"""Settings that say how tokens are scored."""
CACHE = frozenset(("kv_budget", "kv_top_p", "kv_dtype"))
"""Settings of the cache."""


class Policy:
    """Decides the rule by which a prompt is pruned, as settings of a stack of known depth."""

    name: ClassVar[str]
    prunes_tokens: ClassVar[bool] = True
    """Whether hidden states are dropped after some layer; where False only the cache shrinks, or nothing."""
    second_pass: ClassVar[bool] = False
    """Whether the layers up to the selection read the selected tokens again, alone, as if they were the prompt."""
    takes_presets: ClassVar[bool] = False
    """Whether `min_layer`, `max_layer`, `tau` and `observe_layers` are used as they are given, so that a preset may
    fill them in."""
    takes: ClassVar[frozenset[str]] = frozenset(SETTINGS)
    """Settings of `ASLConfig` that count; any other is refused where it is given, that is, not at its default."""
    fixes: ClassVar[Mapping[str, Any]] = {}
    """What settings that do not count are under this policy, where that is not their default."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """By setting that does not count, what its error says of it: why, and what to give in its place."""
    sinks: int | None = None
    """Cache entries by position: the first so many and the last; None where they go by attention."""

    def rule(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        """The settings of this policy on `num_layers` layers, from what `counting` makes of a config; raises
        `ConfigError` where they cannot work. By default those of adaptive selection."""
        return config.resolve(num_layers, voters)

    def resolve(self, config: ASLConfig, num_layers: int, voters: Sequence[int] | None = None) -> ASLConfig:
        """The settings that this policy runs with on `num_layers` layers, of which voters can select (None: all).

        Raises `ConfigError` where they cannot work, and for a setting that is given and does not count, unless it says
        what is so anyway.
        """
        found = self.rule(self.counting(config), num_layers, voters)
        self.check(config, found)
        return found

    def counting(self, config: ASLConfig) -> ASLConfig:
        """The config with settings that do not count at their defaults, or as `fixes` has them."""
        plain = ASLConfig()
        own = {name: getattr(plain, name) for name in SETTINGS if name not in self.takes}
        return config.replace(**{**own, **self.fixes})

    def check(self, config: ASLConfig, resolved: ASLConfig | None = None) -> None:
        """Raises `ConfigError` for settings that are given, do not count, and are not as resolved has them; no model is
        needed without it."""
        plain = ASLConfig()
        refused: dict[str, list[str]] = {}
        for name in SETTINGS:
            value = getattr(config, name)
            so_anyway = resolved is not None and value == getattr(resolved, name)
            if name not in self.takes and value != getattr(plain, name) and not so_anyway:
                why = self.refusals.get(name, f"would have no effect under policy {self.name!r}")
                refused.setdefault(why, []).append(f"{name}={shown(value)}")
        if refused:
            told = "; ".join(f"{' and '.join(settings)} {why}" for why, settings in refused.items())
            counting = ", ".join(name for name in SETTINGS if name in self.takes)
            raise ConfigError(f"{told} (of ASLConfig, it takes {counting})")

    def cache_budget(self, config: ASLConfig, layer: int, num_layers: int, prompt_tokens: int) -> int | None:
        """Cache entries per KV head that a layer keeps of a prompt, window included; None where there is no limit."""
        return config.cache_budget(prompt_tokens)

    def steps(self, config: ASLConfig, num_layers: int, prompt_tokens: int) -> dict[int, int] | None:
        """Where tokens are dropped step by step: by layer, how many go on from there, window included. None where they
        are selected once, at the layer that the settings name or find."""
        return None
