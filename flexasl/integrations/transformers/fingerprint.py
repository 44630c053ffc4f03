"""Which model a saved cache belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flexasl.calibrated import CalibratedFor
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.integrations.transformers.adapters import adapters_in_use
from flexasl.stored import nameable

SAMPLE = 64
"""Numbers of each parameter that are hashed."""
UNLIKE_MODELS = ("rope", "rotary", "layer_types", "activation", "hidden_act")
"""Parts of the names of settings that count, although they are no numbers."""
LIKE_MODELS = ("token_id", "drop", "initializer", "chunk_size")
"""Parts of the names of numbers that change nothing in what a cache holds."""


def fingerprint(model: Any) -> dict[str, Any]:
    """Architecture, dtype, settings (rotary ones included), digests of shapes and weights, and which of the adapters
    are in use, ready for JSON.

    The same on every device. Weights are known by `SAMPLE` numbers of every parameter, evenly spaced: another training
    run differs in them, a single changed number may not. Of quantised weights, the numbers and scales that are stored
    count. Raises `UnsupportedError` where weights are offloaded or split over processes, or cannot be looked into.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    samples: dict[str, list[Tensor]] = {}
    try:
        for name, parameter in sorted(model.named_parameters()):
            if parameter.is_meta or (getattr(model, "tp_size", None) or 1) > 1 or hasattr(parameter, "device_mesh"):
                raise UnsupportedError(
                    f"{type(model).__name__} has its weights offloaded or split over processes, so its fingerprint "
                    "cannot be taken; saved caches need a model that is in one process and in memory"
                )
            for own, part in _stored(name, parameter.detach()):
                shapes.update(f"{own} {list(part.shape)} {part.dtype}\n".encode())
                flat = part.reshape(-1)
                # An odd step, so that the sample of a matrix does not keep to one column.
                sample = flat[:: flat.numel() // SAMPLE | 1].contiguous()
                samples.setdefault(str(part.dtype), []).append(sample.view(torch.uint8))
        for dtype in sorted(samples):  # one transfer from the device for each dtype
            weights.update(torch.cat(samples[dtype]).cpu().numpy().data)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"{type(model).__name__} has weights that no fingerprint can be taken of ({reason:.200}), so its caches "
            "cannot be saved"
        ) from error
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": _settings(model.config.get_text_config(decoder=True)),
        "shapes": shapes.hexdigest(),
        "weights": weights.hexdigest(),
        "adapters": adapters_in_use(model),
    }


def refuse_other_model(found: dict[str, Any], model: Any, path: str) -> None:
    """Raises `FlexASLError`, which names the first difference, where a file's fingerprint is not this model's."""
    mine = fingerprint(model)
    settings = found.get("settings")
    if not isinstance(settings, dict):
        settings = {}
    # Versions of transformers know different settings: those that both have must agree.
    parts = [("architecture", "architecture"), ("dtype", "dtype"), ("shapes", "digest of shapes")]
    pairs = [(words, found.get(name), mine[name]) for name, words in parts]
    pairs[2:2] = [(name, settings[name], value) for name, value in mine["settings"].items() if name in settings]
    pairs.append(("digest of weights", found.get("weights"), mine["weights"]))
    if "adapters" in found:  # older files do not tell
        pairs.append(("list of adapters in use", found["adapters"], mine["adapters"]))
    for words, theirs, own in pairs:
        if theirs != own:
            raise FlexASLError(
                f"{path} was saved from another model: its {words} is {theirs!r:.100}, and this model's is "
                f"{own!r:.100}; load it with the model that read the prompt"
            )


def _stored(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of, with their names: itself, or those of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _stored(f"{name}.{part}", getattr(tensor, part))


def calibrated_for(model: Any, name: str = "") -> CalibratedFor:
    """The model as calibrated settings name it; without a digest of its weights where `fingerprint` cannot take one."""
    text = model.config.get_text_config(decoder=True)
    try:
        weights = fingerprint(model)["weights"]
    except UnsupportedError:
        weights = None
    return CalibratedFor(
        model=name or nameable(Path(model.name_or_path).name) or type(model).__name__,
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights,
    )


def _settings(config: Any) -> dict[str, Any]:
    """What the config says that decides what keys and values are, as JSON reads it back."""
    known = json.loads(json.dumps(config.to_dict(), default=str), parse_constant=str)
    counted = {}
    for name, value in sorted(known.items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if any(part in name for part in UNLIKE_MODELS) or (number and not any(part in name for part in LIKE_MODELS)):
            counted[name] = value
    return counted
