"""The decision alone, from recorded queries and keys or from recorded scores: for tests, calibration and the curious.

Shapes: L layers, B batch, H query heads, G KV heads, N prompt positions, D head dim, W window, P_b prefix tokens of a
row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexasl.asking import Asked
from flexasl.attention import FlexASLAttention
from flexasl.checks import article, ascending, instance, renames
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.ops import token_ranks
from flexasl.policies import Policy, choose
from flexasl.policies.contract import resolved
from flexasl.prefill import Entries, Prefill
from flexasl.rows import left_padded_lengths
from flexasl.selectors import LayerSelector, Selector, Trace
from flexasl.selectors.staged import StagedSelector


@dataclass
class Replay:
    """Every decision about one row, as `replay` returns it; also readable as a mapping, `row["selected"]`.

    Layers count from 0, ranks from 1.
    """

    scored_layers: list[int] = field(default_factory=list)
    """Layers whose ranking the rule could use: all up to the selection; with a fixed layer, that one."""
    scores: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float32, device="cpu"))
    """[scored layers, P_b] float32, pooled and summed over heads; 0 for tokens dropped before."""
    ranks: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32, device="cpu"))
    """[scored layers, P_b] int32."""
    eval_layers: list[int] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    variance_ratio: list[float] = field(default_factory=list)
    union_size: list[int] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)
    """Under the rule of look-ups, the highest score of a far token at each of `eval_layers`."""
    selections: list[tuple[int, int]] = field(default_factory=list)
    """Layer of every selection, loose ones too, and the tokens that it kept."""
    selected_layer: int | None = None
    """The last of these layers."""
    selected: Tensor | None = None
    """[kept] int64, ascending prompt positions, window included; None where no layer was selected."""
    kept_indices: list[list[Tensor]] = field(default_factory=list)
    """Per layer and KV head, int64 positions in that layer's own input: with `kv_budget` by descending score, then the
    window; else ascending."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@torch.no_grad()
def replay(
    query: Tensor,
    key: Tensor,
    config: ASLConfig | None = None,
    policy: str | Policy = "asl",
    *,
    attention_mask: Tensor | None = None,
    attention: FlexASLAttention | Sequence[FlexASLAttention | None] | None = None,
    sinks: Tensor | None = None,
    question: Sequence[Tensor | None] | None = None,
    ranking_layers: Sequence[int] | None = None,
) -> list[Replay]:
    """Runs the rule over recorded states, and returns its decisions.

    The rule also runs where the prompt is too short to lose a token, and every layer up to the selection is scored.
    Settings that have no effect under the policy are passed over, so that one config can be replayed under several
    policies.

    Args:
        query: Queries [L, B, H, N, D] of all N prompt tokens at every layer, after rotary, of a float dtype.
        key: Keys [L, B, G, N, D], likewise.
        config: The settings. None: `ASLConfig()`.
        policy: A policy's name, alone or with settings, or an instance.
        attention_mask: [B, N], 0 at padding, which must be on the left. None: there is no padding.
        attention: The attention of the layers, with its scale, softcap or ALiBi, or that of each layer, such as
            `patch.attention`. None: `FlexASLAttention()`.
        sinks: Logits [L, H] of a key that is not a token, at every layer. None: no such key.
        question: Of each row, the padded positions [W] int64, ascending, of the tokens of its question, or None: the
            window ranks.
        ranking_layers: Layers whose ranks count, ascending. None: all. Where the other layers of a hybrid have no
            states, give zeros.

    Returns:
        A `Replay` for each row.

    Raises:
        FlexASLError: The tensors do not belong together.
        ConfigError: The policy cannot run with the settings.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> query = torch.randn(12, 1, 4, 100, 16, generator=generator)
        >>> key = torch.randn(12, 1, 2, 100, 16, generator=generator)
        >>> row = flexasl.replay(query, key, flexasl.ASLConfig(select_tokens=48))[0]
        >>> len(row.selected)  # after the layer row.selected_layer
        48
    """
    _check_states(query, key, attention_mask, sinks)
    modules = _modules(attention, len(query))
    layers, batch, _, tokens, _ = query.shape
    chosen, settings = choose(policy, config)
    rule = resolved(chosen, chosen.counting(settings), layers, ranking_layers).replace(propagate="gather")
    lengths = [tokens] * batch if attention_mask is None else left_padded_lengths(attention_mask)
    scores: dict[int, Tensor] = {}
    totals: list[dict[int, Tensor]] = [{} for _ in range(batch)]
    prefill = Prefill(
        chosen,
        rule,
        layers,
        lengths,
        tokens=tokens,
        device=query.device,
        ranking_layers=ranking_layers,
        observer=lambda layer, seen: scores.update({layer: seen}),
        question=question,
    )
    rows = [Replay() for _ in range(batch)]
    for layer in range(layers):
        queries, keys = (_pack(recorded[layer], prefill) for recorded in (query, key))
        queries = queries[:, :, prefill.rows.queries(rule.window)]
        entries = prefill.observe(layer, queries, keys, modules[layer], None if sinks is None else sinks[layer])
        for row, result in enumerate(rows):
            if row in prefill.selector.traces and layer in prefill.scored and _counts(prefill, row, layer):
                result.scored_layers.append(layer)
                positions = prefill.rows.positions[prefill.rows.of(row)] - (tokens - lengths[row])
                own = prefill.over_heads(scores[layer])[row]
                totals[row][layer] = _spread(own, positions[: -rule.window], lengths[row] - rule.window)
            result.kept_indices.append(_kept_indices(prefill, row, scores.get(layer), entries, key.shape[2]))
        prefill.advance()
    for row, result in enumerate(rows):
        _finish(result, prefill.selector.traces.get(row), totals[row])
        made = prefill.selections.get(row)
        if made:
            result.selections = [(one.layer, one.count) for one in made]
            result.selected_layer, result.selected = made[-1].layer, prefill.kept_positions(row)
    return rows


