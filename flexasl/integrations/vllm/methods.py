"""What prunes the prompts of a server, and what a request may ask for in its place."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flexasl.calibrated import CalibratedFor
from flexasl.checks import instance, integer, shown
from flexasl.config import SETTINGS, ASLConfig
from flexasl.errors import ConfigError, FlexASLError
from flexasl.policies import Policy, choose
from flexasl.policies.contract import limits_of, resolved
from flexasl.policies.grammar import number
from flexasl.profiles import Profile, filled, find, is_open

OF_REQUEST = ("select_tokens", "kv_budget", "policy", "question")
"""What a request may set, each with `flexasl_` before it, in `SamplingParams.extra_args`."""
SHARED = ("select_tokens", "kv_budget", "window")
"""Settings of the server that hold under another policy, too, where they count."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with; checked as far as it can be without the model."""

    policy: str = "asl"
    config: ASLConfig | None = None
    _: dataclasses.KW_ONLY
    rank_by_question: bool = True
    profile: str | bool | None = None
    reports: str | None = None
    max_new_tokens: int | None = None
    """The most that a request may ask for; where every layer's cache has a limit, memory is for so many."""

    def __post_init__(self) -> None:
        text = instance("policy", self.policy, str, "a policy's name, as a text", ConfigError)
        policy, config = choose(text, self.config)
        object.__setattr__(self, "config", config)
        instance("rank_by_question", self.rank_by_question, bool, "True or False", ConfigError)
        instance("reports", self.reports, (str, type(None)), "the name of a file, or None", ConfigError)
        if self.max_new_tokens is not None:
            object.__setattr__(
                self, "max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 1, error=ConfigError)
            )
        if self.profile is True or not isinstance(self.profile, (str, bool, type(None))):
            raise ConfigError(f"profile={shown(self.profile)} is not a file; give the name of one, False or None")
        refuse(policy, config)

    def to_dict(self) -> dict[str, Any]:
        """As `additional_config` takes it, ready for JSON."""
        assert self.config is not None
        plain = ASLConfig().to_dict()
        config = {name: value for name, value in self.config.to_dict().items() if value != plain.get(name)}
        return dataclasses.asdict(dataclasses.replace(self, config=None)) | {"config": config}

    @classmethod
    def from_dict(cls, given: Any) -> Settings:
        """The inverse of `to_dict`."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(given, Mapping) or not set(given) <= names:
            allowed = ", ".join(sorted(names))
            raise ConfigError(f"additional_config: flexasl={shown(given)}; give a dict with some of {allowed}")
        made = dict(given)
        return cls(**made | {"config": ASLConfig.from_dict(dict(made.get("config") or {}))})


def refuse(policy: Policy, config: ASLConfig) -> None:
    """Raises `ConfigError` for what a serving engine cannot honour."""
    policy.check(config)
    if policy.second_pass:
        raise ConfigError(
            f"policy={policy.name!r} reads tokens twice, which is not available in vLLM; give policy='asl'"
        )
    for name, plain, why in (
        ("propagate", "gather", "would hold every token's memory"),
        ("later_turns", "keep", "would have no effect: vLLM reads every conversation as one prompt"),
        ("kv_dtype", None, "is vLLM's to say; give vLLM kv_cache_dtype"),
        ("kv_top_p", None, "keeps another number of entries in each head, and vLLM's cache one; give kv_budget"),
    ):
        if getattr(config, name) != plain:
            raise ConfigError(f"{name}={getattr(config, name)!r} {why}")


class Method(NamedTuple):
    """A policy, with settings that are resolved for a model."""

    policy: Policy
    config: ASLConfig
    num_layers: int
    profile: str | None = None
    """Name of the profile that filled in settings, and where it was found."""

    def limits(self, prompt_tokens: int) -> list[int | None]:
        """By layer, how many entries of such a prompt the cache keeps; None: all that the layer has."""
        retention = self.policy.retention(self.config, self.num_layers)
        made = limits_of(self.policy, self.config, retention, self.num_layers, [prompt_tokens])
        return [of_layer[0] for of_layer in made]

    def entries(self, prompt_tokens: int) -> int | None:
        """The most that any layer's cache keeps of such a prompt; None where one keeps all that it has."""
        limits = self.limits(prompt_tokens)
        known = [limit for limit in limits if limit is not None]
        return min(prompt_tokens, max(known)) if len(known) == len(limits) else None

    def prunes(self, prompt_tokens: int) -> bool:
        """Whether such a prompt may lose tokens or entries."""
        over = any(limit is not None and limit < prompt_tokens for limit in self.limits(prompt_tokens))
        return over or (self.policy.prunes_tokens and self.config.token_budget(prompt_tokens) < prompt_tokens)


