"""Attention of query over key and value, without ever storing KV heads expanded.

Shapes: B batch, H query heads, G KV heads, R = H / G, M queries, N keys, W window, P = N - W prefix keys, D head dim.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexasl.checks import integer, real
from flexasl.errors import ConfigError, UnsupportedError
from flexasl.masks import BLOCK, SettledMask, Visibility
from flexasl.ops import window_scores, window_scores_and_mass

KERNELS = ("auto", "flex", "sdpa", "eager")
QUERIES, TILE = 64, 2**25
"""Queries that the eager kernel takes at once, which keeps its tiles in a CPU's cache, and the most logits it holds."""
WIDENED = 2**18
"""Numbers that the eager kernel widens to float32 at once in decode."""
MASK = 2**27
"""Pairs of query and key whose mask the sdpa kernel holds at once."""
PROMPT = 256
"""Queries of a masked prompt that the sdpa kernel takes at once, so that it skips keys in their future."""


@dataclass(frozen=True)
class Scoring:
    """Asks for window scores: of how many last queries, pooled how."""

    window: int = 32
    kernel_size: int = 7
    pooling: str = "avgpool"

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(f"window={self.window!r} is no number of queries; give an int of at least 1")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={self.kernel_size!r} is no odd number of tokens; give 1, 3, 5, ...")
        if self.pooling not in ("avgpool", "maxpool"):
            raise ConfigError(f"pooling={self.pooling!r} is not known; give 'avgpool' or 'maxpool'")


