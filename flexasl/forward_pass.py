"""One forward pass of a decoder: what the layers of every framework need.

Shapes: B batch, M new tokens, N tokens so far, T tokens of all prompts at the current layer, C width of hidden states.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.attention import FlexASLAttention
from flexasl.attention_spec import AttentionSpec
from flexasl.cache import SPARE, LayerCache, Retained, retain_all
from flexasl.checks import article, several
from flexasl.compiling import bare
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.layer_step import LayerStep
from flexasl.masks import FixedMask, Visibility
from flexasl.policies import Policy, choose
from flexasl.policies.contract import resolved
from flexasl.prefill import Prefill
from flexasl.report import Report
from flexasl.rows import by_token, left_padded_lengths
from flexasl.second_pass import Rerun
from flexasl.states import LayerStates

NO_ATTENTION = "layer {} ran without LayerStep.attention; call it instead of attention"


class ForwardPass:
    """State of one forward pass. `begin` makes a new one for each call of the model, so that no prompt affects the
    next.

    For each layer in turn, call `before_layer` with its input. Run the layer on what that returns, with `table` of its
    per-token inputs, and with `LayerStep.attention` instead of attention. Then call `after_layer` with its output.
    Once the model has run, call `close`. Prompts may be pruned, and layers get them as one row without padding
    [1, T, C] (`PromptPass`). Other tokens continue sequences and keep their shape [B, M, C].

    Examples:
        >>> def block(hidden, step):  # a layer: here attention alone, of one head
        ...     states = hidden[:, None]  # [B, H, M, D]
        ...     return hidden + step.attention(states, states, states)[:, 0]
        >>> attention, config = flexasl.FlexASLAttention(), ASLConfig(select_tokens=48)
        >>> hidden, mask = torch.randn(1, 100, 16), torch.ones(1, 100, dtype=torch.int64)
        >>> caches = [flexasl.LayerCache() for layer in range(6)]
        >>> forward_pass = ForwardPass.begin(caches, mask, config)
        >>> for layer in range(6):
        ...     hidden, step = forward_pass.before_layer(layer, attention, hidden)
        ...     hidden = forward_pass.after_layer(layer, step, block(hidden, step))
        >>> report = forward_pass.close()
        >>> report.rows[0].kept_tokens, hidden.shape
        (48, torch.Size([1, 100, 16]))
    """

    prefill: Prefill | None = None
    """What is decided about prompts; None where there are none."""
    rerun: Rerun | None = None
    """What policies with a second pass need; None where layers cannot run again."""
    step: LayerStep | None = None
    """That of the layer that runs, for adapters whose layers take one object all the way down to attention."""
    blank = float("nan")
    """Value of the last layer's output at dropped tokens. NaN there would make the gradients of all later weights NaN.
    To train, set it to 0 before the model runs, and call `blank_out` on the logits."""

    def __init__(
        self,
        caches: Sequence[LayerCache | LayerStates] | None,
        positions: Tensor,
        valid: Tensor | None = None,
        *,
        compiled: bool = False,
        lenders: Mapping[int, int] | None = None,
        last_seen: Tensor | None = None,
        ahead: int = 0,
        in_order: Container[int] = (),
    ) -> None:
        """positions [B, M] int64 are those of the new tokens in the padded sequence; valid [B, positions so far] bool
        is False at padding, None where there is none. compiled: layers are graphs, which share what does not differ
        between them. lenders: of layers that use the keys and values of earlier ones, which those are. last_seen [B, M]
        int64: up to which of the M new tokens each sees, at most so many `ahead`; None where no token sees later ones.
        in_order: layers where none does, though elsewhere some do."""
        self.lenders = lenders or {}
        self._lent: dict[int, LayerStep] = {}
        self.caches = caches
        self.positions = positions
        self._valid = valid
        self._compiled = compiled
        self._past = 0 if not caches else caches[0].seen
        self._tokens = positions.shape[1]
        self._new_valid = None if valid is None else valid.gather(1, positions)
        self._in_order = in_order
        self._further: dict[str, Any] = {}
        if last_seen is not None:
            self._further = {"last_seen": last_seen + self._past, "ahead": ahead}
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._masks: dict[tuple[int, bool, bool], Visibility] = {}
        self._old: Retained = []
        """What caches are to keep, of whose older entries the host does not know how many there are."""

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
        """The pass over the tokens that come after those in the caches: over prompts where the caches are empty, else
        over a later turn.

        Args:
            caches: A `LayerCache` for each layer.
            attention_mask: [B, N], 1 at all tokens of the sequences so far, the new ones at its end, and 0 at padding,
                which is on the left.
            config: The settings. None: `ASLConfig()`.
            policy: A policy's name, alone or with settings, or an instance.
            ranking_layers: Layers that attend to the whole prompt, ascending. None: all.
            compiled: Whether layers run as compiled graphs. Their inputs then look the same for all lengths.

        Raises:
            FlexASLError: The arguments do not belong together.
            UnsupportedError: The caches were left half filled by a pass that failed, or have another number of rows.
            ConfigError: The settings do not fit the policy or the number of layers.
        """
        from flexasl.prompt_pass import PromptPass

        caches = several("caches", caches, LayerCache, "a LayerCache for each layer")
        if len({id(cache) for cache in caches}) < len(caches) or not caches:
            what = "holds one for several layers" if caches else "is empty"
            raise FlexASLError(f"caches {what}; give a LayerCache for each layer")
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            given = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else article(attention_mask)
            raise FlexASLError(f"attention_mask is {given}; give a tensor [rows, all tokens so far]")
        if ranking_layers is not None:
            ranking_layers = several("ranking_layers", ranking_layers, int, "layers that attend to the whole prompt")
            if not ranking_layers or ranking_layers != [at for at in range(len(caches)) if at in ranking_layers]:
                raise FlexASLError(f"ranking_layers={ranking_layers}; give some of 0 to {len(caches) - 1}, ascending")
        (batch, tokens), device = attention_mask.shape, attention_mask.device
        past = positions_read(caches, batch)
        if batch == 0 or tokens <= past:
            raise FlexASLError(
                f"attention_mask is {[batch, tokens]} where the caches have read {past} tokens; give "
                "[rows, all tokens so far], new ones included"
            )
        valid = None if bool(attention_mask.all()) else attention_mask.bool()
        positions = torch.arange(past, tokens, dtype=torch.int64, device=device).expand(batch, -1)
        chosen, settings = choose(policy, config)
        rule = resolved(chosen, settings, len(caches), ranking_layers)
        if not is_prompt(rule, past, tokens - past):
            return ForwardPass(caches, positions, valid, compiled=compiled)
        lengths = left_padded_lengths(attention_mask[:, past:])
        where: dict[str, Any] = {"tokens": tokens - past, "device": device, "ranking_layers": ranking_layers}
        prefill = Prefill(chosen, rule, len(caches), lengths, **where)
        return PromptPass(caches, prefill, positions, valid if past > 0 else None, compiled=compiled)

    def before_layer(self, layer: int, attention: FlexASLAttention | None, hidden: Tensor) -> tuple[Tensor, LayerStep]:
        """The layer's input and what its attention needs.

        Args:
            layer: Index of the layer, from 0.
            attention: The layer's attention. None: the layer has none.
            hidden: The model's own states [B, M, C] before the first layer, then what `after_layer` returned.

        Returns:
            The layer's input, [1, T, C] for prompts and [B, M, C] for other tokens, and its `LayerStep`.
        """
        if layer == 0:
            self._check_tokens(hidden)
        if attention is None:
            return hidden, LayerStep(None)
        lender = self._lender(layer)
        if lender is not None:
            return hidden, LayerStep(attention, visible=lender.visible, lender=lender)
        step = self._lending(layer, self._step(layer, attention))
        step.past = self._past
        return hidden, step

    def table(self, states: Tensor) -> Tensor:
        """A per-token tensor, such as a rotary table, for the tokens of the current layer. It is made once per
        selection.

        Args:
            states: [B or 1, M, ...], or [B or 1, 1, M, ...] with a dimension for heads.

        Returns:
            [1, T, ...] for prompts, [B, M, ...] for other tokens, with that dimension where it had one.
        """
        for known, made in self._tables:
            if known is states:
                return made
        made = by_token(states, self._for_tokens)
        if self._compiled:
            made = bare(made.contiguous())
        self._tables.append((states, made))
        return made

    def after_layer(self, layer: int, step: LayerStep, hidden: Tensor) -> Tensor:
        """The layer's output as the next layer takes it.

        After a selection it has fewer tokens. Of the last layer it is [B, M, C], as the model's own, with 0 at padding
        and `blank` (NaN) at dropped tokens, which have no output.

        Args:
            layer: Index of the layer, from 0.
            step: What `before_layer` returned for it.
            hidden: The layer's output.

        Raises:
            FlexASLError: The layer did not call `LayerStep.attention`.
        """
        assert self.caches is not None
        cache = self.caches[layer]
        if isinstance(cache, LayerStates):
            cache.passed(self._tokens)
            self.caches[0].unfinished = True
            return hidden
        assert step.module is not None
        window = step.module.sliding_window
        if step.keys is None or step.values is None:
            raise FlexASLError(NO_ATTENTION.format(layer))
        if step.room:
            cache.commit(step.keys, step.values, self._tokens)
        else:
            cache.take(step.keys, step.values)
        self.caches[0].unfinished = True
        if window is not None and self._tokens > 1:  # after a single token it waits until storage must grow
            cache.forget(window, min(SPARE, window // 2), self._old)
        return hidden

    def blank_out(self, states: Tensor, positions: slice | Tensor = slice(None)) -> None:
        """Writes NaN at dropped tokens, in place, into what was made of the last layer's output.

        Args:
            states: [B, positions, ...], such as logits.
            positions: The positions that `states` has, where these are not all.
        """

    def close(self) -> Report | None:
        """Ends the pass, after the model has run and outside any graph.

        Returns:
            The report of prompts; None where there were none.
        """
        self.forget_old()
        if self.caches:
            self.caches[0].unfinished = False
        return None

    def forget_old(self) -> None:
        """Drops the entries that no later token can see through a sliding window from caches that still hold them."""
        old, self._old = self._old, []
        retain_all(old)

    def _lender(self, layer: int) -> LayerStep | None:
        """The step whose keys and values this layer uses; None where it has its own."""
        return self._lent[self.lenders[layer]] if layer in self.lenders else None

    def _lending(self, layer: int, step: LayerStep) -> LayerStep:
        """The step of a layer, which is kept where later ones use its keys and values."""
        if layer in self.lenders.values():
            step.lends = True
            self._lent[layer] = step
        return step

    def _check_tokens(self, hidden: Tensor) -> None:
        if self.positions.shape not in (hidden.shape[-3:-1], hidden.shape[:2]):  # streams may come first or last
            raise UnsupportedError(
                f"hidden states are {list(hidden.shape)} where {list(self.positions.shape)} tokens came in; a hook on "
                "a patched model must leave their number as it is"
            )

    def _for_tokens(self, states: Tensor) -> Tensor:
        return states.expand(self.positions.shape[0], *states.shape[1:])

    def _step(self, layer: int, attention: FlexASLAttention) -> LayerStep:
        """That of new tokens over a cache."""
        assert self.caches is not None
        window, cache = attention.sliding_window, self.caches[layer]
        assert isinstance(cache, LayerCache)
        if self._tokens == 1 and self._valid is None and not attention.spec.needs_positions(cache.seen + 1):
            held = cache.tight
            if held is not None:  # the new token sees all of it, and joining tensors is all there is to do
                return LayerStep(attention, keys=held[0], values=held[1], room=False)
        cut = self._compiled and self._tokens == 1 and attention.kernel != "flex" and attention.spec.alibi is None
        keys, values = cache.extend(self.positions, self._new_valid, self._tokens, window, whole=cut)
        count = min(window, keys.shape[2]) if cut and window is not None else keys.shape[2]
        further = {} if layer in self._in_order else self._further
        visible = self._visible(cache, count, attention.spec, further)
        if not cut:
            if self._compiled and visible is not None:
                attention.prepare(visible, self.positions)
            return LayerStep(attention, visible=visible, keys=keys, values=values)
        # The same to a graph whatever lengths, sliding window and mask.
        if visible is not None:
            mask = visible.whole_mask(attention.spec)
            visible = FixedMask(bare(mask.expand(-1, keys.shape[1], -1, -1).contiguous()))
        reach = None if window is None else count
        return LayerStep(attention, visible=visible, keys=bare(keys), values=bare(values), cut=True, reach=reach)

    def _visible(
        self, cache: LayerCache, count: int, spec: AttentionSpec, further: dict[str, Any]
    ) -> Visibility | None:
        """Who sees whom among the last `count` entries of a cache that has room for the new ones; None where one new
        token sees them all."""
        if cache.is_aligned(count) and (self._valid is not None or not cache.is_padded):
            sees_all = (
                self._tokens == 1
                and self._valid is None
                and not (spec.chunked and spec.needs_positions(cache.seen + 1))
            )
            return None if sees_all else self._aligned(cache, count, spec, further)
        positions, valid = cache.marks(count)
        valid = still_valid(self._valid, positions, valid)
        if self._tokens == 1 and valid is None and not spec.needs_positions(cache.seen + self._tokens):
            return None
        return Visibility(self._counted(spec, self.positions), self._counted(spec, positions), valid, **further)

    @functools.cached_property
    def _firsts(self) -> Tensor | None:
        """[B] int64: the position of each row's first token; None where all rows begin at 0."""
        return self._row_beginnings()

    def _row_beginnings(self) -> Tensor | None:
        return None if self._valid is None else self._valid.to(torch.uint8).argmax(1)

    def _counted(self, spec: AttentionSpec, positions: Tensor) -> Tensor:
        """Positions [B, N] or [B, G, N] as attention counts them."""
        if not spec.counts_from_start or self._firsts is None:
            return positions
        return positions - self._firsts.view(-1, *[1] * (positions.dim() - 1))

    def _aligned(self, cache: LayerCache, count: int, spec: AttentionSpec, further: dict[str, Any]) -> Visibility:
        """Who sees whom where the entries are those of the last `count` positions: the same for all such layers."""
        key = count, spec.counts_from_start, bool(further)
        made = self._masks.get(key)
        if made is None:
            stop = self._past + self._tokens
            at = torch.arange(stop - count, stop, dtype=torch.int64, device=self.positions.device)
            at = at.expand(self.positions.shape[0], -1)
            valid = None if self._valid is None else self._valid[:, stop - count :]
            known = cache.marks(count)[1]
            if valid is not None and known is not None:
                valid = valid & (known if known.dim() == 2 else known[:, 0])
            made = self._masks[key] = Visibility(
                self._counted(spec, self.positions), self._counted(spec, at), valid, **further
            )
        return made


def positions_read(caches: Sequence[LayerCache | LayerStates], batch: int) -> int:
    """Positions that the caches have read; raises `UnsupportedError` where they cannot continue with so many rows."""
    seen, rows = caches[0].seen, next((cache.rows for cache in caches if cache.rows is not None), None)
    if caches[0].unfinished or any(cache.seen != seen for cache in caches):
        raise UnsupportedError("KV caches are half filled by a pass that failed; reset them, or give new ones")
    if rows is not None and rows != batch:
        raise UnsupportedError(f"the batch has {batch} rows where KV caches hold {rows}; give as many, or new caches")
    return seen


def is_prompt(config: ASLConfig, past: int, count: int) -> bool:
    """Whether so many new tokens after so many positions are read as a prompt, which may be pruned."""
    return past == 0 or (count > 1 and config.later_turns == "prune")


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
