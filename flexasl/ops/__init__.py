"""Tensor operations of the decision: plain PyTorch, and the specification of what they compute."""

from flexasl.ops.ranking import rank_variance, token_ranks
from flexasl.ops.scoring import pool_scores, window_mass
from flexasl.ops.selection import gather_slots, kept_slots, select_tokens
from flexasl.ops.snapkv import top_k_entries, top_p_entries

__all__ = [
    "gather_slots",
    "kept_slots",
    "pool_scores",
    "rank_variance",
    "select_tokens",
    "token_ranks",
    "top_k_entries",
    "top_p_entries",
    "window_mass",
]
