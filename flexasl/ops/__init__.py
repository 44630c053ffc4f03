"""Tensor operations of the decision, which `reference` specifies. Those that make up the decision are also
`torch.ops.flexasl.*`, opaque to a compiler."""

from flexasl.ops import cpu  # noqa: F401 (its kernels are registered)
from flexasl.ops.ranking import rank_variance, token_ranks
from flexasl.ops.scoring import over_heads, window_mass, window_scores, window_scores_and_mass
from flexasl.ops.selection import compact_kv, gather_tokens, kept_indices, select_tokens
from flexasl.ops.snapkv import top_k_entries, top_p_entries

__all__ = [
    "compact_kv",
    "gather_tokens",
    "kept_indices",
    "over_heads",
    "rank_variance",
    "select_tokens",
    "token_ranks",
    "top_k_entries",
    "top_p_entries",
    "window_mass",
    "window_scores",
    "window_scores_and_mass",
]
