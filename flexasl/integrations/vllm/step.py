"""One step of vLLM in which prompts are pruned: their rows run first in each layer, all others behind them.

Shapes: T rows of prompts at the current layer, O others, R requests that these are of, H query heads, G KV heads,
D head dim.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention
from flexasl.integrations.questions import Found
from flexasl.integrations.vllm.requests import Request
from flexasl.integrations.vllm.sequences import Blocks, Sequences
from flexasl.kept_entries import Entries
from flexasl.ops import compact_kv
from flexasl.prefill import Prefill, Reduce
from flexasl.prompt_pass import row_reports
from flexasl.report import Report, RowReport
from flexasl.rows_attention import attend


@dataclasses.dataclass
class Group:
    """Prompts of a step that have the same method."""

    requests: list[Request]
    at: list[int]
    """Which of the step's requests these are."""
    prefill: Prefill

    @classmethod
    def of(
        cls, requests: list[Request], at: list[int], *, tokenizer: Any, reduce: Reduce | None, device: torch.device
    ) -> Group:
        """requests have one method; at: which of the step's these are."""
        method = requests[0].method
        lengths = [request.tokens for request in requests]
        asked, most = [request.asked(tokenizer) for request in requests], max(lengths)
        how: dict[str, Any] = {"reduce": reduce, "device": device}
        if any(one != Found() for one in asked):
            # Positions count in a batch that is padded on the left.
            found = [None if one.positions is None else one.positions[0] for one in asked]
            how["question"] = [None if one is None else (one + most - n).to(device) for one, n in zip(found, lengths)]
            how["question_texts"] = [None if one.texts is None else one.texts[0] for one in asked]
        return cls(requests, at, Prefill(method.policy, method.config, method.num_layers, lengths, **how))


