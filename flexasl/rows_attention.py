"""Attention and scores of varlen rows.

Shapes: as in `flexasl.rows`; H query heads, G KV heads, D head dim, W window, N = E + M keys of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.attention import FlexASLAttention, Scoring
from flexasl.attention_spec import AttentionSpec
from flexasl.kernels import attention_gradients, can_varlen, choose_for_rows, flex, varlen_attention
from flexasl.rows import EqualRows, Rows


class Scored(NamedTuple):
    """What scores are made of: a layer's queries and keys, after rotary, of rows of one length."""

    query: Tensor
    """[B, H, Q, D]: of the tokens that score the others, the window where the policy names none."""
    key: Tensor
    """[B, G, N, D]: of all tokens, cached ones first."""
    attention: FlexASLAttention
    scoring: Scoring
    valid: Tensor | None
    """[B, N] or [B, G, N] bool, False at padding and at tokens that are masked out; None where there are none."""
    positions: Tensor
    """[B, N] or [B, G, N] int64."""
    sinks: Tensor | None
    query_at: Tensor | None
    """[B, Q] int64: places of the queries among the keys; None for the last ones."""
    controls: int = 0
    """How many of the first queries are of the text before the question, for comparison."""

    def window_scores(self, mass: bool = False) -> Any:
        """Pooled attention that keys get from the queries, `flexasl.ops.window_scores`: [B, G, N - window] float32;
        with mass also that which each key gets, not pooled: [B, G, N]."""
        marks: dict[str, Any] = {"valid": self.valid, "positions": self.positions}
        marks |= {"sinks": self.sinks, "query_at": self.query_at, "controls": self.controls}
        made = self.attention.scores(self.query, self.key, self.scoring, **marks, mass=mass)
        pooled, *rest = made if mass else (made,)
        pooled = pooled[..., : self.key.shape[2] - self.scoring.window]
        return (pooled, *rest) if mass else pooled


def attend(
    rows: Rows, attention: FlexASLAttention, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """Attention of each row to its past and itself: query [1, H, T, D], key, value [1, G, T, D], or [1, G, B E + T, D]
    as `Rows.join` gives them → [1, H, T, D]."""
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and _is_one_plain_row(rows, attention)):
        return rows_attention(query, key, value, rows.layout, rows.positions, rows.kept, sinks, attention.spec.text)
    if len(rows.lengths) == 1:
        visible = None if _is_one_plain_row(rows, attention) else rows.visible(rows.parts[0])
        out: Tensor = attention(query, key, value, visible, sinks=sinks)
        return out
    spec = attention.spec
    how = choose_for_rows(
        spec,
        flex.is_fast(query),
        lengths=len(rows.parts),
        varlen=lambda: rows.follow_order(spec) and can_varlen(spec, query, key, value, sinks),
    )
    if how == "varlen":
        return varlen_attention(spec, query, key, value, rows.cu_seqlens, rows.width)
    if how == "flex":
        whole: Tensor = attention(query, key, value, rows.together(), sinks=sinks)
        return whole
    made = []
    for part in rows.parts:
        keys = part.after(rows.entries)
        visible = rows.visible(part) if rows.has_mask(attention.spec, part) else None
        mixed = attention(part.of(query, 2), keys.of(key, 2), keys.of(value, 2), visible, sinks=sinks)
        made.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(made)[None].transpose(1, 2)


