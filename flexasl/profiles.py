"""Settings that calibration found for models, as files with their evidence: those that come with the library, that were
found on this machine, or that a user gives. A profile fills in what is left open."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexasl import checks, stored
from flexasl.calibrated import CalibratedFor
from flexasl.config import LOOKUP_SCORES, SETTINGS, ASLConfig
from flexasl.errors import ConfigError, FlexASLError
from flexasl.stages import Stage
from flexasl.stored import Count, Share
from flexasl.writing import check_file, write

FORMAT = 1
FOUND = ("score_from", "stages", "min_layer", "max_layer", "tau")
"""Settings that calibration looks for."""
SHIPPED: dict[str, tuple[str, int, int]] = {
    "SmolLM2-135M-Instruct": ("llama", 30, 576),
    "Qwen2.5-Coder-0.5B-Instruct": ("qwen2", 24, 896),
    "Qwen2.5-Coder-1.5B-Instruct": ("qwen2", 28, 1536),
    "gemma-3-270m": ("gemma3_text", 18, 640),
}
"""Files in `flexasl/profiles/`, without `.json`, and the model_type, num_layers and hidden_size that each is for."""
FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a profile sets: layers and thresholds, and the scores that these were found for."""

    score_from: Count
    stages: tuple[Stage, ...]
    min_layer: Count
    max_layer: Count
    tau: float
    kernel_size: Count
    pooling: str
    score_power: float | str
    contrast: bool
    select_on: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the settings rest on."""

    select_tokens: int | float
    length: Count
    """Tokens of each prompt, at most."""
    seed: int
    prompts: dict[str, Count]
    """By task, those that the settings were chosen on."""
    checked: dict[str, Count]
    """By task, those that were answered."""
    held: Share
    """Of `prompts`, those of which the selection holds the answer."""
    cost: Share
    """Of the prefill on these, as a share of the full one's."""
    waited: Share
    """Of these, those on which `max_layer` decided."""
    answers: dict[str, Share]
    """Of `checked`, the share that is answered `full`, by the `default` and by the `chosen` settings."""
    costs: dict[str, float]
    """Likewise, the cost."""
    kept_default: bool
    """Whether the settings are the default's, because the chosen ones lost answers."""
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _File:
    format: int
    model: CalibratedFor
    settings: Settings
    evidence: Evidence


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Settings for one model."""

    name: str
    model: CalibratedFor
    settings: Settings
    evidence: Evidence
    where: str = ""
    """Where it was found."""

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name

    @classmethod
    def from_dict(cls, name: str, data: Any, where: str = "") -> Profile:
        """The profile that a file holds; raises `ConfigError` for anything else, unknown names included."""
        try:
            if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
                raise stored.Unfit(f"format is {checks.shown(data['format'])}, where {FORMAT} is needed")
            file: _File = stored.fit(_File, data)
            found = cls(name=name, model=file.model, settings=file.settings, evidence=file.evidence, where=where)
            found.fill(ASLConfig()).resolve(found.model.num_layers)
        except (ConfigError, stored.Unfit) as error:
            raise ConfigError(f"{where or name} holds no profile: {error!s:.300}") from error
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str], where: str = "") -> Profile:
        """The profile in a file. Raises `ConfigError` where it holds none, FileNotFoundError where there is no file."""
        path = checks.path("profile", path)
        name = stored.nameable(path.name.removesuffix(".json").removesuffix(".profile"))
        try:
            data = stored.read(path)
        except stored.Unfit as error:
            raise ConfigError(f"{path} holds no profile: {error}") from error
        return cls.from_dict(name, data, where or stored.nameable(str(path)))

    def save(self, path: Path) -> None:
        """Writes the profile as a JSON file."""
        data = {"format": FORMAT} | {part: dataclasses.asdict(getattr(self, part)) for part in PARTS}
        write(path, stored.dump(data, indent=1) + "\n")

    def is_for(self, model: CalibratedFor) -> bool:
        """Whether the model is the one that the settings were found for, as far as can be told."""
        try:
            self.model.refuse_other(model)
        except ConfigError:
            return False
        return True

    def of(self, model: CalibratedFor) -> Profile:
        """The profile, which must be for this model; raises `ConfigError` where it is for another one."""
        if not self.is_for(model):
            alike = str(model).partition(" (")[2] == str(self.model).partition(" (")[2]
            raise ConfigError(
                f"{self.where or self.name} is a profile for {self.model}, and this model is {model}"
                + (", with other weights" if alike else "")
            )
        return self

    def suits(self, config: ASLConfig) -> bool:
        """Whether the config has the scores that the settings were found for."""
        scores = [(getattr(config, name), getattr(self.settings, name)) for name in LOOKUP_SCORES]
        return all(given is None or given == found for given, found in scores)

    def fill(self, config: ASLConfig, takes: Collection[str] = SETTINGS) -> ASLConfig:
        """The config with what is open of the settings in `takes` filled in. Raises `ConfigError` where what is given
        leaves no room for it."""
        settings = {name: getattr(self.settings, name) for name in (*FOUND, *LOOKUP_SCORES) if name in takes}
        return config.replace(**{name: value for name, value in settings.items() if getattr(config, name) is None})


PARTS = ("model", "settings", "evidence")


def filled(
    config: ASLConfig, profile: Profile | None, takes: Collection[str], resolve: Callable[[ASLConfig], ASLConfig]
) -> tuple[ASLConfig, str | None]:
    """The config, resolved, with what is open of the settings in `takes` filled in by the profile, and the profile's
    name; with None, as it is resolved alone, where there is no profile, where it fills in nothing, was found for
    another rule or other scores, or where layers that are given leave no room for it."""
    if profile is not None and is_open(config) and profile.suits(config):
        with contextlib.suppress(ConfigError):
            return resolve(profile.fill(config, takes)), str(profile)
    return resolve(config), None


def is_open(config: ASLConfig) -> bool:
    """Whether the config, which is for no model yet, leaves open what profiles set."""
    left = any(getattr(config, name) is None for name in FOUND)
    return left and config.rule == "lookup" and config.calibrated_for is None


def find(model: CalibratedFor) -> Profile | None:
    """The model's profile: one that comes with the library, else one that was stored on this machine. Where none of the
    library's has its shape, the disk is asked once: whether there is a file in the user's cache folder."""
    shape = model.model_type, model.num_layers, model.hidden_size
    for name in (name for name, known in SHIPPED.items() if known == shape):
        found = Profile.load(FOLDER / f"{name}.json", "comes with flexasl")
        # Weights in another dtype than the profile's cannot be compared: models of one shape are told apart by name.
        named = name.lower() == model.model.lower()
        if found.is_for(model) and (named or None is not found.model.weights == model.weights):
            return found
    try:
        path = path_for(model)
    except FlexASLError:  # there is no such folder
        return None
    if path is None or not os.path.isfile(path):  # Path.is_file raises where a folder may not be looked into
        return None
    try:
        return Profile.load(path).of(model)
    except (ConfigError, OSError) as error:
        why = f"{path} cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ConfigError(f"{why}; remove that file, or give profile=False") from error


def path_for(model: CalibratedFor) -> Path | None:
    """Where the user's cache folder has the model's profile; None for a model whose weights have no digest."""
    if model.weights is None:
        return None
    shape = f"{model.model_type}-{model.num_layers}x{model.hidden_size}-{model.dtype}"
    return cache_folder() / "profiles" / f"{shape}-{model.weights[:24]}.json"


def place_for(model: CalibratedFor) -> Path:
    """As `path_for`, in a folder that is there; raises FlexASLError where nothing can be stored."""
    path = path_for(model)
    if path is None:
        raise FlexASLError(
            f"the weights of {model.model} have no digest to store a profile under; give a file to write it to"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexASLError(
            f"{path.parent} cannot be made ({error.strerror or error}); set FLEXASL_CACHE_DIR to a writable folder"
        ) from error
    check_file("", path)
    return path


def store(profile: Profile) -> Path:
    """Puts the profile where `find` looks for it."""
    path = place_for(profile.model)
    profile.save(path)
    return path


def cache_folder() -> Path:
    """The user's cache folder: $FLEXASL_CACHE_DIR, or flexasl in $XDG_CACHE_HOME, or in ~/.cache."""
    chosen = os.environ.get("FLEXASL_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "flexasl"
    except RuntimeError as error:
        raise FlexASLError("the user has no home folder; set FLEXASL_CACHE_DIR to a writable folder") from error
