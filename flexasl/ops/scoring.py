"""Window scores: how much attention a prompt's scoring queries, by default its last ones, pay to its tokens.

Shapes: B batch, H query heads, G KV heads, R = H / G, N keys, W scoring queries, P scored keys, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.attention_spec import AttentionSpec

LOGITS = 2**27
"""Logits held at once, 512 MiB in float32, unless one query head alone has more."""
LEAST = 1e-36
"""Powers of weights below it count as 0."""
PHRASE, FADING = 7, 0.95
"""With `pooling="phrase"`: tokens that a match is taken over, and what it counts one token further on."""


@torch.library.custom_op("flexasl::window_scores", mutates_args=())
def window_scores(
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
) -> Tensor:
    """Score of each token at each KV head: the attention that it gets from the scoring queries.

    Each weight is raised to a power, pooled over neighbouring tokens per query head, and summed over the head's
    queries; with power infinity the highest weight counts. Section 3 of arXiv 2601.07667; SnapKV, arXiv 2404.14469.
    Gradients do not flow through scores. A real token that is not finite makes the scores of its KV head NaN, in its
    row.

    Args:
        query: [B, H, W, D] of a float dtype. A query sees the keys up to its own.
        key: [B, G, N, D] of the same dtype.
        kernel_size: Tokens that each score is pooled over; odd.
        pooling: `"avgpool"`, which pads with zeros and divides by `kernel_size` everywhere, `"maxpool"`, or
            `"phrase"`: the average over 7 tokens, of which the highest of `kernel_size` then also counts for twice as
            many tokens behind, 5 percent less with each.
        spec: The `text` of an `AttentionSpec`.
        valid: [B, N] bool, False at padding, which neither gives nor gets attention, whatever it holds. None: there is
            none.
        positions: [B, N] int, which matter where the specification asks for them. None: 0 to N - 1.
        sinks: [H] logits of a key that is not a token and takes its share of each query's attention. None: no such
            key.
        query_at: [B, W] int64, which keys' queries these are; all N keys are then scored. None: the last W, and the N
            - W keys before them are scored.
        power: Exponent of each weight; infinity takes the highest weight.
        controls: How many of the first queries are controls, whose weights are subtracted.

    Returns:
        [B, G, P] float32.
    """
    mass = window_mass(query, key, spec, valid, positions, sinks, query_at, power, controls)
    return _pooled(mass, query, key, kernel_size, pooling, query_at, power)


@torch.library.custom_op("flexasl::window_scores_and_mass", mutates_args=())
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
    """`window_scores`, and the attention that each key gets, from one pass.

    Args:
        query: As for `window_scores`, like all other arguments.

    Returns:
        The scores [B, G, P] float32, and the attention [B, G, N] float32 that each of the N keys gets from the queries
        that are not controls, not pooled and to the power of one.
    """
    marks = valid, positions, sinks
    at = query_at if query_at is None else query_at[:, controls:]
    mass = window_mass(query[:, :, controls:], key, spec, *marks, at)
    same = power == 1 and not controls
    powers = mass if same else window_mass(query, key, spec, *marks, query_at, power, controls)
    scores = _pooled(powers, query, key, kernel_size, pooling, query_at, power)
    return scores, over_heads(mass.unflatten(1, (key.shape[1], -1)), 2)


@torch.library.custom_op("flexasl::window_mass", mutates_args=())
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
    """Each key's attention from each query head, summed over the scoring queries.

    Weights are raised to `power`, or the highest is taken with infinity; what a key gets from controls is subtracted.
    Weights whose power would be below 1e-36 count as 0. KV heads are never expanded, and at most `LOGITS` logits of one
    are held, or those of one of its query heads.

    Args:
        query: As for `window_scores`, like all other arguments.

    Returns:
        [B, H, N] float32.
    """
    rule, groups = AttentionSpec.from_text(spec), key.shape[1]
    mask = window_mask(query, key, rule, valid, positions, query_at)
    scaled, mass = query.float() * rule.factor(query.shape[3]), []
    most = max(1, LOGITS // max(1, query.shape[0] * query.shape[2] * key.shape[2]))
    for group, queries in enumerate(scaled.chunk(groups, 1)):
        keys, own = key[:, group].float().mT, None if sinks is None else sinks.float().chunk(groups)[group].split(most)
        for tile, some in enumerate(queries.split(most, 1)):
            products = some.flatten(1, 2) @ keys
            logits = rule.logits(products.unflatten(1, some.shape[1:3]), mask)
            weights = logits.softmax(-1)
            if own is not None:
                weights *= (logits.logsumexp(-1) - own[tile][:, None]).sigmoid()[..., None]
            weights = powers_of(without_padding(weights, valid, query_at), power)
            mass.append(of_queries(weights, power, controls, giving(valid, query_at, query.shape[2])))
    return torch.cat(mass, 1)


@window_scores.register_fake
def _scores_alone(query: Tensor, key: Tensor, *settings: object) -> Tensor:
    whole = len(settings) > 6 and settings[6] is not None
    scored = key.shape[2] if whole else key.shape[2] - query.shape[2]
    return query.new_empty(*key.shape[:2], scored, dtype=torch.float32)


@window_scores_and_mass.register_fake
def _(query: Tensor, key: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    return _scores_alone(query, key, *settings), query.new_empty(key.shape[:3], dtype=torch.float32)


@window_mass.register_fake
def _(query: Tensor, key: Tensor, *marks: object) -> Tensor:
    return query.new_empty(key.shape[0], query.shape[1], key.shape[2], dtype=torch.float32)


def window_mask(
    query: Tensor, key: Tensor, rule: AttentionSpec, valid: Tensor | None, positions: Tensor | None, at: Tensor | None
) -> Tensor:
    """What the scoring queries, which are those of the keys `at`, see of all keys, bool [B or 1, 1, W, N]; or of the
    last ones, where they see all before these."""
    window, tokens = query.shape[2], key.shape[2]
    if valid is None and not rule.needs_positions(tokens if positions is None else None):
        if at is None:
            return torch.ones(1, 1, window, window, dtype=torch.bool, device=key.device).tril()
        if at.is_cpu:  # elsewhere the host would wait for it
            return (torch.arange(int(at.min()), tokens, dtype=torch.int64, device="cpu") <= at[..., None])[:, None]
    index = torch.arange(tokens, dtype=torch.int64, device=key.device)[None]
    at = index[:, tokens - window :] if at is None else at
    positions = index if positions is None else positions
    seen = index <= at[..., None]
    seen = seen if valid is None else seen & valid[:, None]
    mask = rule.mask(positions.take_along_dim(at, 1), positions, seen[:, None])
    assert mask is not None
    return mask


def without_padding(weights: Tensor, valid: Tensor | None, at: Tensor | None) -> Tensor:
    """Weights [B, R, W, N], in their own memory, with 0 from queries that are padding's."""
    gives = giving(valid, at, weights.shape[2])
    return weights if gives is None else weights.masked_fill_(~gives[:, None, :, None], 0.0)