@renames(voters="ranking_layers")
@torch.no_grad()
def replay_scores(
    scores: Tensor,
    config: ASLConfig | None = None,
    *,
    ranking_layers: Sequence[int] | None = None,
    question: Sequence[int] | None = None,
) -> Replay:
    """Runs the rule over recorded token scores of one prompt, as a read without pruning gives them.

    `scored_layers` of the result are those that the decision rests on. `kept_indices` is empty, because what a cache
    keeps rests on each head's scores.

    Args:
        scores: [L, P] float32, the scores of the P tokens before the window at every layer, pooled and summed over
            heads.
        config: The settings. None: `ASLConfig()`.
        ranking_layers: Layers whose ranks count, ascending. None: all.
        question: Positions, ascending, of the tokens of the question. None: the window ranked.

    Raises:
        FlexASLError: `scores` or `question` has another shape or type.
        ConfigError: The settings do not fit so many layers.
    """
    if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.is_floating_point() or not scores.numel():
        given = f"{list(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else article(scores)
        raise FlexASLError(f"scores is {given}; give floats [layer, token]")
    layers, prefix = scores.shape
    rule = instance("config", config or ASLConfig(), ASLConfig, "an ASLConfig or None").resolve(layers, ranking_layers)
    if question is not None:
        question = ascending("question: position", question, 0, prefix + rule.window - 1)
    seen: dict[int, Tensor] = {}
    result, selector = decided(scores, rule, ranking_layers, question, seen)
    _finish(result, selector.traces[0], {layer: _spread(scores[layer][at], at, prefix) for layer, at in seen.items()})
    return result


def decided(
    scores: Tensor,
    rule: ASLConfig,
    ranking_layers: Sequence[int] | None,
    question: Sequence[int] | None,
    seen: dict[int, Tensor] | None = None,
) -> tuple[Replay, Any]:
    """The selections that a resolved rule makes from scores [L, P], and the selector that made them; seen takes, by
    layer, the positions of the tokens that it ranked."""
    tokens = scores.shape[1] + rule.window
    kind = StagedSelector if rule.rule == "lookup" else LayerSelector
    budget = rule.token_budget(tokens)
    asked = Asked(question, tokens, budget, rule.window, contrast=bool(rule.contrast)) if question else None
    where: dict[str, Any] = {"ranking_layers": ranking_layers, "device": scores.device}
    if rule.rule == "lookup":
        where["asked"] = [asked is not None and bool(asked.ranking)]
    selector = kind(rule, [tokens], **where)
    result = Replay()
    left = torch.arange(tokens, dtype=torch.int64, device=scores.device)
    for layer in range(len(scores)):
        if not selector.needs(layer):
            continue
        ranked = left[: -rule.window]
        own = scores[layer][ranked]
        if seen is not None:
            seen[layer] = ranked
        if asked is not None:
            always = torch.zeros(tokens, dtype=torch.bool, device=own.device)
            always[_always(asked, selector, tokens, len(left), budget)] = True
            own = own.masked_fill(always[ranked], float("inf"))
        selector.observe(layer, own[None])
        for made in selector.select(layer):
            left = left[made.keep[-len(left) :]]
            result.selected_layer, result.selected = layer, left
            result.selections.append((layer, made.count))
        result.scored_layers.append(layer)
    return result, selector


def _always(asked: Asked, selector: Selector, tokens: int, left: int, budget: int) -> list[int]:
    """Positions that the next selection keeps whatever they score, as `Prefill` has them."""
    limit, another = min(budget, tokens), False
    if selector.budgets is not None and selector.stages_left is not None:
        last = len(selector.budgets[0]) - 1
        stage = min(int(selector.stages_left), last)
        limit, another = min(selector.budgets[0][stage], tokens), stage < last
    return asked.kept(limit if left == tokens else min(limit, budget), another)


