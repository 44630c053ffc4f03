"""Layers of transformers' `DynamicCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from flexasl.cache import LayerCache
from flexasl.errors import FlexASLError, UnsupportedError


class PrunedCacheLayer(LayerCache, CacheLayerMixin):  # type: ignore[override]
    """A layer of a `DynamicCache` whose length is its own; `get_seq_length` counts the tokens read, kept or not."""

    is_sliding = False
    is_croppable = True

    def __init__(self, slack: int = 0) -> None:
        LayerCache.__init__(self, slack)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage is made as entries come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # A patched layer is given its `LayerStep` in place of the cache.
        raise FlexASLError(
            "past_key_values was made by a patched model and is used by an unpatched one; "
            "patch the model again, or start with a new cache"
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = 0 if self.keys is None else self.keys.shape[2]
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise FlexASLError(
                f"tokens_to_remove={tokens_to_remove} is positive; give minus the number of tokens to drop"
            )
        super().crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.select_rows(rows.repeat_interleave(repeats))


def adopt(cache: Any, layers: int, slack: int) -> None:
    """Gives a user's cache layers of ours where it is new; raises `UnsupportedError` where it cannot have them."""
    if type(cache) is not DynamicCache or cache.offloading:
        raise UnsupportedError(
            f"past_key_values is {'an offloaded' if getattr(cache, 'offloading', False) else 'a'} "
            f"{type(cache).__name__}; a patched model takes a DynamicCache, or none to make its own"
        )
    if cache.layers and all(isinstance(layer, PrunedCacheLayer) for layer in cache.layers):
        return
    if cache.get_seq_length() > 0:
        raise UnsupportedError(
            f"past_key_values holds {cache.get_seq_length()} tokens that were read by an unpatched model; "
            "give a cache that this model returned while patched, or none"
        )
    cache.layers = [PrunedCacheLayer(slack) for _ in range(layers)]
