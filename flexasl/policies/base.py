"""The protocol of a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from flexasl.checks import renames, shown
from flexasl.config import SETTINGS, ASLConfig
from flexasl.errors import ConfigError

if TYPE_CHECKING:  # torch is not imported before a prompt is read, so that a command line answers at once
    from torch import Tensor

    from flexasl.retention import Retention
    from flexasl.rows import Rows
    from flexasl.rows_attention import Scored
    from flexasl.selectors import Selector
    from flexasl.selectors.base import Prompts

RULE = frozenset(
    (
        "settled_by",
        "tau",
        "stages",
        "min_layer",
        "min_layer_unasked",
        "max_layer",
        "observe_layers",
        "variance_reference",
        "score_from",
        "select_on",
        "if_never",
    )
)
"""Settings that say where adaptive selection selects."""
SCORES = frozenset(("window", "kernel_size", "pooling", "score_power", "contrast"))
"""Settings that say how tokens are scored."""
CACHE = frozenset(("kv_budget", "kv_top_p", "kv_dtype"))
"""Settings of the cache."""


class Policy:
    """A method of pruning: the settings that it runs with, a selector of tokens, a retention of cache entries and, if
    needed, a score of its own.

    Every part has a default, so that a policy states only what is different. See docs/own-policy.md.

    Examples:
        >>> from flexasl import policies
        >>> class Middle(policies.FixedLayer):
        ...     name = "middle"
        >>> chosen, config = policies.choose("fixed_layer:layer=9,select_tokens=512")
        >>> chosen.layer, config.select_tokens
        (9, 512)
        >>> Middle().resolve(config, num_layers=30).max_layer
        14
    """

    name: ClassVar[str]
    prunes_tokens: ClassVar[bool] = True
    """Whether tokens are dropped on the way; where False only the cache shrinks, or nothing."""
    second_pass: ClassVar[bool] = False
    """Whether the layers up to the selection read the selected tokens again, alone, as if they were the prompt."""
    score: Callable[[Scored], Tensor] | None = None
    """What ranks tokens and entries, as a method: from the inputs of a layer's attention, [B, G, N - window] float32.
    None: the window's attention."""
    scoring_tokens: Callable[[Rows, ASLConfig], Sequence[Tensor]] | None = None
    """Whose queries score, as a method: of each row, places [Q] int64 among its tokens, ascending. None: those of the
    window."""
    takes_profiles: ClassVar[bool] = False
    """Whether layers, stages and `tau` are used as they are given, so that a profile may fill them in."""
    takes: ClassVar[frozenset[str]] = frozenset(SETTINGS)
    """Settings of `ASLConfig` that count; any other is refused where it is given, that is, not at its default."""
    fixes: ClassVar[Mapping[str, Any]] = {}
    """What settings that do not count are under this policy, where that is not their default."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """By setting that does not count, what its error says of it: why, and what to give in its place."""

    def rule(self, config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> ASLConfig:
        """The settings of this policy on `num_layers` layers, from what `counting` makes of a config; raises
        `ConfigError` where they cannot work. By default those of adaptive selection."""
        return config.resolve(num_layers, ranking_layers)

    @renames(voters="ranking_layers")
    def resolve(self, config: ASLConfig, num_layers: int, ranking_layers: Sequence[int] | None = None) -> ASLConfig:
        """The settings that this policy runs with on `num_layers` layers, of which ranking_layers can select (None:
        all).

        Raises `ConfigError` where they cannot work, and for a setting that is given and does not count, unless it says
        what is so anyway.
        """
        found = self.rule(self.counting(config), num_layers, ranking_layers)
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

    def selector(self, config: ASLConfig, prompts: Prompts) -> Selector:
        """What decides which tokens of these prompts are kept, and after which layers; config is resolved. By default
        adaptive selection, or none where `prunes_tokens` is False."""
        from flexasl.selectors import LayerSelector, Selector, StagedSelector

        if not self.prunes_tokens:
            return Selector(f"policy {self.name!r} lets every token through every layer")
        lengths, rows, tokens, _, ranking_layers, device, asked = prompts
        where: dict[str, Any] = {"tokens": tokens, "rows": rows, "ranking_layers": ranking_layers, "device": device}
        if config.rule == "lookup":
            return StagedSelector(config, lengths, asked=asked, **where)
        return LayerSelector(config, lengths, **where)

    def retention(self, config: ASLConfig, num_layers: int) -> Retention:
        """What decides which cache entries a layer keeps. By default `kv_budget` or `kv_top_p`."""
        from flexasl.retention import Retention, top_k, top_p

        if config.kv_top_p is not None:
            return top_p(config.kv_top_p, lambda layer, tokens: config.token_budget(tokens))
        if config.kv_budget is not None:
            return top_k(lambda layer, tokens: config.cache_budget(tokens))
        return Retention()