def _modules(attention: Any, layers: int) -> list[FlexASLAttention]:
    """The attention of each layer; that of a layer without, which has no states to rank by, is never asked."""
    if attention is None or isinstance(attention, FlexASLAttention):
        return [FlexASLAttention() if attention is None else attention] * layers
    given = list(attention) if isinstance(attention, (list, tuple)) else [attention]
    if len(given) != layers or not all(one is None or isinstance(one, FlexASLAttention) for one in given):
        what = f"holds {len(given)} things" if isinstance(attention, (list, tuple)) else f"is {article(attention)}"
        raise FlexASLError(f"attention {what}; give a FlexASLAttention, one for each of the {layers} layers, or None")
    return [one or FlexASLAttention() for one in given]


def _check_states(query: Tensor, key: Tensor, attention_mask: Tensor | None, sinks: Tensor | None) -> None:
    """Raises FlexASLError where states [L, B, H or G, N, D], mask [B, N] and sinks [L, H] do not belong together."""
    for name, states in (("query", query), ("key", key)):
        if not isinstance(states, Tensor) or not states.is_floating_point():
            given = f"of {states.dtype}" if isinstance(states, Tensor) else article(states)
            raise FlexASLError(f"{name} is {given}; give a tensor of floats")
    if query.dim() != 5 or key.dim() != 5 or query.shape[:2] != key.shape[:2] or query.shape[3:] != key.shape[3:]:
        raise FlexASLError(
            f"query {list(query.shape)} and key {list(key.shape)} do not match; "
            "give query [layer, batch, head, token, dim] and key [layer, batch, KV head, token, dim]"
        )
    if not query.numel() or not key.numel():
        raise FlexASLError(f"query {list(query.shape)} and key {list(key.shape)} are empty; give states of some tokens")
    heads, groups = query.shape[2], key.shape[2]
    if heads % groups:
        raise FlexASLError(f"query has {heads} heads and key has {groups}; give a multiple of the KV heads")
    if (query.dtype, query.device) != (key.dtype, key.device):
        raise FlexASLError(
            f"query is {query.dtype} on {query.device}, key {key.dtype} on {key.device}; give both alike"
        )
    if sinks is not None:
        shape = list(instance("sinks", sinks, Tensor, "a tensor [layer, head] or None").shape)
        if shape != [query.shape[0], heads]:
            raise FlexASLError(f"sinks is {shape}; give [layer, head], here {[query.shape[0], heads]}")
    if attention_mask is None:
        return
    mask = instance("attention_mask", attention_mask, Tensor, "a tensor [batch, token] or None")
    wanted = [query.shape[1], query.shape[3]]
    if list(mask.shape) != wanted:
        raise FlexASLError(f"attention_mask is {list(mask.shape)}; give [batch, token], here {wanted}")


def _pack(states: Tensor, prefill: Prefill) -> Tensor:
    """Recorded states [B, H, N, D] of the current layer's tokens: [1, H, T, D]."""
    return states.transpose(0, 1).flatten(1, 2)[:, prefill.rows.flat(prefill.tokens)][None]


def _counts(prefill: Prefill, row: int, layer: int) -> bool:
    """Whether the rule could use the layer's ranking, which was taken."""
    made, rule = prefill.selections.get(row), prefill.config
    if rule.rule == "variance" and rule.min_layer == rule.max_layer:
        return layer == rule.max_layer
    assert rule.max_layer is not None
    return layer <= (made[-1].layer if made and row not in prefill.selector.rows else rule.max_layer)


def _kept_indices(
    prefill: Prefill, row: int, scores: Tensor | None, entries: Entries | None, groups: int
) -> list[Tensor]:
    start, length = prefill.rows.starts[row], prefill.rows.lengths[row]
    prefix = length - prefill.config.window
    heads = []
    for group in range(groups):
        if entries is None:
            kept = torch.arange(length, dtype=torch.int64, device=prefill.device)
        else:
            tokens, valid = entries
            kept = tokens[row, group]
            kept = (kept if valid is None else kept[valid[row, group]]) - start
        if prefill.config.kv_budget is not None and scores is not None and prefix > 0:
            best = scores[row, group, -prefix:]
            early = kept[kept < prefix]
            early = early[best[early].argsort(dim=-1, descending=True, stable=True)]
            kept = torch.cat([early, kept[len(early) :]])
        heads.append(kept)
    return heads


def _spread(scores: Tensor, positions: Tensor, prefix: int) -> Tensor:
    """Scores, at the right end, of the tokens at these positions, as [P_b], 0 for the others."""
    return scores.new_zeros(prefix).index_copy(0, positions, scores[len(scores) - len(positions) :])


def _finish(result: Replay, trace: Trace | None, scores: Mapping[int, Tensor]) -> None:
    """What the rule recorded of one row, from its token scores [P_b] by layer."""
    if trace is not None:
        result.eval_layers, result.variance = trace.eval_layers, trace.variance
        result.variance_ratio, result.union_size = trace.variance_ratio, trace.union_size
        result.lookup = trace.lookup
    if result.scored_layers:
        result.scores = torch.stack([scores[layer] for layer in result.scored_layers])
        result.ranks = token_ranks(result.scores)
