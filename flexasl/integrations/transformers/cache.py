"""transformers' `DynamicCache` with layers of ours, which remembers what it has read and can be saved.

Shapes: B batch, M new tokens, S positions of the sequence so far.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from flexasl.cache import LayerCache, Retained
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.integrations.transformers.fingerprint import fingerprint
from flexasl.integrations.transformers.states import DummyLayer, PassiveLayer, StateLayer, states_in
from flexasl.report import Report
from flexasl.saving import SavedCache, SavedLayer, write


class PrunedCacheLayer(LayerCache, CacheLayerMixin):  # type: ignore[override]
    """A layer of a `DynamicCache` whose length is its own; `get_seq_length` counts the tokens read, kept or not."""

    is_sliding = False

    def __init__(self, slack: int = 0, beside: StateLayer | None = None) -> None:
        """beside: states that the layer keeps beside keys and values."""
        self.beside = beside
        LayerCache.__init__(self, slack)
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.beside is None or self.beside.is_croppable

    def fresh(self) -> LayerCache:
        return PrunedCacheLayer(self.slack, None if self.beside is None else self.beside.fresh())

    def clear(self) -> None:
        super().clear()
        if self.beside is not None:
            self.beside.clear()

    @property
    def state_bytes(self) -> int:
        return 0 if self.beside is None else self.beside.state_bytes

    def check_crop(self, count: int) -> None:
        """Raises `FlexASLError` where states that the layer keeps beside cannot go back by so many tokens."""
        if self.beside is not None:
            self.beside.seen, self.beside.uncroppable = self.seen, self.uncroppable
            self.beside.check_crop(count)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        if self.beside is not None:
            self.beside.activate_past_recording()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.beside is not None:
            self.beside.select_rows(rows)

    def replace_rows(self, rows: Sequence[int], other: LayerCache, later: Retained | None = None) -> None:
        super().replace_rows(rows, other, later)
        if self.beside is not None:
            self.beside.replace_rows(rows, other.beside)  # type: ignore[attr-defined]

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
        return self._length + query_length, self.seen - self._length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise FlexASLError(
                f"tokens_to_remove={tokens_to_remove} is positive; give minus the number of tokens to drop"
            )
        self.check_crop(-tokens_to_remove)
        super().crop(-tokens_to_remove)
        if self.beside is not None:
            self.beside.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], dtype=torch.int64, device=self.positions.device)
            self.select_rows(rows.repeat_interleave(repeats))

    @classmethod
    def stacked(cls, caches: Sequence[Any], slack: int = 0) -> PrunedCacheLayer:
        made: PrunedCacheLayer = super().stacked(caches, slack)
        if caches[0].beside is not None:
            made.beside = caches[0].beside.fresh()
            made.beside.join([cache.beside for cache in caches])
        return made


Layer = PrunedCacheLayer | StateLayer | PassiveLayer


def new_layers(attends: Sequence[bool], states: Sequence[int | None], slack: int) -> list[Layer]:
    """One for each layer of a model, that has attention or not, and so many states or None."""
    made: list[Layer] = []
    for has, number in zip(attends, states, strict=True):
        own = None if number is None else StateLayer(number)
        made.append(PrunedCacheLayer(slack, own) if has else own or PassiveLayer())
    return made


class _Reader:
    """The model that filled a cache, as long as it lives: a copied or pickled cache does not take it along."""

    def __init__(self, model: Any = None) -> None:
        self.model = (lambda: None) if model is None else weakref.ref(model)

    def __deepcopy__(self, memo: Any) -> _Reader:
        return self

    def __reduce__(self) -> Any:
        return _Reader, ()


class PrunedCache(DynamicCache):
    """The cache that a patched model makes, or makes of a new `DynamicCache`."""

    layers: list[Layer]  # type: ignore[assignment]
    reports: tuple[Report, ...] = ()
    """Of each prefill, oldest first, with the batch's rows as they were then."""
    notes: Mapping[str, str] = MappingProxyType({})
    """Strings that were saved with it."""
    _ids: list[Tensor] | None = None
    _read = 0
    _mask: Tensor | None = None
    _reader = _Reader()

    def begin(self, layers: Sequence[Layer]) -> None:
        """Starts anew, with these layers."""
        self.layers = list(layers)
        self.reports, self.notes = (), {}
        self._ids, self._read, self._mask, self._reader = [], 0, None, _Reader()

    @classmethod
    def stacked(cls, caches: Sequence[DynamicCache], slack: int = 0) -> PrunedCache:
        """The rows of several caches that have read prompts of one length, as a batch to decode, with room for `slack`
        new tokens. Each was filled by one prefill of the model, patched or not."""
        made = cls()
        # In older transformers a cache of its own has no layers for the last ones, which use earlier ones' entries.
        layers = itertools.zip_longest(*(cache.layers for cache in caches), fillvalue=PassiveLayer())
        made.begin([_stacked([_ours(layer) for layer in rows], slack) for rows in layers])
        for layer in made.layers:
            layer.seen = made.entries.seen
        made._ids = None
        return made

    @property
    def entries(self) -> PrunedCacheLayer:
        """The first layer with keys and values."""
        return next(layer for layer in self.layers if isinstance(layer, PrunedCacheLayer))

    def restore(self, layers: Sequence[Layer], saved: SavedCache, model: Any) -> None:
        """Becomes what was saved, with these layers, which hold its entries, for the model that it belongs to."""
        self.begin(layers)
        device = None if self.entries.positions is None else self.entries.positions.device
        self.reports, self.notes = saved.reports, saved.notes
        self._ids = None if saved.token_ids is None else [saved.token_ids.to(device)]
        self._read = saved.seen
        self._mask = None if saved.attention_mask is None else saved.attention_mask.long().to(device)
        self._reader = _Reader(model)

    @property
    def token_ids(self) -> Tensor | None:
        """[B, S] int64: what was read, dropped tokens and padding included; None where the model was given
        embeddings. Append a later turn's ids to them."""
        seen, known = self.get_seq_length(), self._known()
        return known[:, :seen] if known is not None and known.shape[1] >= seen else None

    def _known(self) -> Tensor | None:
        """What was read until the last pass [B, S], cropped since or not."""
        if not self._ids:
            return None
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids, 1)]
        return self._ids[0]

    @property
    def attention_mask(self) -> Tensor | None:
        """[B, S] int64, 0 at padding, to be continued like `token_ids`; None for an empty cache."""
        positions = self.entries.positions
        if positions is None:
            return None
        seen = self.get_seq_length()
        mask = torch.ones(positions.shape[0], seen, dtype=torch.long, device=positions.device)
        if self._mask is not None:
            known = self._mask[:, :seen]
            mask[:, : known.shape[1]] = known
        return mask

    def record(self, model: Any, ids: Tensor | None, mask: Tensor | None, count: int, report: Report | None) -> None:
        """Remembers that a model has just read `count` tokens: ids [B, M], and mask [B, S] where it was given one."""
        past = self.get_seq_length() - count
        if past > self._read:  # a pass has failed midway
            self._ids = None
        elif past < self._read:  # it was cropped since
            known = self._known()
            self._ids = None if known is None else [known[:, :past]]
            self._mask = None if self._mask is None else self._mask[:, :past]
        if ids is None or self._ids is None:
            self._ids = None
        else:
            self._ids.append(ids.clone())
        self._mask = self._mask if mask is None else mask
        self._read = past + count
        if report is not None:
            self.reports += (report,)
        if self._reader.model() is not model:
            self._reader = _Reader(model)

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> None:
        """Writes the cache to a file, for `flexasl.load_cache` with the same model in any process.

        notes: strings to keep with it; those that it was loaded with, where None. The file is there whole or not at
        all. Raises `FlexASLError` where the cache is empty, its model is gone, or the folder does not exist.
        """
        model, lengths = self._reader.model(), {layer.seen for layer in self.layers}
        half_filled = len(lengths) > 1 or any(layer.unfinished for layer in self.layers)
        if half_filled or len(lengths) != 1 or 0 in lengths or model is None:
            what = "is half filled" if half_filled else "has outlived the model that filled it"
            what = "is empty" if lengths <= {0} else what
            raise FlexASLError(f"the cache {what}; save it after a prefill, while the model is there")
        mask = self.attention_mask
        assert mask is not None
        notes = self.notes if notes is None else notes
        saved = SavedCache(
            layers=tuple(_saved(layer) for layer in self.layers),
            seen=self.get_seq_length(),
            token_ids=self.token_ids,
            attention_mask=None if bool(mask.all()) else mask.bool(),
            model=fingerprint(model),
            reports=self.reports,
            notes=dict(notes) if isinstance(notes, Mapping) else notes,
        )
        write(path, saved)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:
            if not isinstance(layer, PassiveLayer):
                layer.check_crop(abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.begin(self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        mask = self.attention_mask
        super().batch_repeat_interleave(repeats)
        if mask is not None:
            rows = torch.arange(mask.shape[0], dtype=torch.int64, device=mask.device)
            self._select_rows(rows.repeat_interleave(repeats))

    def _select_rows(self, rows: Tensor) -> None:
        known = self.token_ids
        self._ids = self._ids if known is None else [known[rows.to(known.device)]]
        self._mask = None if self._mask is None else self._mask[rows.to(self._mask.device)]


def _stacked(rows: Sequence[Any], slack: int) -> Layer:
    """Several layers of ours as one."""
    if isinstance(rows[0], PrunedCacheLayer):
        return PrunedCacheLayer.stacked(rows, slack)
    made: StateLayer | PassiveLayer = rows[0].fresh()
    made.join(rows)
    made.uncroppable = max(row.uncroppable for row in rows)
    return made


def _ours(layer: Any) -> Layer:
    """A cache layer as one of ours, sharing its tensors. An unpatched model's holds the last positions, without a
    gap."""
    if isinstance(layer, Layer):
        return layer
    if isinstance(layer, DummyLayer):
        return PassiveLayer()
    beside = StateLayer.of(layer) if states_in(layer) is not None else None
    if beside is not None and not isinstance(layer, CacheLayerMixin):
        return beside
    made, (batch, _, count, _), seen = PrunedCacheLayer(0, beside), layer.keys.shape, layer.get_seq_length()
    positions = torch.arange(seen - count, seen, dtype=torch.int64, device=layer.keys.device).repeat(batch, 1)
    stored, uncroppable = (layer.keys, layer.values), seen if count < seen else 0
    made.restore(stored, positions, None, dtype=layer.keys.dtype, seen=seen, uncroppable=uncroppable)
    return made


def _saved(layer: Layer) -> SavedLayer:
    if not isinstance(layer, PrunedCacheLayer):
        return SavedLayer(states=layer.needed, uncroppable=layer.uncroppable)
    return SavedLayer(
        stored=layer.stored,
        positions=layer.positions,
        valid=layer.valid,
        uncroppable=layer.uncroppable,
        states={} if layer.beside is None else layer.beside.needed,
    )


def adopt(cache: Any, layers: Callable[[], Sequence[Layer]], slack: int) -> None:
    """Gives a user's cache layers of ours where it is new; raises `UnsupportedError` where it cannot have them."""
    if type(cache) not in (DynamicCache, PrunedCache) or cache.offloading:
        raise UnsupportedError(
            f"past_key_values is {'an offloaded' if getattr(cache, 'offloading', False) else 'a'} "
            f"{type(cache).__name__}; a patched model takes a DynamicCache, or none to make its own"
        )
    if cache.layers and all(isinstance(layer, Layer) for layer in cache.layers):
        for layer in cache.layers:
            if isinstance(layer, PrunedCacheLayer):
                layer.slack = slack
        return
    if cache.get_seq_length() > 0:
        raise UnsupportedError(
            f"past_key_values holds {cache.get_seq_length()} tokens that were read by an unpatched model; "
            "give a cache that this model returned while patched, or none"
        )
    # The user holds this very object, so it becomes what a patched model needs rather than being replaced.
    records = any(getattr(layer, "record_past", False) for layer in cache.layers)
    cache.__class__ = PrunedCache
    cache.begin(layers())
    if records:
        cache.activate_past_recording()
