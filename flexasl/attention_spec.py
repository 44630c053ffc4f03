"""What attention is, without tensors: how products of queries and keys become logits.

A new setting of attention is a field of `AttentionSpec` and its part of the methods below; kernels, scores and
gradients call these alone. Shapes: B batch, G KV heads, M queries, N keys, D head dim.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flexasl.checks import integer, real
from flexasl.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from flexasl.masks import Visibility

Kernel = Literal["auto", "flex", "sdpa", "eager"]
KERNELS = ("auto", "flex", "sdpa", "eager")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """scale multiplies products of queries and keys (default D ** -0.5); sliding_window hides keys that many positions
    back or more, or, with chunked, those before the chunk of so many positions, counted from its row's first one, that
    a query is in; softcap c turns logits x into c tanh(x / c); alibi, a slope for each query head, adds slope times
    position of the key to logits, a bias by distance; kernel is what computes it, `"auto"` the fastest.

    Raises `ConfigError` on a setting that cannot work, and `UnsupportedError` where the kernel cannot honour it.
    """

    scale: float | None = None
    sliding_window: int | None = None
    chunked: bool = False
    softcap: float | None = None
    alibi: tuple[float, ...] | None = None
    kernel: Kernel = "auto"
    text: str = field(init=False, repr=False, compare=False)
    """The settings that are no defaults, such as `"scale=0.5 kernel='sdpa'"`, to pass through the schema of an op."""

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, str) or self.kernel not in KERNELS:
            known = ", ".join(map(repr, KERNELS[:-1]))
            raise ConfigError(f"kernel={self.kernel!r} is not known; give {known} or {KERNELS[-1]!r}")
        numbers: dict[str, Any] = {"scale": self.scale, "sliding_window": self.sliding_window, "softcap": self.softcap}
        for name, value in numbers.items():
            allowed = f"a {'finite' if name == 'scale' else 'positive'} number or None"
            if value is not None:
                numbers[name] = real(name, value, allowed, error=ConfigError)
                if name != "scale" and numbers[name] <= 0:
                    raise ConfigError(f"{name}={value} is too small; give {allowed}")
        if self.sliding_window is not None:
            numbers["sliding_window"] = integer("sliding_window", self.sliding_window, error=ConfigError)
        if self.chunked and self.sliding_window is None:
            raise ConfigError("chunked=True needs sliding_window, the size of a chunk")
        if self.alibi is not None:
            numbers["alibi"] = tuple(
                real("alibi", slope, "a number for each head", error=ConfigError) for slope in self.alibi
            )
            if self.softcap is not None:
                raise UnsupportedError(f"alibi has no soft-cap (softcap={self.softcap}); give one of them")
        if self.kernel == "sdpa" and self.softcap is not None:
            raise UnsupportedError(
                f"kernel='sdpa' has no soft-cap (softcap={self.softcap}); give kernel='auto', 'flex' or 'eager'"
            )
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        settings = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        given = [
            f"{name}={value!r}".replace(" ", "")
            for name, value in settings.items()
            if value != getattr(type(self), name)
        ]
        object.__setattr__(self, "text", " ".join(given))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def from_text(cls, text: str) -> AttentionSpec:
        """The specification with this `text`."""
        settings = (setting.split("=") for setting in text.split())
        return cls(**{name: ast.literal_eval(value) for name, value in settings})

    @property
    def is_plain(self) -> bool:
        """Whether logits are scaled products under a mask of bool, which is all that fused kernels know."""
        return self.softcap is None and self.alibi is None

    @property
    def counts_from_start(self) -> bool:
        """Whether logits depend on how far a token is from its row's first one, not on distances alone."""
        return self.chunked

    def needs_positions(self, neighbours: int | None = None) -> bool:
        """Whether logits depend on positions; with neighbours, among so many keys at consecutive positions."""
        if self.alibi is not None:
            return True
        return self.sliding_window is not None and (neighbours is None or self.sliding_window < neighbours)

    def without_positions(self) -> AttentionSpec:
        """The same for keys, or under a mask, that what depends on positions has been applied to."""
        return replace(self, sliding_window=None, chunked=False)

    def factor(self, dim: int) -> float:
        """What queries of head dim `dim` are multiplied by before their products with keys."""
        return (dim**-0.5 if self.scale is None else self.scale) / (self.softcap or 1.0)

    def mask(self, query_at: Tensor, key_at: Tensor, seen: Tensor | None) -> Tensor | None:
        """`seen`, bool [B, 1 or G, M, N] or None for all, less what is hidden by positions: query_at int [B, M], key_at
        int [B, N] or [B, G, N]."""
        if self.sliding_window is None:
            return seen
        key_at = key_at[:, None] if key_at.dim() == 2 else key_at
        near = within(query_at[:, None, :, None], key_at[:, :, None], self.sliding_window)
        if self.chunked:
            query_chunk, key_chunk = query_at // self.sliding_window, key_at // self.sliding_window
            near = near & (query_chunk[:, None, :, None] == key_chunk[:, :, None])
        return near if seen is None else near & seen

    def logits(self, products: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of products [..., M, N] of queries, times `factor`, and keys; written over them where they need no
        gradient. `mask` is about the last of the keys, or all; what it does not see gets -inf."""
        if self.softcap is not None:
            whole = products.requires_grad
            products = products.tanh() * self.softcap if whole else products.tanh_().mul_(self.softcap)
        if mask is not None:
            products[..., products.shape[-1] - mask.shape[-1] :].masked_fill_(~mask, float("-inf"))
        return products

    def derivative(self, products: Tensor) -> Tensor | None:
        """Derivative of `logits` by their products, where these are seen; None where it is 1."""
        return None if self.softcap is None else (1 - products.tanh().square()) * self.softcap

    def flex(self, visible: Visibility, heads: int, dim: int) -> dict[str, Any]:
        """Settings of `flex_attention` for H heads under which it computes this."""
        capped = None
        if self.softcap is not None:
            # A tensor, because on CPU a captured float does not compile for all lengths; an upload would wait.
            softcap = torch.full((), self.softcap, dtype=torch.float32, device=visible.query_positions.device)

            def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return softcap * torch.tanh(score)

        blocks = visible.block_mask(self.sliding_window, heads)
        return {"score_mod": capped, "block_mask": blocks, "scale": self.factor(dim)}


def within(query_at: Tensor, key_at: Tensor, sliding_window: int | Tensor) -> Tensor:
    """Whether a key is inside the sliding window of a query: less than so many positions back."""
    return key_at > query_at - sliding_window