def giving(valid: Tensor | None, at: Tensor | None, window: int) -> Tensor | None:
    """Which of so many queries are no padding's, [B, W] bool; None: all."""
    if valid is None:
        return None
    return valid[:, valid.shape[1] - window :] if at is None else valid.take_along_dim(at, 1)


def pool(mass: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Scores [B, H, P], none below 0, each pooled over the tokens beside it."""
    if kernel_size == 1 or mass.shape[-1] == 0:
        return mass
    if pooling == "avgpool":
        return F.avg_pool1d(mass, kernel_size, stride=1, padding=kernel_size // 2)
    if pooling == "phrase":
        mass = F.avg_pool1d(mass, PHRASE, stride=1, padding=PHRASE // 2)
    highest = F.max_pool1d(mass, kernel_size, stride=1, padding=kernel_size // 2)
    return _forward(highest, 2 * kernel_size) if pooling == "phrase" else highest


def _forward(scores: Tensor, reach: int) -> Tensor:
    """The highest of each token's score and those of so many tokens before it, each of which has faded on its way;
    written over the scores."""
    covered, room = 0, torch.empty_like(scores)
    while covered < min(reach, scores.shape[-1] - 1):
        step = min(covered + 1, reach - covered)
        later, faded = scores[..., step:], room[..., step:]
        torch.mul(scores[..., : later.shape[-1]], FADING**step, out=faded)
        torch.maximum(later, faded, out=later)
        covered += step
    return scores


def pool_reach(kernel_size: int, pooling: str) -> tuple[int, int]:
    """Tokens before and behind one that its score is pooled over."""
    if pooling != "phrase" or kernel_size == 1:
        return kernel_size // 2, kernel_size // 2
    near = kernel_size // 2 + PHRASE // 2
    return near + 2 * kernel_size, near


def _pooled(
    mass: Tensor, query: Tensor, key: Tensor, kernel_size: int, pooling: str, query_at: Tensor | None, power: float
) -> Tensor:
    scored = mass if query_at is not None else mass[..., : key.shape[2] - query.shape[2]]
    return over_heads(pool(scored, kernel_size, pooling).unflatten(1, (key.shape[1], -1)), 2, power)


def powers_of(weights: Tensor, power: float) -> Tensor:
    """Weights to this power, in their own memory."""
    if power in (1, math.inf):
        return weights
    # What float32 has no power of would take a CPU many times as long.
    weights.masked_fill_(weights < LEAST ** (1 / power), 0.0)
    return weights.mul_(weights) if power == 2 else weights.pow_(power)


def of_queries(
    weights: Tensor, power: float, controls: int, gives: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Weights [B, R, W, N], raised to this power, as those of all queries [B, R, N]: their sum, or with power infinity
    the highest; without the same of the first ones, which are controls, and a sum of which counts as that of so many
    queries as the others are, of those that give [B, W]. Never below 0."""
    asking = weights[:, :, controls:]
    found = torch.amax(asking, 2, out=out) if power == math.inf else torch.sum(asking, 2, out=out)
    if not controls:
        return found
    text = over_heads(weights[:, :, :controls], 2, power)
    if power == math.inf:
        return found.sub_(text).clamp_(min=0.0)
    gives = weights.new_ones(1, weights.shape[2], dtype=torch.bool) if gives is None else gives
    share = gives[:, controls:].sum(1) / gives[:, :controls].sum(1).clamp(min=1)
    return found.sub_(text * share[:, None, None]).clamp_(min=0.0)


def over_heads(scores: Tensor, dim: int, power: float = 1.0) -> Tensor:
    """Scores of several heads, or queries, as those of all: their sum, or with power infinity the highest.

    Args:
        scores: Of any shape.
        dim: The dimension of heads.
        power: As for `window_scores`.
    """
    return scores.amax(dim) if power == math.inf else scores.sum(dim)
