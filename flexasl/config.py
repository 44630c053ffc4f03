"""Every setting of the method, its unit and its check."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flexasl import checks, stored
from flexasl.calibrated import CalibratedFor
from flexasl.checks import amount, article, ascending, instance, integer, one_of, real
from flexasl.errors import ConfigError
from flexasl.stages import Stage

POOLINGS = ("avgpool", "maxpool", "phrase")
SETTLED_BY = ("lookup", "variance")
VARIANCE_REFERENCES = ("initial", "peak")
SELECT_ON = ("last", "max", "recent", "sum")
IF_NEVER = ("select", "keep")
PROPAGATE = ("gather", "mask")
LATER_TURNS = ("keep", "prune")
PUBLISHED_SCORES: dict[str, Any] = {
    "kernel_size": 7,
    "pooling": "avgpool",
    "score_power": 1.0,
    "contrast": False,
    "select_on": "last",
}
"""How tokens are scored in ASL, FastKV and SnapKV."""
OWN_SCORES: dict[str, Any] = PUBLISHED_SCORES | {"kernel_size": 25, "pooling": "maxpool", "select_on": "recent"}
"""How they are scored here under the rule of rank variance."""
LOOKUP_SCORES: dict[str, Any] = OWN_SCORES | {
    "kernel_size": 17,
    "pooling": "phrase",
    "score_power": "max",
    "contrast": True,
}
"""How they are scored under the rule of look-ups."""
KV_DTYPES = ("int8", "fp8")
LOOKUP_TAUS: dict[str, tuple[float, float]] = {"phrase": (0.2, 0.4), "maxpool": (0.5, 0.95), "avgpool": (0.5, 0.95)}
"""By pooling, scores that count as a look-up, for the final selection and for a loose one."""
LOOSER = 1.5
"""The least that a loose selection of a share of the prompt keeps, as a multiple of the final budget."""
UNASKED_TOKENS = 0.5
"""The least that a loose selection keeps where no question is known, as a share of the prompt."""
STAGE_TOKENS = 0.3
"""What a loose selection keeps, as a share of the prompt."""
LONE_STAGE_TOKENS = 0.5
"""The same, where its range has one layer that ranks."""
PAPER_RULE: dict[str, Any] = {
    "settled_by": "variance",
    "variance_reference": "initial",
    "if_never": "keep",
    **PUBLISHED_SCORES,
}
"""Settings of the published rule, where they are not the defaults."""
LEAST = {
    "window": 1,
    "kernel_size": 1,
    "observe_layers": 1,
    "score_from": 0,
    "min_layer": 0,
    "min_layer_unasked": 0,
    "max_layer": 0,
}
"""Whole numbers among the settings, and their least values."""


@dataclass(frozen=True, kw_only=True)
class ASLConfig:
    """Settings of adaptive layer selection (ASL, arXiv 2601.07667).

    Layers count from 0. A setting that is None where the type allows it depends on the model or on another setting:
    `resolve` fills it in, and the report shows its value.

    Args:
        select_tokens: Tokens that the deeper layers run on, the window included: a count, or a share in (0, 1] of the
            prompt.
        kv_budget: Cache entries that each KV head and layer keeps, by SnapKV, the window included: a count, a share of
            the prompt, or None (all).
        kv_top_p: Share in (0, 1] of the attention whose cache entries each KV head keeps, or None (all). It excludes
            `kv_budget`.
        kv_dtype: How caches store keys and values: in eight bits, with a float16 scale for each entry and head, or
            None, as the model makes them. The prompt is read and pruned with the model's own values either way. Needs
            torchao.
        settled_by: What starts the final selection. `"lookup"`: a token far from the question scores at least `tau`,
            which falls by 15 percent with every further layer. `"variance"`, as in the paper: the variance of ranks
            over `observe_layers` falls below `tau` of a reference. None: `"variance"` where
            `variance_reference` or `observe_layers` is given, else `"lookup"`.
        tau: Threshold of `settled_by`, in (0, 1]. None: 0.2 for look-ups, or 0.5 with another pooling than `"phrase"`,
            counted from a third of the layers, so that it is lower where the first layer that attends to the whole
            prompt comes later; for the variance 0.3 with the `"initial"` reference, as in the paper, and 0.05 with
            `"peak"`.
        stages: Loose selections before the final one, see `Stage`; also as texts such as `"0.5@5-9"`. None: with
            `"lookup"`, one that keeps three tenths of the tokens, or half where only one layer of its range attends to
            the whole prompt; with `"variance"`, which takes no stages, none.
        min_layer: First layer at which the final selection can happen. None: a third of the layers; three eighths with
            `"variance"` and the `"peak"` reference; at least `observe_layers - 1`.
        min_layer_unasked: With `"lookup"`, first layer of the final selection from a prompt whose question is not
            known, so that the window ranks it. Where this comes after `min_layer`, loose stages keep at least half of
            such a prompt. None: half of the layers, or `min_layer` where that is greater, and `max_layer` at most.
        max_layer: Last layer at which the final selection can happen. None: seven tenths of the way down; with the
            `"initial"` reference the last layer, as in the paper.
        observe_layers: Layers over which the variance of ranks is taken. None: 8 with the `"initial"` reference, as in
            the paper, 4 with `"peak"`; or a third of a shallow stack, at least 2.
        score_from: First layer whose scores count with `"lookup"`. None: an eighth of the layers.
        window: Last tokens of the prompt, which are always kept. Their queries score the other tokens where no
            question is known.
        kernel_size: Tokens that each score is pooled over; odd. None: 17, so that a token is kept together with its
            neighbours; 25 with `"variance"`; 7 with the `"initial"` reference and for other policies than `asl`, as in
            their papers.
        pooling: How scores are pooled over neighbouring tokens. None: `"phrase"`; `"maxpool"` with `"variance"`;
            `"avgpool"` with the `"initial"` reference and for other policies. `"phrase"` averages over 7 tokens,
            because a real match is a phrase and a match by chance is a word, then takes the maximum of `kernel_size`.
            Each score then also counts for the `2 * kernel_size` tokens after it, 5 percent less with each, because an
            answer comes after what matches.
        score_power: Exponent of each attention weight before the weights of several queries and heads are added up.
            With 2 or 4, a few high weights count for more than many low ones; `"max"` takes the
            highest weight. None: `"max"` with `"lookup"`, else 1.
        contrast: Whether the attention that a query head gives a token from the text right before the question is
            subtracted from what it gives from the question, so that heads which attend to it anyway do not count. Where
            no question is known, nothing is subtracted. None: True with `"lookup"`, else False.
        variance_reference: What the variance is compared with: its value at `min_layer` (the paper), or the highest
            value so far. None: `"peak"`.
        select_on: Scores that tokens are selected on: `"last"`, those of the selection layer; `"max"`, the best of
            several layers; `"recent"`, the best with a fifth less for every earlier layer; `"sum"`, the sum with the
            same decay. The layers are the observed ones, or with `"lookup"` all from `score_from` on. None:
            `"recent"`; `"last"` in the same cases as `kernel_size` is 7.
        if_never: What happens where nothing has started a selection by `max_layer`: select there, or keep every token.
            None: keep with the `"initial"` reference and no `max_layer`, as in the paper; else select.
        propagate: How the selection reaches the deeper layers: they run on the kept tokens alone, or on all tokens
            with the others masked out. Masking saves no time, but no shape depends on the decision.
        later_turns: What happens to several new tokens that follow a cached prompt: all are kept, or they are pruned
            like a prompt, by the same settings, which then count the turn's own tokens. Earlier tokens do not change.
        calibrated_for: Not a setting, but the model that calibration found the settings for. Another model refuses
            them. None: any model takes them.

    Raises:
        ConfigError: A setting has a value that it cannot have, or two settings exclude each other.

    Examples:
        >>> config = ASLConfig(select_tokens=512, kv_budget=0.25)
        >>> config.cache_budget(4000)  # a quarter of a prompt of 4,000 tokens
        1000
        >>> config.resolve(num_layers=30).max_layer  # the default of a model with 30 layers
        20
    """

    select_tokens: int | float = 2048
    kv_budget: int | float | None = None
    kv_top_p: float | None = None
    kv_dtype: Literal["int8", "fp8"] | None = None
    settled_by: Literal["lookup", "variance"] | None = None
    tau: float | None = None
    stages: tuple[Stage, ...] | None = None
    min_layer: int | None = None
    min_layer_unasked: int | None = None
    max_layer: int | None = None
    observe_layers: int | None = None
    score_from: int | None = None
    window: int = 32
    kernel_size: int | None = None
    pooling: Literal["avgpool", "maxpool", "phrase"] | None = None
    score_power: float | Literal["max"] | None = None
    contrast: bool | None = None
    variance_reference: Literal["initial", "peak"] | None = None
    select_on: Literal["last", "max", "recent", "sum"] | None = None
    if_never: Literal["select", "keep"] | None = None
    propagate: Literal["gather", "mask"] = "gather"
    later_turns: Literal["keep", "prune"] = "keep"
    calibrated_for: CalibratedFor | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_choices()
        self._check_amounts()
        self._check_rule()
        self._check_layers()

    @classmethod
    def paper(cls, **changes: Any) -> ASLConfig:
        """The published rule of ASL: the variance over its value at `min_layer`, selection on that layer's scores, else
        every token is kept.

        Args:
            changes: Settings that differ from the published ones.
        """
        return cls(**(PAPER_RULE | changes))

    def replace(self, **changes: Any) -> ASLConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON-ready dict; `calibrated_for` only where it is given."""
        settings = dataclasses.asdict(self)
        settings["stages"] = None if self.stages is None else list(settings["stages"])
        if self.calibrated_for is None:
            del settings["calibrated_for"]
        return settings

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ASLConfig:
        """The inverse of `to_dict`; an unknown name raises `ConfigError`."""
        if not isinstance(settings, dict):
            raise ConfigError(f"settings are {article(settings)}; give a dict as `to_dict` makes it")
        _refuse_unknown(settings)
        model = settings.get("calibrated_for")
        return cls(**(settings if model is None else settings | {"calibrated_for": CalibratedFor.from_dict(model)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ASLConfig:
        """Reads settings from a JSON file, as `to_dict` makes them and `flexasl calibrate` writes them.

        Args:
            path: The file.

        Raises:
            ConfigError: The file holds something else.
            FileNotFoundError: There is no such file.
        """
        path = checks.path("path", path)
        try:
            settings = stored.read(path)
            if isinstance(settings, dict) and {"settings", "evidence"} <= settings.keys():
                raise ConfigError("it is a profile; give the settings beside it, or flexasl.patch(model, profile=...)")
            return cls.from_dict(settings)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{os.fspath(path)} does not exist; give a JSON file of settings") from error
        except (ConfigError, stored.Unfit) as error:
            raise ConfigError(f"{os.fspath(path)} holds no settings of ASLConfig: {error!s:.300}") from error

    @checks.renames(voters="ranking_layers")
    def resolve(self, num_layers: int, ranking_layers: Sequence[int] | None = None) -> ASLConfig:
        """The same settings for a stack of `num_layers` layers, with every default filled in that depends on the
        model.

        ranking_layers are the layers that a ranking may be taken from, ascending; None for all. Where these are not
        all, `observe_layers` counts ranking_layers, `min_layer` becomes the first one from there on that has so many,
        and `max_layer` the last one up to there. Raises `ConfigError` for settings that do not fit so many layers, or
        were calibrated for a model of another depth.
        """
        num_layers = integer("num_layers", num_layers, 1, error=ConfigError)
        if self.calibrated_for is not None:
            self.calibrated_for.refuse_depth(num_layers)
        self._refuse_beyond(num_layers)
        if ranking_layers is not None:
            ranking_layers = ascending("ranking_layers: layer", ranking_layers, 0, num_layers - 1, error=ConfigError)
            if not ranking_layers:
                raise ConfigError("ranking_layers is empty; give at least one layer, or None for all")
        from flexasl.resolving import resolve_lookup, resolve_variance

        resolve = resolve_lookup if self.rule == "lookup" else resolve_variance
        return resolve(self, num_layers, ranking_layers)

    def scored(self, how: Mapping[str, Any] = PUBLISHED_SCORES) -> ASLConfig:
        """The same settings, with these where those that say how tokens are scored are left open."""
        return self.replace(**{name: value for name, value in how.items() if getattr(self, name) is None})

    @property
    def rule(self) -> str:
        """`settled_by`, also where it is left open."""
        of_variance = self.variance_reference is not None or self.observe_layers is not None
        return self.settled_by or ("variance" if of_variance else "lookup")

    def token_budget(self, prompt_tokens: int) -> int:
        """Tokens kept of a prompt of so many tokens, window included; a share keeps at least one prefix token."""
        return _amount(self.select_tokens, prompt_tokens, self.window)

    def cache_budget(self, prompt_tokens: int) -> int | None:
        """Cache entries per KV head for a prompt of so many tokens, window included; None where there is no limit."""
        return None if self.kv_budget is None else _amount(self.kv_budget, prompt_tokens, self.window)

    @property
    def power(self) -> float:
        """`score_power` as a number; 1 where it is open."""
        return math.inf if self.score_power == "max" else float(self.score_power or 1)

    @property
    def compresses_cache(self) -> bool:
        """Whether any cache entry may be dropped by SnapKV."""
        return self.kv_budget is not None or self.kv_top_p is not None

    def _check_integers(self) -> None:
        for name, minimum in LEAST.items():
            value = getattr(self, name)
            if value is not None or name == "window":
                self._set(name, integer(name, value, minimum, error=ConfigError))
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={self.kernel_size} is even; give an odd number, so that pooling is centred")
        instance("calibrated_for", self.calibrated_for, (CalibratedFor, type(None)), "None", ConfigError)

    def _set(self, name: str, value: Any) -> None:
        """Puts a checked value in the place of the one that was given, such as an int for numpy's."""
        object.__setattr__(self, name, value)

    def _refuse_beyond(self, num_layers: int) -> None:
        """Raises `ConfigError` for a layer that the model does not have."""
        layers = ("score_from", "min_layer", "min_layer_unasked", "max_layer")
        for name, beyond in (("observe_layers", 1), *((name, 0) for name in layers)):
            value = getattr(self, name)
            if value is not None and value - beyond >= num_layers:
                raise ConfigError(
                    f"{name}={value} is beyond the model, which has {num_layers} layers; give at most "
                    f"{num_layers - 1 + beyond}"
                )

    def _check_choices(self) -> None:
        choices = {
            "settled_by": (*SETTLED_BY, None),
            "pooling": (*POOLINGS, None),
            "contrast": (True, False, None),
            "variance_reference": (*VARIANCE_REFERENCES, None),
            "select_on": (*SELECT_ON, None),
            "if_never": (*IF_NEVER, None),
            "propagate": PROPAGATE,
            "later_turns": LATER_TURNS,
            "kv_dtype": (*KV_DTYPES, None),
        }
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed, error=ConfigError)

    def _check_amounts(self) -> None:
        for name in ("select_tokens", "kv_budget"):
            value = getattr(self, name)
            if value is not None or name == "select_tokens":
                why = f"does not exceed window={self.window}, whose tokens are always kept"
                self._set(name, amount(name, value, self.window + 1, why))
        if self.score_power not in ("max", None):
            power = real("score_power", self.score_power, "a number of at least 1, or 'max'", error=ConfigError)
            if power < 1:
                raise ConfigError(f"score_power={power} is too small; give a number of at least 1, or 'max'")
            self._set("score_power", power)
        for name in ("tau", "kv_top_p"):
            value = getattr(self, name)
            if value is not None:
                value = real(name, value, "a number in (0, 1]", error=ConfigError)
                if not 0 < value <= 1:
                    raise ConfigError(f"{name}={value} is out of range; give a number in (0, 1]")
                self._set(name, value)
        if self.kv_budget is not None and self.kv_top_p is not None:
            raise ConfigError(
                f"kv_budget={self.kv_budget} and kv_top_p={self.kv_top_p} exclude each other; give one of them"
            )

        if self.propagate == "mask" and self.later_turns == "prune":
            raise ConfigError(
                "propagate='mask' and later_turns='prune' exclude each other; give propagate='gather' or "
                "later_turns='keep'"
            )
        if self.propagate == "mask" and self.compresses_cache:
            name = "kv_budget" if self.kv_budget is not None else "kv_top_p"
            raise ConfigError(
                f"propagate='mask' keeps every token until the prompt is read, which {name}={getattr(self, name)} "
                f"excludes; give propagate='gather', or {name}=None"
            )

    def _check_rule(self) -> None:
        if self.stages is not None:
            self._set("stages", Stage.several(self.stages))
        if self.rule == "lookup":
            for name in ("variance_reference", "observe_layers"):
                if getattr(self, name) is not None:
                    value = getattr(self, name)
                    raise ConfigError(f"{name}={value!r} has no effect with settled_by='lookup'; give one of the two")
            return
        for name in ("score_from", "min_layer_unasked"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect with settled_by='variance'; give settled_by='lookup', "
                    f"or {name}=None"
                )
        if self.stages:
            raise ConfigError(
                f"stages={'+'.join(map(str, self.stages))!r} does not go with settled_by='variance', which selects "
                "once; give settled_by='lookup', or stages=()"
            )

    def _check_layers(self) -> None:
        first, last, observe = self.min_layer, self.max_layer, self.observe_layers
        if first is not None and observe is not None and first < observe - 1:
            raise ConfigError(
                f"min_layer={first} leaves fewer than observe_layers={observe} layers to take ranks from; "
                f"give min_layer of at least {observe - 1}"
            )
        if last is not None and first is not None and last < first:
            raise ConfigError(f"max_layer={last} comes before min_layer={first}; give at least {first}")
        unasked = self.min_layer_unasked
        if unasked is not None and not (first or 0) <= unasked <= (unasked if last is None else last):
            raise ConfigError(
                f"min_layer_unasked={unasked} is not among the layers from min_layer={first} to max_layer={last}; give "
                "one of them"
            )
        if last is not None and observe is not None and last < observe - 1:
            raise ConfigError(
                f"max_layer={last} leaves fewer than observe_layers={observe} layers to take ranks from; "
                f"give max_layer of at least {observe - 1}"
            )


SETTINGS = tuple(field.name for field in dataclasses.fields(ASLConfig) if field.name != "calibrated_for")
"""Names of all settings."""


def _refuse_unknown(settings: dict[Any, Any]) -> None:
    for name in settings:
        if name not in (*SETTINGS, "calibrated_for"):
            raise ConfigError(f"{name!r} is not a setting of ASLConfig; the settings are {', '.join(SETTINGS)}")


def _by_known_names(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which says which settings there are where a name is none of them."""

    @functools.wraps(init)
    def checked(self: ASLConfig, *args: Any, **settings: Any) -> None:
        _refuse_unknown(settings)
        init(self, *args, **settings)

    return checked


ASLConfig.__init__ = _by_known_names(ASLConfig.__init__)  # type: ignore[method-assign]


def refuse_open(rule: ASLConfig, num_layers: int | None = None, found: str = "config has") -> None:
    """Raises `ConfigError` where settings are not resolved for so many layers, or, with None, for scores that
    are there already; found: whose they are."""
    scoring = () if num_layers is None else tuple(OWN_SCORES)
    of_rule = ("stages", "score_from", "min_layer_unasked") if rule.rule == "lookup" else ("observe_layers",)
    for name in ("tau", *of_rule, "min_layer", "max_layer", "if_never", *scoring):
        if getattr(rule, name) is None:
            raise ConfigError(f"{found} {name}=None; give those of policy.resolve(config, num_layers)")
    if num_layers is not None and rule.max_layer is not None and rule.max_layer >= num_layers:
        raise ConfigError(
            f"{found} max_layer={rule.max_layer}, of {num_layers} layers; give layers up to {num_layers - 1}"
        )


def _amount(value: int | float, prompt_tokens: int, window: int) -> int:
    if isinstance(value, int):
        return value
    return max(math.floor(value * prompt_tokens), window + 1)