class Step:
    """From layer to layer: which rows are left, how they attend, and what their requests' caches hold."""

    def __init__(
        self,
        groups: Sequence[Group],
        sequences: Sequences | None,
        others: Tensor,
        rows: Tensor,
        blocks: Blocks,
        dropped: Tensor,
        tables: tuple[dict[str, Any], dict[str, Tensor]],
    ) -> None:
        """sequences: rows that vLLM attends to, None where there are none; others [R] int64: the places of those whose
        they are in dropped, `Requests.dropped`. rows [T + O] int64: which of the scheduled rows run, prompts first.
        tables: metadata and slots by layer, as the forward context has them."""
        self.groups = groups
        self._sequences = sequences
        self._others = others
        self.rows = rows
        self._blocks = blocks
        self._dropped = dropped
        self._metadata, self._slots = tables
        self.scheduled = 0
        """Rows that the first layer was given, with those that only fill a graph."""
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._started = time.perf_counter()

    @property
    def prompt_rows(self) -> int:
        """T."""
        return sum(group.prefill.rows.total for group in self.groups)

    def table(self, states: Tensor, dim: int) -> Tensor:
        """A tensor of all scheduled rows at the current ones; made once."""
        for known, made in self._tables:
            if known is states:
                return made
        made = states.index_select(dim, self.rows)
        self._tables.append((states, made))
        return made

    def attend(
        self,
        layer: int,
        attention: Any,
        module: FlexASLAttention,
        forward: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """A layer's attention: query [T + O, H D], key and value [T + O, G D] → [T + O, H D]. The prompts' entries are
        stored before the other rows attend, some of which may stand behind them."""
        shapes = ((attention.num_heads, query), (attention.num_kv_heads, key), (attention.num_kv_heads, value))
        heads = [states.view(len(states), count, -1) for count, states in shapes]
        made = []
        for group, own in self._spans():
            parts = [states[own].transpose(0, 1)[None] for states in heads]
            made.append(self._read(layer, group, attention, module, *parts))
        count = self.prompt_rows
        if self._sequences is not None:
            metadata, slots = self._sequences.at(self._dropped[self._others, layer].tolist())
            self._metadata[attention.layer_name], self._slots[attention.layer_name] = metadata, slots
            made.append(forward(query[count:], key[count:], value[count:]).view(len(query) - count, -1))
        return torch.cat(made)

    def advance(self) -> Tensor | None:
        """After a layer: which of its rows pass to the next one, or None where all do."""
        going, first, fewer = [], 0, False
        for group in self.groups:
            count = group.prefill.rows.total
            tokens = group.prefill.advance()
            fewer |= tokens is not None
            going.append(self._range(first, first + count) if tokens is None else tokens + first)
            first += count
        if not fewer:
            return None
        keep = torch.cat([*going, self._range(first, len(self.rows))])
        self.rows = self.rows[keep]
        self._tables.clear()
        return keep

    def close(self, entry_bytes: int) -> Iterator[tuple[Request, Report]]:
        """After the last layer: what was decided for each prompt, of whose cache an entry of a layer has so many
        bytes."""
        seconds = time.perf_counter() - self._started
        for group in self.groups:
            group.prefill.close()
            for request, row in zip(group.requests, row_reports(group.prefill)):
                kept = (request.tokens - self._dropped[request.place]).tolist()
                yield request, report_of(request, row, kept, seconds, entry_bytes)

    def _spans(self) -> Iterator[tuple[Group, slice]]:
        first = 0
        for group in self.groups:
            yield group, slice(first, first + group.prefill.rows.total)
            first += group.prefill.rows.total

    def _read(
        self,
        layer: int,
        group: Group,
        attention: Any,
        module: FlexASLAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Attention of prompts [1, H, T, D] over themselves → [T, H D]; what their cache keeps is stored."""
        prefill = group.prefill
        rows, window = prefill.rows, prefill.config.window
        out = attend(rows, module, query, key, value)
        scored = query.index_select(2, rows.queries(window)) if prefill.needs(layer) else None
        entries = prefill.observe(layer, scored, key, module)
        self._store(layer, group, attention, key, value, entries)
        return out[0].transpose(0, 1).reshape(rows.total, -1)

    def _store(
        self, layer: int, group: Group, attention: Any, key: Tensor, value: Tensor, entries: Entries | None
    ) -> None:
        """Writes keys and values [1, G, T, D] of what is kept to the front of the requests' blocks: of each KV head its
        own entries, all at the same slots."""
        counts = list(group.prefill.rows.lengths)
        if entries is None:
            keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        else:
            tokens = entries[0]
            limits = group.prefill.limits[layer]
            counts = [count if most is None else min(most, count) for count, most in zip(counts, limits)]
            parts = [states.transpose(1, 2) for states in compact_kv(key, value, tokens)]
            keys, values = (torch.cat([row[len(row) - n :] for row, n in zip(part, counts)]) for part in parts)
        device = key.device
        each = torch.tensor(counts, dtype=torch.int64, device="cpu")
        of = torch.tensor(group.at, dtype=torch.int64, device="cpu").repeat_interleave(each)
        places = torch.cat([torch.arange(count, dtype=torch.int64, device="cpu") for count in counts])
        slots = self._blocks.slots(of.to(device), places.to(device))
        attention.impl.do_kv_cache_update(attention, keys.contiguous(), values.contiguous(), attention.kv_cache, slots)
        for request, count in zip(group.requests, counts):
            self._dropped[request.place, layer] = request.tokens - count

    def _range(self, first: int, stop: int) -> Tensor:
        return torch.arange(first, stop, dtype=torch.int64, device=self.rows.device)


def report_of(request: Request, row: RowReport, kept: Sequence[int], seconds: float, entry_bytes: int) -> Report:
    """The report of one request's prompt, of which each layer's cache has so many entries."""
    method = request.method
    made = Report(
        policy=method.policy.name,
        config=method.config.to_dict(),
        num_layers=method.num_layers,
        rows=(row,),
        kv_tokens=tuple(kept),
        kv_bytes=sum(kept) * entry_bytes,
        kv_bytes_full=len(kept) * request.tokens * entry_bytes,
        prefill_seconds=seconds,
    )
    return dataclasses.replace(made, profile=method.profile)
