"""Layers of transformers models that keep states in place of keys and values, or beside them.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from flexasl.errors import FlexASLError
from flexasl.layer_step import LayerStep
from flexasl.states import LayerStates

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers before 5.20 or so, where layers without a cache get one with states

    class DummyLayer:  # type: ignore[no-redef]
        """A layer that remembers nothing."""


class StateLayer(LayerStates, LinearAttentionLayer):
    """A layer of a `DynamicCache` with states, of so many kinds of each sort."""

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        LayerStates.__init__(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the values alone, without an autograd graph."""
        sorts = {"conv_states": self.conv_states, "recurrent_states": self.recurrent_states}
        alone = {
            sort: {at: None if states is None else states.detach() for at, states in own.items()}
            for sort, own in sorts.items()
        }
        return vars(self) | alone

    @property
    def states(self) -> Mapping[str, Tensor]:
        sorts = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        named = {f"{sort}.{index}": own[index] for sort, own in sorts.items() for index in range(self.number_of_states)}
        return {name: states for name, states in named.items() if states is not None}

    @property
    def needed(self) -> dict[str, Tensor]:
        widths = {f"conv.{index}": width for index, width in self.conv_kernel_size.items()}
        return {name: own[..., -width:] if (width := widths.get(name)) else own for name, own in self.states.items()}

    def hold(self, states: Mapping[str, Tensor]) -> None:
        for name, made in states.items():
            sort, _, index = name.partition(".")
            at = int(index)
            if sort == "conv":
                self.conv_states[at], self.is_conv_states_initialized[at] = made, True
                # With what is recorded, states are longer than the kernel.
                if self.conv_kernel_size[at] is None:
                    self.conv_kernel_size[at] = made.shape[-1]
            else:
                self.recurrent_states[at], self.is_recurrent_states_initialized[at] = made, True
            self.has_previous_state[at] = True
            self.dtype, self.device = made.dtype, made.device  # type: ignore[assignment]

    @classmethod
    def of(cls, layer: Any) -> Self:
        """An unpatched model's states, sharing its tensors."""
        made = cls(layer.number_of_states)
        made.conv_kernel_size = dict(layer.conv_kernel_size)
        sorts = (("conv", layer.conv_states), ("recurrent", layer.recurrent_states))
        named = {f"{sort}.{index}": states for sort, own in sorts for index, states in own.items()}
        made.hold({name: states for name, states in named.items() if states is not None})
        return made

    def fresh(self) -> Self:
        made = type(self)(self.number_of_states)
        made.record_past = self.record_past
        made.conv_kernel_size = dict(self.conv_kernel_size)
        return made

    def join(self, rows: Sequence[LayerStates]) -> None:
        self.conv_kernel_size = dict(rows[0].conv_kernel_size)  # type: ignore[attr-defined]
        super().join(rows)

    def clear(self) -> None:
        records = self.record_past
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
        self.record_past = records
        super().clear()

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        count = abs(tokens_to_remove)
        self.check_crop(count)
        if self.record_past and self.states:
            super().crop(-count)
        if self.seen <= count:
            self.clear()
        else:
            self.seen -= count

    def check_crop(self, count: int) -> None:
        """Raises `FlexASLError` where states cannot go back by so many tokens."""
        if count == 0 or count >= self.seen:
            return
        if not self.record_past or any(self.is_recurrent_states_initialized.values()):
            raise FlexASLError(
                f"crop by {count} tokens is not possible: layers of this model keep states, which cannot go back; "
                "read the prompt again, or copy the cache before the tokens are read"
            )
        if self.seen - count < self.uncroppable:
            raise FlexASLError(
                f"crop by {count} tokens would need states of a pruned prompt; crop at most "
                f"{self.seen - self.uncroppable}"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)


class PassiveLayer(LayerStates, DummyLayer):
    """A layer of a `DynamicCache` that remembers nothing."""

    def __init__(self) -> None:
        DummyLayer.__init__(self)
        LayerStates.__init__(self)

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        self.seen = max(0, self.seen - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to do, as for all that changes rows."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing to do."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to do."""


class RunningCache(Cache):
    """The cache as a layer sees it that runs with states: those are its own, keys and values are the step's."""

    def __init__(self, step: LayerStep | None, states: StateLayer) -> None:
        self.layers = _Everywhere(states)  # type: ignore[assignment]
        self._step = step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self._step is not None
        return self._step.update(key_states, value_states)


class _Everywhere(Sequence[StateLayer]):
    """The same layer at every index, since a layer asks for its own."""

    def __init__(self, states: StateLayer) -> None:
        self._states = states

    def __len__(self) -> int:
        return 2**12  # more than any model has, and few enough for a cache that looks through all of them

    def __getitem__(self, index: Any) -> Any:
        return self._states

    def __iter__(self) -> Iterator[StateLayer]:
        yield self._states


def states_in(layer: Any) -> int | None:
    """How many kinds of states a layer of a new `DynamicCache` keeps; None where it keeps none."""
    return layer.number_of_states if isinstance(layer, LinearAttentionCacheLayerMixin) else None