class FlexASLAttention(nn.Module):
    """Attention for any decoder: causal by position, grouped KV heads, padding, ragged rows, prompts and decode.

    scale multiplies logits (default D ** -0.5); sliding_window hides keys that many positions back or more; softcap c
    turns logits x into c tanh(x / c). kernel is what computes it: `"flex"` (`flex_attention`, always compiled),
    `"sdpa"` (`scaled_dot_product_attention`), `"eager"` (plain tensor operations, the reference), or `"auto"`, which
    takes what `choose` says is fastest among those that can. On CPU, flex compiles a graph for every length: it is
    there to compare with. Raises `ConfigError` on a setting that cannot work, and
    `UnsupportedError` where a kernel that was asked for cannot honour the others.
    """

    def __init__(
        self,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        kernel: Literal["auto", "flex", "sdpa", "eager"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(kernel, str) or kernel not in KERNELS:
            raise ConfigError(f"kernel={kernel!r} is not known; give {', '.join(map(repr, KERNELS[:-1]))} or 'eager'")
        if scale is not None:
            scale = real("scale", scale, "a finite number or None", error=ConfigError)
        for name, value in (("sliding_window", sliding_window), ("softcap", softcap)):
            if value is not None and real(name, value, "a positive number or None", error=ConfigError) <= 0:
                raise ConfigError(f"{name}={value} is too small; give a positive number or None")
        if sliding_window is not None:
            sliding_window = integer("sliding_window", sliding_window, error=ConfigError)
        if kernel == "sdpa" and softcap is not None:
            raise UnsupportedError(
                f"kernel='sdpa' has no soft-cap (softcap={softcap}); give kernel='auto', 'flex' or 'eager'"
            )
        self.scale = scale
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.kernel = kernel

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
        """query [B, H, M, D], key [B, G, N, D], value [B, G, N, E], of one float dtype, rotary applied; the queries are
        the last M keys. visible says who sees whom; without it there is neither padding nor gap. sinks [H] are logits
        of a key that is no token. → [B, H, M, E]; with scoring also the scores [B, G, P] of `window_scores`.
        """
        if query.shape[2] == 1 and visible is None and sinks is None and scoring is None and self._is_plain(key):
            return _dense_attention(query, key, value, None, False, self._scale(query))
        kernel = self.choose(query, key, visible, sinks)
        whole = key
        if visible is None and query.shape[2] == 1 and self._slides(key.shape[2]):
            key, value = (states[:, :, -self.sliding_window :] for states in (key, value))  # type: ignore[operator]
        visible = self._needed(query.shape[2], key.shape[2], visible, query.device)
        if kernel == "sdpa":
            out = self._sdpa(query, key, value, visible)
        elif kernel == "flex":
            out = self._flex(query, key, value, visible, sinks)
        else:
            out = self._eager(query, key, value, visible, sinks)
        if scoring is None:
            return out
        at, valid = (None, None) if visible is None else (visible.key_positions, visible.key_valid)
        last = query[:, :, -scoring.window :]
        return out, self.scores(last, whole, scoring, valid=valid, positions=at, sinks=sinks)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        scoring: Scoring,
        *,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        sinks: Tensor | None = None,
        mass: bool = False,
    ) -> Any:
        """`window_scores` of the last queries [B, H, W, D] under this module's scale, sliding window and soft-cap, or
        with mass both results of `window_scores_and_mass`. valid and positions may differ by KV head: [B, G, N]."""
        positions = positions if self.sliding_window is not None else None
        if any(marks is not None and marks.dim() == 3 for marks in (valid, positions)):
            groups, repeats, parts = key.shape[1], query.shape[1] // key.shape[1], []
            for group in range(groups):
                own = slice(group * repeats, (group + 1) * repeats)
                made = self.scores(
                    query[:, own],
                    key[:, group : group + 1],
                    scoring,
                    valid=_of_head(valid, group, groups),
                    positions=_of_head(positions, group, groups),
                    sinks=None if sinks is None else sinks[own],
                    mass=mass,
                )
                parts.append(made if mass else (made,))
            joined = tuple(torch.cat(part, 1) for part in zip(*parts))
            return joined if mass else joined[0]
        op: Any = window_scores_and_mass if mass else window_scores
        pooled, mine = (scoring.kernel_size, scoring.pooling), (self.sliding_window, self.softcap)
        return op(query, key, *pooled, self.scale, valid, positions, *mine, sinks)

    def choose(
        self, query: Tensor, key: Tensor, visible: Visibility | None = None, sinks: Tensor | None = None
    ) -> Literal["flex", "sdpa", "eager"]:
        """The kernel that will run. `"auto"` goes by this table; `bench/attention.py` measures it, on CPU so far:

        ================================  ==================  =====
        what is asked for                 CPU                 CUDA
        ================================  ==================  =====
        no mask beyond causal, decode     sdpa                sdpa
        padding or gaps                   sdpa                flex
        sliding window                    sdpa                flex
        soft-cap                          eager               flex
        sinks                             eager               flex
        ================================  ==================  =====
        """
        if sinks is not None and (self.kernel == "sdpa" or (self.kernel == "flex" and not query.is_cuda)):
            where = "" if self.kernel == "sdpa" else f" on {query.device.type}"
            raise UnsupportedError(
                f"kernel={self.kernel!r} has no sinks{where}; give kernel='auto' or 'eager', or sinks=None"
            )
        masked = visible is not None or self._slides(key.shape[2])
        chosen = self._kernel(query.is_cuda, masked, sinks is not None, query.shape[2])
        return "eager" if chosen == "flex" and isinstance(visible, SettledMask) else chosen

    def _kernel(self, cuda: bool, masked: bool, sinks: bool, queries: int) -> Literal["flex", "sdpa", "eager"]:
        if self.kernel != "auto":
            return self.kernel
        featured = self.softcap is not None or sinks
        if not cuda:
            return "eager" if featured else "sdpa"
        return "flex" if featured or (masked and queries > 1) else "sdpa"

    def prepare(self, visible: Visibility, queries: Tensor) -> None:
        """Builds the mask that attention of these queries [B, M, ...] under `visible` will need, so that it is made
        once for many layers and outside their graphs."""
        if self._kernel(queries.is_cuda, True, False, queries.shape[1]) == "flex":
            visible.block_mask(self.sliding_window)
        else:
            visible.dense(self.sliding_window)

    @functools.cached_property
    def unwindowed(self) -> FlexASLAttention:
        """The same without its sliding window, for keys or a mask that have been cut to it."""
        return FlexASLAttention(scale=self.scale, softcap=self.softcap, kernel=self.kernel)

    def extra_repr(self) -> str:
        settings = {"scale": self.scale, "sliding_window": self.sliding_window, "softcap": self.softcap}
        given = [f"{name}={value}" for name, value in settings.items() if value is not None]
        return ", ".join([*given, f"kernel={self.kernel!r}"])

    def _scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _slides(self, keys: int) -> bool:
        return self.sliding_window is not None and self.sliding_window < keys

    def _is_plain(self, key: Tensor) -> bool:
        """Whether sdpa, without a mask, gives a new token all that is asked for; what `choose` says, in a few steps."""
        return self.kernel in ("auto", "sdpa") and self.softcap is None and not self._slides(key.shape[2])

    def _needed(self, queries: int, keys: int, visible: Visibility | None, device: torch.device) -> Visibility | None:
        """None where causal order, or a single query, says it all."""
        if visible is None and (queries not in (1, keys) or self._slides(keys)):
            return Visibility.last(queries, keys, device)
        return visible

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        if visible is None:
            return _dense_attention(query, key, value, None, queries > 1, self._scale(query))
        most = _at_once(queries, MASK, query.shape[0] * keys)
        prompt = queries == keys and (self._slides(keys) or queries > PROMPT)
        if torch.compiler.is_compiling() or (queries <= most and not prompt):
            mask = visible.dense(self.sliding_window)
            return _dense_attention(query, key, value, mask, False, self._scale(query))
        out = [
            _dense_attention(
                query[:, :, some],
                key[:, :, seen],
                value[:, :, seen],
                visible.tile(some, seen, self.sliding_window),
                False,
                self._scale(query),
            )
            for some, seen in self._tiles(queries, keys, min(most, PROMPT))
        ]
        return torch.cat(out, 2)

    def _flex(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None, sinks: Tensor | None
    ) -> Tensor:
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
        if visible is None:
            visible = Visibility.last(queries, keys, query.device)
        blocks = visible.block_mask(self.sliding_window, heads)
        capped = (
            None
            if self.softcap is None
            else _capped(torch.tensor(self.softcap, dtype=torch.float32, device=query.device))
        )
        if query.is_cuda:
            run = flex_attention if torch.compiler.is_compiling() else _compiled_flex(None)
        else:
            # torch 2.13 on CPU: graphs for any length often fail to build, and few keys give wrong results.
            if keys < BLOCK:
                raise UnsupportedError(
                    f"kernel='flex' is wrong on {query.device.type} for fewer than {BLOCK} keys, here {keys}; "
                    "give kernel='auto'"
                )
            run = _compiled_flex((query.shape, key.shape, value.shape))
        settings = {"score_mod": capped, "block_mask": blocks, "scale": self._scale(query), "enable_gqa": True}
        if sinks is None:
            return run(query, key, value, **settings)
        out, logsumexp = run(query, key, value, **settings, return_lse=True)
        return out * (logsumexp - sinks[:, None]).sigmoid()[..., None].to(out.dtype)

    def _eager(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility | None, sinks: Tensor | None
    ) -> Tensor:
        """The reference: logits and softmax in float32 (float64 for float64), in tiles of queries."""
        batch, heads, queries, dim = query.shape
        groups, keys = key.shape[1], key.shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        narrow = key.dtype != wide
        if narrow and not (queries == 1 and key.is_cpu):
            key, value, narrow = key.to(wide), value.to(wide), False
        plain = visible is None
        if plain and queries > 1:
            visible = Visibility.last(queries, keys, query.device)
        scale = self._scale(query) / (self.softcap or 1.0)
        out = []
        for some, seen in self._tiles(queries, keys, min(QUERIES, _at_once(queries, TILE, batch * heads * keys))):
            scaled = (query[:, :, some].to(wide) * scale).reshape(batch, groups, -1, dim)
            logits = _products(scaled, key[:, :, seen]) if narrow else scaled @ key[:, :, seen].transpose(-1, -2)
            logits = logits.view(batch, heads, -1, logits.shape[-1])
            if self.softcap is not None:
                logits = logits.tanh() * self.softcap if logits.requires_grad else logits.tanh_().mul_(self.softcap)
            if visible is not None:
                # In plain causal order only the last keys can be in the future of any query of the tile.
                masked = slice(seen.stop - logits.shape[2], seen.stop) if plain and not self._slides(keys) else seen
                allowed = visible.tile(some, masked, self.sliding_window)
                if allowed.shape[1] > 1:
                    allowed = allowed.repeat_interleave(heads // groups, 1)
                logits[..., masked.start - seen.start :].masked_fill_(~allowed, float("-inf"))
            weights = logits.softmax(-1)
            if sinks is not None:
                excess = logits.logsumexp(-1) - sinks.to(wide)[:, None]
                weights = weights * excess.sigmoid()[..., None]
            weights = weights.view(batch, groups, -1, logits.shape[-1])
            mixed = _mixtures(weights, value[:, :, seen]) if narrow else weights @ value[:, :, seen]
            out.append(mixed.view(batch, heads, -1, value.shape[-1]).to(query.dtype))
        return torch.cat(out, 2)

    def _tiles(self, queries: int, keys: int, most: int) -> list[tuple[slice, slice]]:
        """At most so many queries at a time, each with the keys that they can see by order and sliding window."""
        if torch.compiler.is_compiling() or queries == 1:
            return [(slice(0, queries), slice(0, keys))]
        reach = keys
        if self.sliding_window is not None and queries == keys:
            # Slots are no further apart than their positions. Where cached keys come first they may be, after a crop.
            reach = self.sliding_window - 1
            most = min(most, max(BLOCK, self.sliding_window // 2))
        tiles = []
        for first in range(0, queries, most):
            last = min(first + most, queries)
            before = keys - queries
            tiles.append((slice(first, last), slice(max(0, before + first - reach), before + last)))
        return tiles


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` in its fastest form; mask is None or bool [B, 1 or G, M, N], and causal, without a
    mask and with M = N, lets each query see the keys up to its own."""
    batch, heads, count, dim = query.shape
    groups = key.shape[1]
    repeats = heads // groups
    if count == 1:
        # A KV head's queries become rows of one attention: 7 times faster than enable_gqa in bfloat16 on CPU.
        packed = query.reshape(batch, groups, repeats, dim)
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, 1, value.shape[-1])
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(repeats, 1)
    if mask is not None and query.is_cuda and repeats > 1:
        # With a mask and enable_gqa, CUDA has only the kernel that materialises all M x N weights.
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # Where a compiler knows lengths as symbols, these are symbols too, which SDPA does not take: `if` decides them.
    causal = True if causal else False  # noqa: SIM210
    grouped = True if key.shape[1] != heads else False  # noqa: SIM210
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _of_head(marks: Tensor | None, group: int, groups: int) -> Tensor | None:
    """Those [B, N] of one of the KV heads, by marks [B, N], or [B, G, N] of these heads or of fewer."""
    return marks if marks is None or marks.dim() == 2 else marks[:, group * marks.shape[1] // groups]


def _products(rows: Tensor, key: Tensor) -> Tensor:
    """rows [B, G, R, D] by narrower keys [B, G, N, D] → [B, G, R, N]; some keys are widened at a time, which stays in a
    CPU's cache."""
    return torch.cat([rows @ part.to(rows.dtype).transpose(-1, -2) for part in key.split(_few(key), 2)], -1)


def _mixtures(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, G, R, N] by narrower values [B, G, N, D] → [B, G, R, D], likewise."""
    few = _few(value)
    parts = zip(weights.split(few, -1), value.split(few, 2), strict=True)
    return sum((some @ part.to(weights.dtype) for some, part in parts), start=weights.new_zeros(()))


def _at_once(queries: int, limit: int, pairs: int) -> int:
    """Queries to take at once, each with so many pairs, under a limit of pairs; a graph takes all, as comparing sizes
    would bind it to them."""
    return queries if queries == 1 or torch.compiler.is_compiling() else max(1, limit // pairs)


def _few(states: Tensor) -> int:
    batch, groups, _, dim = states.shape
    return states.shape[2] if torch.compiler.is_compiling() else max(64, WIDENED // (batch * groups * dim))


def _capped(softcap: Tensor) -> Any:
    """A soft-cap for `flex_attention`; as a tensor, because on CPU a captured float does not compile for all
    lengths."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.lru_cache(maxsize=64)
def _compiled_flex(shapes: tuple[torch.Size, ...] | None) -> Any:
    """`flex_attention` compiled for any lengths, or for these shapes alone. fullgraph: past the recompile limit a
    compile without it runs the uncompiled function in silence, which reads no block lists."""
    own = types.FunctionType(flex_attention.__code__.replace(), flex_attention.__globals__, "flex_attention")
    own.__kwdefaults__, own.__defaults__ = flex_attention.__kwdefaults__, flex_attention.__defaults__
    return torch.compile(own, fullgraph=True, dynamic=shapes is None)
