"""Which model settings were calibrated for, so that another one refuses them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flexasl.checks import instance, integer
from flexasl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CalibratedFor:
    """The model that settings were found for."""

    model: str
    """Its hub id, or the name of its folder."""
    model_type: str
    num_layers: int
    hidden_size: int
    dtype: str
    weights: str | None = None
    """A digest of a sample of the weights; None where it could not be taken."""

    def __post_init__(self) -> None:
        for name in ("model", "model_type", "dtype"):
            instance(f"calibrated_for: {name}", getattr(self, name), str, "a text", ConfigError)
        for name in ("num_layers", "hidden_size"):
            integer(f"calibrated_for: {name}", getattr(self, name), 1, error=ConfigError)
        instance("calibrated_for: weights", self.weights, (str, type(None)), "a text or None", ConfigError)

    def refuse_depth(self, num_layers: int) -> None:
        """Raises `ConfigError` for a model of another depth."""
        if self.num_layers != num_layers:
            self._refuse(f"has {num_layers} layers")

    def refuse_other(self, model: CalibratedFor) -> None:
        """Raises `ConfigError` for another model. Weights are compared where both have the same dtype: in another one
        the same weights have another digest."""
        for name in ("model_type", "num_layers", "hidden_size"):
            if getattr(self, name) != getattr(model, name):
                self._refuse(f"is {model}")
        comparable = self.dtype == model.dtype and None not in (self.weights, model.weights)
        if comparable and self.weights != model.weights:
            self._refuse(f"is {model}, of the same shape but with other weights")

    def _refuse(self, what: str) -> None:
        raise ConfigError(
            f"config was calibrated for {self}, and this model {what}; calibrate this one, or drop the model from the "
            "settings with config.replace(calibrated_for=None) (in a file: remove calibrated_for)"
        )

    def __str__(self) -> str:
        return f"{self.model} ({self.model_type}, {self.num_layers} layers, hidden size {self.hidden_size})"

    @classmethod
    def from_dict(cls, found: Any) -> CalibratedFor:
        """The inverse of `dataclasses.asdict`."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or not names - {"weights"} <= set(found) <= names:
            raise ConfigError(f"calibrated_for does not name a model; it holds {', '.join(sorted(names))}")
        return cls(**found)
