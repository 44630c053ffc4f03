"""Attention of vLLM's own over rows that we choose: metadata by the backend's own builder, and where new entries go.

A request's entries stand at the front of its blocks, whatever positions they have. Kernels know no positions, and keys
are rotated before they are stored.

Shapes: R requests, T rows, S places of the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.v1.attention.backend import subclass_attention_backend

MADE_FROM = "flexasl_made_from"
"""Attribute of metadata: the builder that made them, and of what."""


@functools.cache
def remembering(backend: Any) -> Any:
    """A subclass of an attention backend whose metadata remember what they are made of."""
    plain = backend.get_builder_cls()

    class Builder(plain):  # type: ignore[misc, valid-type]
        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            made = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            setattr(made, MADE_FROM, (self, common_attn_metadata))
            return made

    Builder.__name__, Builder.__qualname__ = plain.__name__, plain.__qualname__
    return subclass_attention_backend("FlexASL", backend, Builder)


class Blocks:
    """Where a step's requests have their entries."""

    def __init__(self, metadata: Any) -> None:
        self.builder, self.common = getattr(metadata, MADE_FROM)
        self.block_size: int = self.builder.kv_cache_spec.block_size
        self.device: torch.device = self.common.seq_lens.device

    def slots(self, of: Tensor, places: Tensor) -> Tensor:
        """Slots [T] int64 of the entries at places [T] of the requests of [T], which count in the step's order."""
        blocks = self.common.block_table_tensor[of, places // self.block_size]
        return blocks.long() * self.block_size + places % self.block_size


class Sequences:
    """Some requests of a step, each with some rows at its end that attend by vLLM's own means."""

    def __init__(self, blocks: Blocks, requests: Sequence[int], counts: Sequence[int], totals: Sequence[int]) -> None:
        """requests: which of the step's; counts: rows of each; totals: tokens of each, these included."""
        self._blocks = blocks
        self._counts = torch.tensor(counts, dtype=torch.int32, device="cpu")
        self._totals = torch.tensor(totals, dtype=torch.int32, device="cpu")
        self._starts = F.pad(self._counts.cumsum(0), (1, 0)).int()
        device = blocks.device
        self._requests = torch.tensor(requests, dtype=torch.int64, device=device)
        own = torch.arange(len(counts), dtype=torch.int64, device="cpu").repeat_interleave(self._counts)
        self._back = (torch.arange(len(own), dtype=torch.int64, device="cpu") - self._starts[own + 1]).to(device)
        """[T]: of each row, how far it is from its request's end, from -1 downwards."""
        self._own = own.to(device)
        self._made: dict[tuple[int, ...], tuple[Any, Tensor]] = {}
        self.total = len(own)

    def at(self, dropped: Sequence[int]) -> tuple[Any, Tensor]:
        """Metadata for a layer whose cache holds so many entries fewer than each request has tokens, and the slots [T]
        int64 of the rows' own entries."""
        key = tuple(dropped)
        if key not in self._made:
            self._made[key] = self._make(key)
        return self._made[key]

    def _make(self, dropped: tuple[int, ...]) -> tuple[Any, Tensor]:
        blocks, device = self._blocks, self._blocks.device
        lengths = self._totals - torch.tensor(dropped, dtype=torch.int32, device="cpu")
        on_device = lengths.to(device)
        places = on_device.long()[self._own] + self._back
        slots = blocks.slots(self._requests[self._own], places)
        common = blocks.common
        prefilling = common.is_prefilling
        made = common.replace(
            query_start_loc=self._starts.to(device),
            query_start_loc_cpu=self._starts,
            seq_lens=on_device,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(lengths),
            num_actual_tokens=self.total,
            max_query_len=int(self._counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[self._requests],
            slot_mapping=slots,
            positions=None,
            is_prefilling=None if prefilling is None else prefilling[self._requests.to(prefilling.device)],
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return blocks.builder.build(0, made), slots
