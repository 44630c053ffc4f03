"""One forward pass of a decoder: what the layers of every framework need.

Shapes: B batch, M new tokens, N tokens so far, T tokens of all prompts at the current layer, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.config import ASLConfig
from flexasl.layer_step import LayerStep
from flexasl.policies import Policy, choose
from flexasl.policies.contract import resolved
from flexasl.prefill import Prefill
from flexasl.report import Report
from flexasl.rows import left_padded_lengths
from flexasl.second_pass import Rerun


class ForwardPass:
    """State of one forward pass, made anew for each, so that no prompt leaves a trace on the next. `begin` makes it.

    For each layer in turn call `before_layer` with its input; run the layer on what that returns, with `table` of its
    per-token inputs, and with `LayerStep.attention` in the place of attention; then call `after_layer` with its output.
    Once the model has run, call `close`. Prompts may be pruned, and layers see them as one row without padding
    [1, T, C] (`PromptPass`); other tokens continue sequences and keep their shape [B, M, C] (`TokenPass`).

    >>> forward_pass = ForwardPass.begin(caches, attention_mask, ASLConfig(select_tokens=1024))
    >>> for index, block in enumerate(blocks):
    ...     hidden, step = forward_pass.before_layer(index, block.attention, hidden)
    ...     hidden = block(hidden, forward_pass.table(cos), forward_pass.table(sin), step)
    ...     hidden = forward_pass.after_layer(index, step, hidden)
    >>> report = forward_pass.close()
    """

    prefill: Prefill | None = None
    """What is decided about prompts; None where there are none."""
    rerun: Rerun | None = None
    """What policies with a second pass need; None where layers cannot run again."""
    step: LayerStep | None = None
    """That of the layer that runs, for adapters whose layers take one object all the way down to attention."""
    blank = float("nan")
    """What stands at dropped tokens in the end. NaN there becomes the gradients of all weights after the last layer; to
    train, set 0, and call `blank_out` on what these weights make of it."""

    def __init__(self, caches: Sequence[LayerCache] | None, positions: Tensor, *, compiled: bool = False) -> None:
        """positions [B, M] int64 are those of the new tokens in the padded sequence. compiled: layers are graphs, which
        share what does not differ between them."""
        self.caches = caches
        self.positions = positions
        self._compiled = compiled
        self._past = 0 if not caches else caches[0].seen
        self._tokens = positions.shape[1]
        self._tables: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def begin(
        cls,
        caches: Sequence[LayerCache],
        attention_mask: Tensor,
        config: ASLConfig | None = None,
        policy: str | Policy = "asl",
        *,
        ranking_layers: Sequence[int] | None = None,
        compiled: bool = False,
    ) -> ForwardPass:
        """The pass over new tokens after those that the caches, one a layer, hold: of prompts, padded on the left,
        where they hold none. attention_mask [B, N] is 1 at all tokens of the sequences so far, the new ones at its
        end, and 0 at padding. ranking_layers: those that see the whole prompt (default: all)."""
        from flexasl.prompt_pass import PromptPass
        from flexasl.token_pass import TokenPass

        past, (batch, tokens) = caches[0].seen, attention_mask.shape
        device = attention_mask.device
        positions = torch.arange(past, tokens, dtype=torch.int64, device=device).expand(batch, -1)
        if past > 0:
            valid = attention_mask.bool()
            return TokenPass(caches, positions, None if bool(valid.all()) else valid, compiled=compiled)
        chosen, settings = choose(policy, config)
        rule = resolved(chosen, settings, len(caches), ranking_layers)
        lengths = left_padded_lengths(attention_mask)
        prefill = Prefill(
            chosen, rule, len(caches), lengths, tokens=tokens, device=device, ranking_layers=ranking_layers
        )
        return PromptPass(caches, prefill, positions, compiled=compiled)

    def before_layer(self, layer: int, attention: FlexASLAttention, hidden: Tensor) -> tuple[Tensor, LayerStep]:
        """The layer's input, made of the model's own [B, M, C] or of what `after_layer` gave, and what its attention
        needs."""
        raise NotImplementedError

    def table(self, states: Tensor) -> Tensor:
        """A per-token tensor [B or 1, M, ...], such as a rotary table, for the current layer's tokens."""
        raise NotImplementedError

    def after_layer(self, layer: int, step: LayerStep, hidden: Tensor) -> Tensor:
        """The layer's output as the next layer takes it; of the last layer [B, M, C] as the model's own, with 0 at
        padding and `blank` (NaN) at tokens that were dropped, which have none."""
        raise NotImplementedError

    def blank_out(self, states: Tensor, positions: slice | Tensor = slice(None)) -> None:
        """Writes NaN, at tokens that were dropped, into what was made of the last layer's output, or of some positions
        of it: [B, positions, ...]."""

    def close(self) -> Report | None:
        """After the model has run, outside any graph. Returns what was decided about prompts and saved; None where
        there were none."""
        if self.caches:
            self.caches[0].unfinished = False
        return None


def look_up(valid: Tensor, positions: Tensor) -> Tensor:
    """Marks [B, N] at positions [B, E] or [B, G, E]."""
    if positions.dim() == 3:
        valid = valid[:, None].expand(-1, positions.shape[1], -1)
    return valid.gather(-1, positions)


def still_valid(valid: Tensor | None, positions: Tensor, entries: Tensor | None) -> Tensor | None:
    """Which entries at these positions are valid, by marks [B, N] of all positions and the entries' own; None for
    all."""
    if valid is None:
        return entries
    current = look_up(valid, positions)
    return current if entries is None else entries & current
