"""The operations of this package, and attention, by their definitions: slow, exact, and there to compare with.

Fast paths never import this. Shapes: O observed layers, B batch, H query heads, G KV heads, M queries, N keys,
W window, P = N - W prefix keys, D and E head dims, K kept entries.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from statistics import pvariance
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.attention_spec import AttentionSpec


def attention_weights(
    query: Tensor,
    key: Tensor,
    seen: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [B, H, M, D], key [B, G, N, D], seen [B, 1 or H, M, N] bool → [B, H, M, N] float64; 0 where nothing is
    seen."""
    repeats = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(repeats, 1).mT
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    sink = logits.new_full((query.shape[1],), float("-inf")) if sinks is None else sinks.double()
    logits = logits.masked_fill(~seen, float("-inf"))
    weights = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return weights.masked_fill(~seen, 0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attention_weights`, times value [B, G, N, E]: [B, H, M, E] float64."""
    weights = attention_weights(query, key, seen, scale, softcap, sinks)
    return weights @ value.double().repeat_interleave(query.shape[1] // value.shape[1], 1)


def window_scores(*arguments: Any, **settings: Any) -> Tensor:
    """`flexasl.ops.window_scores`, in float64."""
    return window_scores_and_mass(*arguments, **settings)[0]


def window_scores_and_mass(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    pooling: str,
    spec: str = "",
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    query_at: Tensor | None = None,
    power: float = 1.0,
    controls: int = 0,
) -> tuple[Tensor, Tensor]:
    """`flexasl.ops.window_scores_and_mass`, in float64. Section 3 of arXiv 2601.07667."""
    marks = valid, positions, sinks
    scores = window_mass(query, key, spec, *marks, query_at, power, controls)
    scores = scores if query_at is not None else scores[..., : key.shape[2] - query.shape[2]]
    if scores.shape[-1] > 0:
        scores = pooled(scores, kernel_size, pooling)
    by_group = scores.unflatten(1, (key.shape[1], -1))
    asking = query_at if query_at is None else query_at[:, controls:]
    mass = window_mass(query[:, :, controls:], key, spec, *marks, asking).unflatten(1, (key.shape[1], -1)).sum(2)
    return by_group.amax(2) if power == math.inf else by_group.sum(2), mass


def pooled(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Scores [..., P] over neighbouring tokens."""
    if kernel_size == 1:
        return scores
    if pooling == "phrase":
        scores = F.avg_pool1d(scores, 7, stride=1, padding=3)
    pool = F.avg_pool1d if pooling == "avgpool" else F.max_pool1d
    found = pool(scores, kernel_size, stride=1, padding=kernel_size // 2)
    if pooling != "phrase":
        return found
    tokens = range(scores.shape[-1])
    weights = [[0.95 ** (at - by) if 0 <= at - by <= 2 * kernel_size else 0.0 for by in tokens] for at in tokens]
    return (found[..., None, :] * found.new_tensor(weights)).amax(-1)


def window_mass(
    query: Tensor,
    key: Tensor,
    spec: str = "",
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    query_at: Tensor | None = None,
    power: float = 1.0,
    controls: int = 0,
) -> Tensor:
    """`flexasl.ops.window_mass`, in float64."""
    batch, tokens, window = key.shape[0], key.shape[2], query.shape[2]
    index = torch.arange(tokens, dtype=torch.int64, device=key.device)
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=key.device) if valid is None else valid
    at = (index if positions is None else positions).expand(batch, -1)
    query_at = (index[tokens - window :] if query_at is None else query_at).expand(batch, -1)
    seen = (index <= query_at[:, :, None]) & valid[:, None] & valid.gather(1, query_at)[:, :, None]
    rule = AttentionSpec.from_text(spec)
    if rule.sliding_window is not None:
        seen = seen & (at.gather(1, query_at)[:, :, None] - at[:, None] < rule.sliding_window)
    weights = attention_weights(query, key, seen[:, None], rule.scale, rule.softcap, sinks)
    text, asking = weights[:, :, :controls], weights[:, :, controls:]
    if power == math.inf:
        return asking.amax(2) if not controls else (asking.amax(2) - text.amax(2)).clamp(min=0)
    asking, text = (
        some.pow(power).where((power == 1) | (some >= 1e-36 ** (1 / power)), 0).sum(2) for some in (asking, text)
    )
    gives = valid.gather(1, query_at).double()
    share = gives[:, controls:].sum(1) / gives[:, :controls].sum(1).clamp(min=1)
    return asking if not controls else (asking - text * share[:, None, None]).clamp(min=0)


def token_ranks(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Rank [B, P] of each token: 1 more than the tokens before it in order of padding, score (NaN lowest), place."""
    ranks = torch.empty_like(scores, dtype=torch.int32)
    for row, values in enumerate(scores.masked_fill(scores.isnan(), float("-inf")).tolist()):
        real = [True] * len(values) if valid is None else valid[row].tolist()
        order = sorted(range(len(values)), key=lambda place: (not real[place], -values[place], place))
        ranks[row, order] = torch.arange(1, len(values) + 1, dtype=torch.int32, device=ranks.device)
    return ranks


def rank_variance(ranks: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """ranks [O, B, P], budget [B] → the mean over tokens of their ranks' population variance, rounded once, and how
    many tokens these are: those within the budget in any layer. Section 3.2 of arXiv 2601.07667."""
    variances, sizes = [], []
    for row, most in zip(ranks.unbind(1), budget.tolist(), strict=True):
        union = [[Fraction(rank) for rank in token] for token in row.T.tolist() if min(token) <= most]
        variances.append(float(sum(map(pvariance, union)) / max(1, len(union))))
        sizes.append(len(union))
    return budget.new_tensor(variances, dtype=torch.float64), budget.new_tensor(sizes)


def select_tokens(ranks: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """Tokens [B, P + W] within the budget, and the window; never padding."""
    keep = F.pad(ranks <= budget[:, None], (0, window), value=True)
    return keep if valid is None else keep & valid


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """states [B or 1, N, ...], indices [B, K] → [B, K, ...]."""
    return torch.stack([row[own] for row, own in zip(states.expand(len(indices), *states.shape[1:]), indices)])


def compact_kv(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """keys [B or 1, G, N, D], values [B or 1, G, N, E], indices [B, G, K] → [B, G, K, D], [B, G, K, E]."""
    heads = (states.expand(len(indices), *states.shape[1:]).flatten(0, 1) for states in (keys, values))
    kept = (gather_tokens(states, indices.flatten(0, 1)).unflatten(0, indices.shape[:2]) for states in heads)
    return next(kept), next(kept)


def kept_indices(keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """keep [N] bool → the indices that are kept, ascending, behind others up to `count`; and which of these are
    kept."""
    kept = keep.nonzero()[:, 0]
    filler = (~keep).nonzero()[: count - len(kept), 0]
    real = torch.arange(count, dtype=torch.int64, device=keep.device) >= len(filler)
    return torch.cat([filler, kept]), real


def top_k_entries(scores: Tensor, budget: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """scores [B, G, P], budget [B] → [B, G, P + W] bool: each head's best. SnapKV, arXiv 2404.14469."""
    heads = [select_tokens(token_ranks(head, valid), budget, window) for head in scores.unbind(1)]
    return torch.stack(heads, 1)


def top_p_entries(share: Tensor, top_p: float, window: int, valid: Tensor | None = None) -> Tensor:
    """share [B, G, N] → bool: each head's fewest entries that reach `top_p`, in whole eights, the first and the
    window."""
    keep = torch.zeros_like(share, dtype=torch.bool)
    for row, group in itertools.product(range(share.shape[0]), range(share.shape[1])):
        real = range(share.shape[2]) if valid is None else valid[row].nonzero()[:, 0].tolist()
        mass = [Fraction(value) for value in share[row, group].tolist()]
        order = sorted(real, key=lambda place: (-mass[place], place))
        reached = next((n for n in range(1, len(order) + 1) if sum(mass[at] for at in order[:n]) >= top_p), len(order))
        keep[row, group, [*order[: reached // 8 * 8], *real[:1], *real[-window:]]] = True
    return keep