@dataclasses.dataclass(frozen=True)
class Methods:
    """The methods of a server for one model: its own, and what requests ask for in its place."""

    settings: Settings
    model: CalibratedFor
    longest: int
    """Tokens of a prompt and its answer, at most."""

    @functools.cached_property
    def own(self) -> Method:
        """That of requests that ask for nothing else."""
        assert self.settings.config is not None
        method = self._resolve(*choose(self.settings.policy, self.settings.config), self._profile())
        if not method.policy.retention(method.config, method.num_layers).exact:
            raise ConfigError(
                f"policy={self.settings.policy!r} keeps another number of entries in each head; give another"
            )
        return method

    @functools.cached_property
    def lean(self) -> bool:
        """Whether every layer's cache has a limit, so that memory for whole prompts is never needed."""
        return self.own.entries(self.longest) is not None

    def of(self, asked: Mapping[str, Any]) -> Method:
        """The method that a request asks for; raises `FlexASLError` for what cannot be honoured."""
        given = {name: value for name, value in asked.items() if name != "question"}
        return self._of(tuple(sorted(given.items()))) if given else self.own

    def _of(self, given: tuple[tuple[str, Any], ...]) -> Method:
        return _made(self, given)

    def make(self, asked: dict[str, Any]) -> Method:
        """As `of`, without its memory."""
        name, own = asked.pop("policy", None), self.settings.config
        assert own is not None
        if name is None:
            base, policy = own, self.settings.policy
        else:
            takes = choose(name)[0].takes
            base, policy = ASLConfig(**{part: getattr(own, part) for part in SHARED if part in takes}), name
        if asked.get("kv_budget", ...) is None and self.lean:
            raise self._too_much("kv_budget", None)
        method = self._resolve(*choose(policy, base.replace(**asked)), None if name is not None else self._profile())
        if self.lean:
            self._refuse_beyond_memory(method)
        return method

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"settings": self.settings.to_dict(), "model": dataclasses.asdict(self.model), "longest": self.longest}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Methods:
        """The inverse of `to_dict`."""
        model = CalibratedFor.from_dict(given["model"])
        return cls(Settings.from_dict(given["settings"]), model, given["longest"])

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def _resolve(self, policy: Policy, config: ASLConfig, profile: Profile | None) -> Method:
        refuse(policy, config)
        if config.calibrated_for is not None:
            config.calibrated_for.refuse_other(self.model)
        layers = self.model.num_layers
        usable = profile if policy.takes_profiles and is_open(config) else None
        made, name = filled(config, usable, policy.takes, lambda one: resolved(policy, one, layers))
        return Method(policy, made, layers, name)

    def _profile(self) -> Profile | None:
        given = self.settings.profile
        if given is False:
            return None
        return Profile.load(given).of(self.model) if isinstance(given, str) else find(self.model)

    def _refuse_beyond_memory(self, method: Method) -> None:
        """Raises `FlexASLError` where a prompt would need more entries than the server holds for one."""
        lengths = {self.longest, *(2**power for power in range(self.longest.bit_length()))}
        for length in sorted(lengths):
            most, asked = self.own.entries(length), method.entries(length)
            assert most is not None
            if asked is None or asked > most:
                raise self._too_much("policy" if asked is None else "kv_budget", method)

    def _too_much(self, name: str, method: Method | None) -> FlexASLError:
        value = None if method is None else method.policy.name if name == "policy" else method.config.kv_budget
        return ConfigError(
            f"{name}={value!r} would need more memory than this server holds for a prompt, kv_budget="
            f"{self.own.config.kv_budget}; give at most that, or start the server without kv_budget"
        )


@functools.lru_cache(maxsize=256)
def _made(methods: Methods, given: tuple[tuple[str, Any], ...]) -> Method:
    return methods.make(dict(given))


def of_model(model_config: Any, settings: Settings) -> Methods:
    """The methods for the model that vLLM is about to load, which is known by its name and shape; its weights are not
    looked at, as vLLM stores them in another way."""
    text = model_config.hf_text_config
    model = CalibratedFor(
        model=Path(model_config.model).name,
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        dtype=str(model_config.dtype).removeprefix("torch."),
    )
    return Methods(settings, model, model_config.max_model_len)


def asked_for(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a request's `extra_args` say to us, as `Methods.of` takes it, and its question. Raises `FlexASLError` for a
    name or a value that is not known."""
    found: dict[str, Any] = {}
    for name, value in (extra_args or {}).items():
        if not name.startswith("flexasl_"):
            continue
        setting = name.removeprefix("flexasl_")
        if setting not in OF_REQUEST:
            allowed = ", ".join(f"flexasl_{one}" for one in OF_REQUEST)
            raise FlexASLError(f"{name}={shown(value)} is not known; a request may set {allowed}")
        if setting in SETTINGS:
            found[setting] = _amount(name, value)
        elif setting == "policy":
            found[setting] = instance(name, value, str, "a policy's name, such as 'asl' or 'full'")
        else:
            found[setting] = _question(name, value)
    return found


def _amount(name: str, value: Any) -> Any:
    made = number(value) if isinstance(value, str) else value
    if isinstance(made, bool) or not isinstance(made, (int, float)):
        raise FlexASLError(f"{name}={shown(value)} is not an amount; give a count of tokens, or a share of the prompt")
    return made


def _question(name: str, value: Any) -> Any:
    """A question as `flexasl.integrations.questions` takes that of one row: over HTTP, where lists hold no pairs, spans
    come as [start, stop, start, stop]."""
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    ends = [end for part in parts for end in (part if isinstance(part, (list, tuple)) else [part])]
    if ends and all(isinstance(end, int) and not isinstance(end, bool) for end in ends) and len(ends) % 2 == 0:
        return [(start, stop) for start, stop in zip(ends[::2], ends[1::2])]
    if parts and all(isinstance(part, str) and part.strip() for part in parts):
        return parts
    raise FlexASLError(
        f"{name}={shown(value)} is not a question; give a text of the prompt, or [start, stop] of its tokens"
    )
