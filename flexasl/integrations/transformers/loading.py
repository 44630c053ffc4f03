"""A saved cache for a patched model."""

from __future__ import annotations

import os
from typing import Any

import torch

from flexasl.errors import FlexASLError
from flexasl.integrations.transformers.cache import PrunedCache, PrunedCacheLayer
from flexasl.integrations.transformers.fingerprint import refuse_other_model
from flexasl.integrations.transformers.models import decoder_of
from flexasl.integrations.transformers.placement import input_device
from flexasl.saving import SavedCache, SavedLayer, read


def load(path: str | os.PathLike[str], model: Any) -> PrunedCache:
    """The file's cache on the model's device; see `flexasl.load_cache`."""
    saved = read(path)
    refuse_other_model(saved.model, model, os.fspath(path))
    needed = _refuse_misfits(saved, model, os.fspath(path))
    device = input_device(model)
    layers = model.flexasl_patch.new_layers()
    for layer, entries, made in zip(layers, saved.layers, needed, strict=True):
        states = {name: own.to(device).clone() for name, own in entries.states.items()}
        if not isinstance(layer, PrunedCacheLayer):
            layer.hold(states)
            layer.seen, layer.uncroppable = saved.seen, entries.uncroppable
            continue
        assert entries.positions is not None
        layer.restore(
            [states.to(device) for states in entries.stored],
            entries.positions.to(device),
            None if entries.valid is None else entries.valid.to(device),
            dtype=made.keys.dtype,
            seen=saved.seen,
            uncroppable=entries.uncroppable,
        )
        if layer.beside is not None:
            layer.beside.hold(states)
    cache = PrunedCache()
    cache.restore(layers, saved, model)
    return cache


def _refuse_misfits(saved: SavedCache, model: Any, path: str) -> list[SavedLayer]:
    """Raises `FlexASLError` unless the tensors are such as the model makes, in eight bits or not; returns what it makes
    of one token at each layer."""
    needed = _made_by(model)
    if len(saved.layers) != len(needed):
        raise FlexASLError(f"{path} has {len(saved.layers)} layers, and the model {len(needed)}; save the cache again")
    for index, (layer, made) in enumerate(zip(saved.layers, needed, strict=True)):
        own = [(states.shape[1], states.shape[3], states.dtype) for states in made.stored]
        theirs = [(states.shape[1], states.shape[3], states.dtype) for states in layer.stored[:2]]
        if len(layer.stored) > 2:  # of eight bits
            theirs = [(heads, dim, dtype) for (heads, dim, _), (_, _, dtype) in zip(theirs, own)]
        if theirs != own:
            raise FlexASLError(
                f"{path} has other keys and values at layer {index} than the model makes: heads, dims and dtypes are "
                f"{theirs} where they should be {own}; save the cache again"
            )
        states, like = (
            {name: (*one.shape[1:], one.dtype) for name, one in saved_or_made.states.items()}
            for saved_or_made in (layer, made)
        )
        if states != like:
            raise FlexASLError(
                f"{path} has other states at layer {index} than the model makes: {states} where they should be {like}; "
                "save the cache again"
            )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if saved.token_ids is not None and bool((saved.token_ids >= vocabulary).any()):
        raise FlexASLError(f"{path} has token ids beyond the model's {vocabulary}; save the cache again")
    return needed


@torch.no_grad()
def _made_by(model: Any) -> list[SavedLayer]:
    """Keys, values and states of one token at every layer: no config says for all families what they look like."""
    patch = model.flexasl_patch
    report = patch.report
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        made = decoder_of(model)(input_ids=ids, use_cache=True).past_key_values
    finally:
        patch.report = report
    found = []
    for layer in made.layers:
        has_keys = isinstance(layer, PrunedCacheLayer)
        states = (layer.beside and layer.beside.states) if has_keys else layer.states
        found.append(SavedLayer(stored=(layer.keys, layer.values) if has_keys else (), states=states or {}))
    return found