def scores(
    rows: Rows,
    attention: FlexASLAttention,
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    wanted: Sequence[int],
    sinks: Tensor | None = None,
    *,
    score: Callable[[Scored], Tensor] = Scored.window_scores,
    mass: bool = False,
    pack: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scores of the rows wanted, by query [1, H, K, D] of the tokens at `rows.queries(W)` and key as in `attend`:
    [rows, G, width - W] float32, of the rows' own tokens, each row at the right end, 0 where it has no such token.
    score gives those of some rows, [number, G, N - W]. With mass also the attention that each own token gets from W
    queries, [rows, G, width]. pack moves the tokens that are not masked out to the right end, so that scores pool over
    these as if the others had never been there."""
    window, found = scoring.window, []
    for part in rows.parts:
        chosen = [row - part.first for row in wanted if part.first <= row < part.first + part.number]
        for some in [chosen] if chosen and rows.scoring_tokens is None else [[one] for one in chosen]:
            if part.length <= window:
                found.append([query.new_zeros(len(some), key.shape[1], 0, dtype=torch.float32)] * (1 + mass))
                continue
            seen = _scored(rows, part, some, attention, query, key, scoring, sinks, pack)
            if mass:
                made = list(seen.window_scores(mass=True))
                made[0] = made[0] if score is Scored.window_scores else score(seen)
                made[1] = (
                    made[1] if seen.query_at is None else made[1] * (window / (seen.query.shape[2] - seen.controls))
                )
            else:
                made = [score(seen)]
            found.append([states[..., rows.entries :] for states in made])
    widths = max(0, rows.width - window), rows.width
    joined = [_right_aligned(parts, width) for parts, width in zip(zip(*found), widths)]
    return joined[0], joined[1] if mass else None


def _scored(
    rows: Rows,
    part: EqualRows,
    chosen: list[int],
    attention: FlexASLAttention,
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    sinks: Tensor | None,
    pack: bool,
) -> Scored:
    every = len(chosen) == part.number
    some: Any = slice(None) if every else rows.numbers(chosen)
    keys, (at, valid) = part.after(rows.entries).of(key, 2)[some], rows.view(part)
    at, valid = at[some], None if valid is None else valid[some]
    if rows.past is not None and valid is not None:
        keys, at, valid = _padding_first(keys, at, valid)
    order = None
    if pack and valid is not None and rows.past is None:
        order = valid.to(torch.uint8).argsort(dim=-1, stable=True)
        # `take_along_dim` would make a graph for each length.
        keys = keys.gather(2, order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
        at, valid = at.expand_as(order).gather(1, order), valid.gather(1, order)
    if rows.scoring_tokens is None:
        before = sum(min(length, scoring.window) for length in rows.lengths[: part.first])
        queries = EqualRows(part.first, part.number, before, scoring.window).of(query, 2)[some]
        return Scored(queries, keys, attention, scoring, valid, at, sinks, None)
    row = part.first + chosen[0]
    own, last = rows.scoring_tokens[row], scoring.window
    each = zip(rows.scoring_tokens, rows.lengths)
    counts = [min(length, last) if tokens is None else len(tokens) for tokens, length in each]
    queries = query.narrow(2, sum(counts[:row]), counts[row])
    places = None if own is None else (own + rows.entries)[None]
    if places is not None and order is not None:
        places = order.argsort(dim=-1).gather(1, places)
        silent = None if rows.silent is None else rows.silent[row]
        places = places if silent is None else places.masked_fill(silent, 0)  # where a token is that is masked out
    return Scored(queries, keys, attention, scoring, valid, at, sinks, places, rows.controls[row])


def _is_one_plain_row(rows: Rows, attention: FlexASLAttention) -> bool:
    return len(rows.lengths) == 1 and not rows.has_mask(attention.spec, rows.parts[0])


def _padding_first(keys: Tensor, at: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, G, N, D] with their positions and validity, [B, N] or [B, G, N], in an order that has no padding of an
    earlier turn between real tokens, which scores pool over."""
    order = valid.to(torch.uint8).argsort(dim=-1, stable=True)
    by_head = order if order.dim() == 3 else order[:, None].expand(-1, keys.shape[1], -1)
    return keys.take_along_dim(by_head[..., None], 2), at.gather(-1, order), valid.gather(-1, order)


def _right_aligned(parts: Sequence[Tensor], width: int) -> Tensor:
    """[..., N] of several rows each, one after another, 0 on the left of shorter ones: [sum of rows, ..., width]."""
    wide = [F.pad(part, (width - part.shape[-1], 0)) for part in parts]
    return wide[0] if len(wide) == 1 else torch.cat(wide)


def _rows(layout: Tensor, positions: Tensor, kept: Tensor | None) -> Rows:
    contiguous, *lengths = layout.tolist()
    return Rows(lengths, positions, kept=kept, contiguous=bool(contiguous), layout=layout)


@torch.library.custom_op("flexasl::rows_attention", mutates_args=())
def rows_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    positions: Tensor,
    kept: Tensor | None,
    sinks: Tensor | None,
    spec: str,
) -> Tensor:
    """`attend` of rows without a past as one node of a graph, for any number of rows of any lengths, which
    `Rows.layout` tells."""
    attention = FlexASLAttention.of(AttentionSpec.from_text(spec))
    with torch.no_grad():
        out = attend(_rows(layout, positions, kept), attention, query, key, value, sinks)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@rows_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)


@torch.library.custom_op("flexasl::rows_attention_backward", mutates_args=())
def rows_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    positions: Tensor,
    kept: Tensor | None,
    sinks: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty where there are none) by that of `rows_attention`'s output."""
    rows, rule, found = _rows(layout, positions, kept), AttentionSpec.from_text(spec), []
    for part in rows.parts:
        own, wanted, keys, values = (part.of(tensor, 2) for tensor in (query, grad, key, value))
        found.append(attention_gradients(rule, wanted, own, keys, values, rows.visible(part), sinks))
    *parts, of_sinks = zip(*found)
    joined = [torch.cat([made.transpose(1, 2).flatten(0, 1) for made in of_parts]) for of_parts in parts]
    queries, keys, values = (states[None].transpose(1, 2).contiguous() for states in joined)
    for_sinks = query.new_empty(0) if sinks is None else torch.stack(of_sinks).sum(0).to(sinks.dtype)
    return queries, keys, values, for_sinks


@rows_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = query.new_empty(0) if settings[3] is None else torch.empty_like(settings[3])
    wanted, keys, values = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return wanted, keys, values, sinks


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sinks = ctx.saved_tensors[-1]
    *states, of_sinks = rows_attention_backward(grad, *ctx.saved_tensors, ctx.spec)
    return *states, None, None, None, None if sinks is None else of_sinks, None


rows_attention.register_autograd(_attention_backward, setup_context=_remember)
