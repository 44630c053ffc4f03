"""Selected tokens that are read again, alone, from the first layer on: what policies with `second_pass` need.

Shapes: T tokens of all rows at the current layer, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexasl.cache import Retained, retain_all
from flexasl.errors import UnsupportedError
from flexasl.prefill import Prefill
from flexasl.rows import Rows

if TYPE_CHECKING:
    from flexasl.forward_pass import ForwardPass
    from flexasl.prompt_pass import PromptPass

Rerun = Callable[["ForwardPass", int], Tensor]
"""Runs the model's layers, from the first to this one, on what they were given before, under another forward pass;
returns the last output [1, T, C]."""


class RecordedLayers:
    """A `Rerun` over what layers were given in the first pass; they take the forward pass by the keyword `name`, and
    whole makes of what they give hidden states [1, T, C]."""

    def __init__(self, layers: Sequence[Any], name: str, whole: Callable[[Any], Tensor]) -> None:
        self._layers = layers
        self._name = name
        self._whole = whole
        self._hidden: Any = None
        self._keywords: list[dict[str, Any]] = []

    def record(self, layer: int, hidden: Any, kwargs: dict[str, Any]) -> None:
        """Notes what a layer is given, in order."""
        if layer == 0:
            self._hidden = hidden
        self._keywords.append(dict(kwargs))

    def __call__(self, forward_pass: ForwardPass, last: int) -> Tensor:
        hidden = self._hidden
        for layer, kwargs in zip(self._layers[: last + 1], self._keywords):
            output = layer(hidden, **(kwargs | {self._name: forward_pass}))
            hidden = output[0] if isinstance(output, tuple) else output
        return self._whole(hidden)


def refuse_second_pass(prefill: Prefill, rerun: Rerun | None) -> None:
    """Raises `UnsupportedError` where the policy needs a second pass that the adapter cannot make."""
    if prefill.policy.second_pass and rerun is None:
        raise UnsupportedError(
            f"policy {prefill.policy.name!r} reads tokens twice, which this model's adapter cannot do; "
            "give a policy of one pass, such as 'asl'"
        )


def read_again(first: PromptPass, layer: int, rows: list[int], hidden: Tensor, rerun: Rerun) -> Tensor:
    """The layer's output [1, T, C] where these rows, which have just selected, have read their tokens as if they were
    the prompt. Caches up to this layer forget what was read of these rows before."""
    prefill, caches = first.prefill, None
    again = _prefill_of(prefill, rows)
    if first.caches is not None:
        caches = [cache.fresh() for cache in first.caches[: layer + 1]]
    second = first.again(caches, again)
    states = rerun(second, layer)
    for one in (first, second):
        one.forget_old()
    left: Retained = []
    for mine, own in zip(first.caches or (), caches or ()):
        mine.replace_rows(rows, own, left)  # type: ignore[arg-type]  # of one kind
    retain_all(left)
    prefill.reread[layer] = rows
    parts, new = list(hidden[0].split(prefill.rows.lengths)), states[0].split(again.rows.lengths)
    for row, part in zip(rows, new, strict=True):
        parts[row] = part
    return torch.cat(parts)[None]


def _prefill_of(prefill: Prefill, rows: list[int]) -> Prefill:
    """The prefill of these rows' selected tokens, alone."""
    own = [prefill.rows.positions[prefill.rows.of(row)] for row in rows]
    selected = Rows(list(map(len, own)), torch.cat(own), contiguous=False, batch_rows=rows)
    if prefill.rows.last_seen is not None:
        further = [prefill.rows.last_seen[prefill.rows.of(row)] for row in rows]
        selected.seeing(torch.cat(further), prefill.rows.ahead)
    prompts = [prefill.lengths[row] for row in rows]
    question = None if prefill.questions is None else [prefill.questions.given[row] for row in rows]
    return Prefill(
        prefill.policy,
        prefill.config,
        prefill.num_layers,
        prompts,
        tokens=prefill.tokens,
        device=prefill.device,
        rows=selected,
        question=question,
    )
