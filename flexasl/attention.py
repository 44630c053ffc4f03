"""Attention for any decoder, as a module.

Shapes: B batch, H query heads, G KV heads, M queries, N keys, W window, P = N - W prefix keys, D and E head dims.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexasl import kernels
from flexasl.attention_spec import AttentionSpec, Kernel
from flexasl.errors import ConfigError
from flexasl.kernels.alibi import with_alibi
from flexasl.masks import Visibility
from flexasl.ops import window_scores, window_scores_and_mass


@dataclass(frozen=True)
class Scoring:
    """Asks `FlexASLAttention` for window scores.

    Args:
        window: Last queries, whose attention scores the keys before them.
        kernel_size: Keys that each score is pooled over; odd.
        pooling: `"avgpool"`, `"maxpool"` or `"phrase"`, see `ASLConfig.pooling`.
        power: Exponent of each attention weight, at least 1. Infinity takes the highest weight in place of a sum.

    Raises:
        ConfigError: A value is out of range.
    """

    window: int = 32
    kernel_size: int = 7
    pooling: str = "avgpool"
    power: float = 1.0
    """What each weight is raised to; infinity takes the highest weight in place of sums."""

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(f"window={self.window!r} is not a number of queries; give an int of at least 1")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={self.kernel_size!r} is not an odd number of tokens; give 1, 3, 5, ...")
        if self.pooling not in ("avgpool", "maxpool", "phrase"):
            raise ConfigError(f"pooling={self.pooling!r} is not known; give 'avgpool', 'maxpool' or 'phrase'")
        if not isinstance(self.power, (int, float)) or not self.power >= 1:
            raise ConfigError(
                f"power={self.power!r} is not a power of weights; give a number of at least 1, or infinity"
            )


class FlexASLAttention(nn.Module):
    """Attention for any decoder: causal by position, grouped KV heads, padding, ragged rows, prompts and decode.

    Args:
        scale: Factor of the logits. None: D ** -0.5.
        sliding_window: Positions that a query attends to, its own included. None: all up to its own.
        chunked: Whether a query attends only to its own chunk of `sliding_window` positions, counted from 0.
        softcap: Bound of the logits, softcap * tanh(logits / softcap). None: none.
        alibi: A slope for each query head of a bias by distance, ALiBi: the slope times the key's position is added to
            the logits. None: none.
        kernel: What computes attention: `"flex"` (`flex_attention`, always compiled), `"sdpa"`
            (`scaled_dot_product_attention`), `"eager"` (plain tensor operations), or `"auto"`, the fastest that can,
            see `choose`.

    Raises:
        ConfigError: A setting has a value that it cannot have.
        UnsupportedError: The given kernel cannot compute what the other settings need.

    Examples:
        >>> attention = flexasl.FlexASLAttention(sliding_window=4096)
        >>> query, key, value = torch.randn(1, 8, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
        >>> attention(query, key, value).shape  # [B, H, M, D]
        torch.Size([1, 8, 50, 16])
        >>> out, scores = attention(query, key, value, scoring=flexasl.Scoring(window=10))
        >>> scores.shape  # of the 40 keys before the window, at each KV head
        torch.Size([1, 2, 40])
    """

    def __init__(
        self,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        chunked: bool = False,
        softcap: float | None = None,
        alibi: tuple[float, ...] | None = None,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        how: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "kernel": kernel}
        self._set(AttentionSpec(**how, chunked=chunked, alibi=alibi))

    @classmethod
    def of(cls, spec: AttentionSpec) -> FlexASLAttention:
        """The module of a specification."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set(spec)
        return module

    def _set(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self._fused = spec.is_plain and spec.kernel in ("auto", "sdpa")

    scale = property(lambda self: self.spec.scale)
    sliding_window = property(lambda self: self.spec.sliding_window)
    softcap = property(lambda self: self.spec.softcap)
    kernel = property(lambda self: self.spec.kernel)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Visibility | None = None,
        *,
        sinks: Tensor | None = None,
        scoring: Scoring | None = None,
    ) -> Any:
        """Attention of the queries to the keys.

        Args:
            query: [B, H, M, D] of a float dtype, rotary applied; the queries are those of the last M keys.
            key: [B, G, N, D] of the same dtype, rotary applied; KV heads are not expanded.
            value: [B, G, N, E] of the same dtype.
            visible: Which query attends to which key. None: there is neither padding nor a gap.
            sinks: [H] logits of a key that is not a token and takes its share of each query's attention. None: no such
                key.
            scoring: Which window scores to return as well. None: none.

        Returns:
            [B, H, M, E]; with `scoring` a pair of that and the scores [B, G, P] float32 of
            `flexasl.ops.window_scores`.
        """
        spec = self.spec
        plain = visible is None and sinks is None and scoring is None and self._fused
        if plain and query.shape[2] == 1 and not spec.needs_positions(key.shape[2]):
            return kernels.one_token(query, key, value, spec.factor(query.shape[3]))
        out = kernels.attend(spec, query, key, value, visible, sinks)
        if scoring is None:
            return out
        at, valid = (None, None) if visible is None else (visible.key_positions, visible.key_valid)
        return out, self.scores(query[:, :, -scoring.window :], key, scoring, valid=valid, positions=at, sinks=sinks)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        scoring: Scoring,
        *,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        sinks: Tensor | None = None,
        query_at: Tensor | None = None,
        controls: int = 0,
        mass: bool = False,
    ) -> Any:
        """`window_scores` of the queries [B, H, W, D], of which the first ones are controls, under this module's
        specification, or with mass both results of `window_scores_and_mass`. valid, positions [B, N] and query_at [B,
        W] may differ by KV head: [B, G, N or W]."""
        positions = positions if self.spec.needs_positions() else None
        if self.spec.alibi is not None:
            rest, query, key = with_alibi(self.spec, query, key, positions)
            given: dict[str, Any] = {"valid": valid, "positions": positions, "sinks": sinks, "query_at": query_at}
            return FlexASLAttention.of(rest).scores(query, key, scoring, **given, controls=controls, mass=mass)
        marks = (valid, positions, query_at)
        op: Any = window_scores_and_mass if mass else window_scores
        how = (scoring.kernel_size, scoring.pooling, self.spec.text)
        if all(states is None or states.dim() == 2 for states in marks):
            return op(query, key, *how, valid, positions, sinks, query_at, scoring.power, controls)
        groups, parts = key.shape[1], []
        rows = zip(query.chunk(groups, 1), key.split(1, 1), [None] * groups if sinks is None else sinks.chunk(groups))
        for group, (queries, keys, own) in enumerate(rows):
            seen, at, scoring_tokens = (_of_head(states, group, groups) for states in marks)
            made = op(queries, keys, *how, seen, at, own, scoring_tokens, scoring.power, controls)
            parts.append(made if mass else (made,))
        joined = tuple(torch.cat(part, 1) for part in zip(*parts))
        return joined if mass else joined[0]

    def choose(
        self, query: Tensor, key: Tensor, visible: Visibility | None = None, sinks: Tensor | None = None
    ) -> Literal["flex", "sdpa", "eager"]:
        """The kernel that will run for these inputs: `"flex"`, `"sdpa"` or `"eager"`."""
        return kernels.choose(self.spec, query, key, visible, sinks)

    def prepare(self, visible: Visibility, queries: Tensor) -> None:
        """Builds the mask that attention of these queries [B, M, ...] under `visible` will need, so that it is made
        once for many layers and outside their graphs."""
        if kernels.fastest(self.spec, kernels.flex.is_fast(queries), queries.shape[1] > 1) == "flex":
            visible.block_mask(self.spec.sliding_window)
        else:
            visible.dense(self.spec.sliding_window)

    @functools.cached_property
    def unwindowed(self) -> FlexASLAttention:
        """The same without its sliding window, for keys or a mask that have been cut to it."""
        return FlexASLAttention.of(self.spec.without_positions())

    def extra_repr(self) -> str:
        settings = ((part.name, getattr(self.spec, part.name)) for part in fields(self.spec) if part.init)
        return ", ".join(f"{name}={value!r}" for name, value in settings if value not in (None, False))


def _of_head(marks: Tensor | None, group: int, groups: int) -> Tensor | None:
    """Those [B, N] of one of the KV heads, by marks [B, N], or [B, G, N] of these heads or of fewer."""
    return marks if marks is None or marks.dim() == 2 else marks[:, group * marks.shape[1] // groups]
