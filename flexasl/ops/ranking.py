"""Ranks of tokens, and how much they still move from layer to layer.

Shapes: O observed layers, B batch, P prefix tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("flexasl::token_ranks", mutates_args=())
def token_ranks(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Rank of each prefix token, 1 = highest score; ties go to the earlier token.

    Args:
        scores: [B, P] of a float dtype. NaN and -inf rank alike.
        valid: [B, P] bool, False at padding, which ranks behind every token. None: there is none.

    Returns:
        [B, P] int32.

    Examples:
        >>> flexasl.ops.token_ranks(torch.tensor([[0.1, 0.4, 0.1]]))
        tensor([[2, 1, 3]], dtype=torch.int32)
    """
    scores = finite(scores)
    scores = scores if valid is None else scores.masked_fill(~valid, float("-inf"))
    return ranks_of(scores.argsort(dim=-1, descending=True, stable=True))


@token_ranks.register_fake
def _(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    return torch.empty_like(scores, dtype=torch.int32)


@torch.library.custom_op("flexasl::rank_variance", mutates_args=())
def rank_variance(ranks: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over layers and tokens of the squared distance of a token's rank from its mean rank over the layers.

    Sums are whole numbers, so the result depends neither on their order nor on the rest of the batch, and is rounded
    twice, at the end, as long as layers times tokens is below 2^31. Equation of section 3.2 of arXiv 2601.07667.

    Args:
        ranks: [O, B, P] int32, of O layers.
        budget: [B] int: the union is taken of the tokens ranked within it in any layer, and padding must rank beyond
            it.

    Returns:
        Variance [B] float64, in squared ranks, and the size of the union [B] int64.
    """
    layers = ranks.shape[0]
    union = (ranks <= budget[None, :, None]).any(0)
    squares = torch.zeros_like(union, dtype=torch.int64)
    for layer in ranks.unbind():
        wide = layer.long()
        squares.addcmul_(wide, wide)
    spread = layers * squares - ranks.sum(0).square()
    spread = spread.masked_fill(~union, 0)
    # One token's spread fits in int64, but not the sum of millions: high and low halves are added up apart.
    low = (spread & 0xFFFFFFFF).sum(-1)
    high = (spread >> 32).sum(-1) + (low >> 32)
    total = high.double() * 2.0**32 + (low & 0xFFFFFFFF).double()
    size = union.sum(-1)
    return total / (size.clamp(min=1) * layers * layers), size


@rank_variance.register_fake
def _(ranks: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    rows = ranks.shape[1]
    return ranks.new_empty(rows, dtype=torch.float64), ranks.new_empty(rows, dtype=torch.int64)


def finite(scores: Tensor) -> Tensor:
    """Scores in which NaN and -inf are the lowest number, above padding."""
    lowest = torch.finfo(scores.dtype).min
    return scores.nan_to_num(nan=lowest, posinf=float("inf"), neginf=lowest)


def ranks_of(order: Tensor) -> Tensor:
    """Ranks int32 of tokens in this order, best first: [B, P]."""
    ranks = torch.arange(1, order.shape[-1] + 1, dtype=torch.int32, device=order.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, ranks.expand_as(order))
