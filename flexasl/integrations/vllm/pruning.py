"""The adapter of one model in a worker: wraps the forwards of its layers and of their attention, and decides for each
step of vLLM which rows are prompts to prune."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexasl.attention import FlexASLAttention
from flexasl.errors import UnsupportedError
from flexasl.integrations.vllm.methods import Methods
from flexasl.integrations.vllm.reporting import Reporting
from flexasl.integrations.vllm.requests import Request, Requests
from flexasl.integrations.vllm.sequences import Blocks, Sequences, remembering
from flexasl.integrations.vllm.step import Group, Step, report_of
from flexasl.report import Report, RowReport
from flexasl.selectors.base import within_budget

TABLES = ("positions", "position_ids", "position_embeddings")
"""Arguments of decoder layers, by vLLM's and by transformers' names, that have an entry for each row."""
LAST = 1000
"""Reports that are kept."""


class Pruning:
    """What `FlexASL` models have besides vLLM's."""

    def __init__(self, model: nn.Module, methods: Methods, vllm_config: Any, tokenizer: Any) -> None:
        self.methods = methods
        self.tokenizer = tokenizer
        self.attention = attention_of(model, vllm_config)
        self.modules = [FlexASLAttention(scale=own.impl.scale) for own in self.attention]
        self.requests = Requests(methods, vllm_config.scheduler_config.max_num_seqs)
        self.reports: OrderedDict[str, Report] = OrderedDict()
        """By request, of the last prompts."""
        self._reporting = Reporting(methods.settings.reports)
        self._step: Step | None = None
        self._due = False
        self._names: Callable[[], Sequence[str]] = list
        first = self.attention[0]
        numbers = first.num_kv_heads * (first.head_size + first.head_size_v)
        self._entry_bytes = numbers * first.kv_cache_torch_dtype.itemsize
        self._wrap(layers_of(model, len(self.attention)))

    def expect(self, scheduled: Any, names: Callable[[], Sequence[str]]) -> None:
        """Before a step: what vLLM's scheduler says of it, and what will tell the names of its requests in the order of
        their rows. What runs without it, vLLM's own trials, is left alone."""
        self.requests.update(scheduled)
        self._names, self._due = names, scheduled.total_num_scheduled_tokens > 0

    @contextlib.contextmanager
    def running(self, context: Any) -> Iterator[None]:
        """Around the model's forward, in vLLM's forward context."""
        due, self._due = self._due, False
        metadata = context.attn_metadata
        if not due or not isinstance(metadata, dict) or not metadata:
            yield
            return
        blocks = Blocks(metadata[self.attention[0].layer_name])
        starts = blocks.common.query_start_loc_cpu.tolist()
        requests = self.requests.named(self._names())
        counts = [stop - start for start, stop in pairwise(starts)][: len(requests)]
        _refuse_parts(requests, counts)
        read = [at for at, request in enumerate(requests) if request.computed == 0]
        for at in read:
            self.requests.dropped[requests[at].place] = 0
        pruned = [at for at in read if requests[at].method.prunes(requests[at].tokens)]
        if pruned:
            self._step = self._make_step(context, blocks, requests, starts, counts, pruned)
            context.skip_compiled = True
        else:
            self._move_entries(context, blocks, requests, counts)
        try:
            yield
            self._add_whole([requests[at] for at in read if at not in pruned])
        finally:
            self._step = None

    def _make_step(
        self,
        context: Any,
        blocks: Blocks,
        requests: list[Request],
        starts: list[int],
        counts: list[int],
        pruned: list[int],
    ) -> Step:
        """Each pruned prompt's rows first, by method; behind them all others, those that follow such a prompt among
        them, in vLLM's order."""
        by_method: defaultdict[int, list[int]] = defaultdict(list)
        for at in pruned:
            by_method[id(requests[at].method)].append(at)
        how: dict[str, Any] = {"tokenizer": self.tokenizer, "reduce": self._reduce, "device": blocks.device}
        groups = [Group.of([requests[at] for at in own], own, **how) for own in by_method.values()]
        prompts = {at: requests[at].tokens for at in pruned}
        firsts = [prompts.get(at, 0) for at in range(len(requests))]
        left = [at for at, count in enumerate(counts) if count > firsts[at]]
        spans = [(starts[at], starts[at] + prompts[at]) for own in by_method.values() for at in own]
        spans += [(starts[at] + firsts[at], starts[at] + counts[at]) for at in left]
        rows = torch.cat([torch.arange(*span, dtype=torch.int64, device="cpu") for span in spans]).to(blocks.device)
        totals = [requests[at].computed + counts[at] for at in left]
        sequences = Sequences(blocks, left, [counts[at] - firsts[at] for at in left], totals) if left else None
        context.attn_metadata, context.slot_mapping = dict(context.attn_metadata), dict(context.slot_mapping)
        tables = context.attn_metadata, context.slot_mapping
        places = torch.tensor([requests[at].place for at in left], dtype=torch.int64, device="cpu")
        return Step(groups, sequences, places, rows, blocks, self.requests.dropped, tables)

    def _move_entries(self, context: Any, blocks: Blocks, requests: list[Request], counts: list[int]) -> None:
        """A step without prompts to prune: metadata of each layer by what its cache holds of the requests."""
        lost = self.requests.lost(requests)
        if not bool(lost.any()):
            return
        totals = [request.computed + count for request, count in zip(requests, counts)]
        sequences = Sequences(blocks, range(len(requests)), counts, totals)
        metadata, slots = dict(context.attn_metadata), dict(context.slot_mapping)
        for attention, of_layer in zip(self.attention, lost.T.tolist()):
            name = attention.layer_name
            made, own = sequences.at(of_layer)
            padding = slots[name].shape[0] - own.shape[0]
            metadata[name], slots[name] = made, F.pad(own, (0, padding), value=-1) if padding else own
        context.attn_metadata, context.slot_mapping = metadata, slots

    def _wrap(self, layers: Sequence[Any]) -> None:
        for index, (layer, attention) in enumerate(zip(layers, self.attention)):
            attention.attn_backend = remembering(attention.attn_backend)
            attention.forward = functools.partial(self._attend, index, attention, attention.forward)
            names = list(inspect.signature(layer.forward).parameters)
            layer.forward = functools.partial(self._run_layer, index, names, layer.forward)

    def _run_layer(
        self, index: int, names: Sequence[str], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of a decoder layer's forward, which it runs on the rows that are left."""
        step = self._step
        if step is None:
            return forward(*args, **kwargs)
        given = dict(zip(names, args)) | kwargs
        hidden = given["hidden_states"]
        dim = hidden.dim() - 2
        if index == 0:
            step.scheduled = hidden.shape[dim]
            for name in ("hidden_states", "residual"):
                if given.get(name) is not None:
                    given[name] = given[name].index_select(dim, step.rows)
        for name in TABLES:
            states = given.get(name)
            if states is not None:
                table = functools.partial(step.table, dim=dim)
                given[name] = tuple(map(table, states)) if isinstance(states, tuple) else table(states)
        output = forward(**given)
        keep = step.advance()
        if keep is not None:
            output = _each(output, lambda states: states.index_select(dim, keep))
        if index + 1 < len(self.attention):
            return output
        made = _each(output, lambda states: _spread(states, dim, step.rows, step.scheduled))
        for request, report in step.close(self._entry_bytes):
            self._add(request, report)
        return made

    def _attend(
        self,
        index: int,
        attention: Any,
        forward: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In the place of vLLM's `Attention.forward`."""
        step = self._step
        if step is None:
            return forward(query, key, value, *args, **kwargs)
        return step.attend(index, attention, self.modules[index], forward, query, key, value)

    def _reduce(self, scores: Tensor, highest: bool) -> Tensor:
        """Token scores of all ranks' heads."""
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        if group.world_size == 1:
            return scores
        if not highest:
            made: Tensor = group.all_reduce(scores.contiguous())
            return made
        # vLLM's own has sums only.
        gathered = group.all_gather(scores.contiguous()[None], dim=0)
        return gathered.amax(0)

    def _add_whole(self, requests: Sequence[Request]) -> None:
        """Reports on prompts that went through whole."""
        for request in requests:
            config, tokens = request.method.config, request.tokens
            why = within_budget(config, tokens) if request.method.policy.prunes_tokens else "nothing is pruned"
            layers = request.method.num_layers
            row = RowReport(
                prompt_tokens=tokens,
                kept_tokens=tokens,
                selected_layer=None,
                reason=why,
                kept_positions=range(tokens),  # type: ignore[arg-type]
                layer_tokens=(tokens,) * layers,
            )
            self._add(request, report_of(request, row, [tokens] * layers, 0.0, self._entry_bytes))

    def _add(self, request: Request, report: Report) -> None:
        self.reports[request.name] = report
        self.reports.move_to_end(request.name)
        while len(self.reports) > LAST:
            self.reports.popitem(last=False)
        self._reporting.add(request.name, report)


def _refuse_parts(requests: Sequence[Request], counts: Sequence[int]) -> None:
    """Raises `UnsupportedError` where a step has a part of a prompt, which the settings at the start exclude."""
    for request, count in zip(requests, counts):
        if request.computed + count < request.tokens:
            raise UnsupportedError(
                f"a step has {count} of {request.tokens} tokens of request {request.name}, and a prompt is ranked as a "
                "whole; give --no-enable-chunked-prefill"
            )


def attention_of(model: nn.Module, vllm_config: Any) -> list[Any]:
    """The attention of each decoder layer; raises `UnsupportedError` for a kind that cannot be pruned."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    kind, known = type(model).__name__, vllm_config.compilation_config.static_forward_context
    by_layer: dict[int, Any] = {}
    for name, module in known.items():
        if not isinstance(module, nn.Module) or not hasattr(module, "get_kv_cache_spec"):
            continue  # experts, for instance
        what = None
        if type(module) is not Attention:
            what = f"a {type(module).__name__}"
        elif module.sliding_window is not None:
            what = f"a sliding window of {module.sliding_window} tokens, which would count cache entries"
        elif getattr(module.impl, "alibi_slopes", None) is not None:
            what = "a bias by distance (ALiBi)"
        elif getattr(module.impl, "logits_soft_cap", None) or module.has_sink:
            what = "a soft-cap or sinks"
        elif module.attn_backend.forward_includes_kv_cache_update:
            own = module.attn_backend.get_name()
            what = f"the back end {own}, which stores entries by itself (choose another with --attention-backend)"
        if what is not None:
            raise UnsupportedError(f"{kind} has {what} in layer {name}; it cannot be pruned inside vLLM")
        by_layer[extract_layer_index(name)] = module
    if sorted(by_layer) != list(range(len(by_layer))) or not by_layer:
        raise UnsupportedError(f"{kind} has attention in layers {sorted(by_layer)}; it cannot be pruned inside vLLM")
    return [by_layer[index] for index in range(len(by_layer))]


def layers_of(model: nn.Module, count: int) -> list[Any]:
    """The decoder layers; raises `UnsupportedError` where they do not take what is known."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if "hidden_states" in inspect.signature(module[0].forward).parameters:
            return list(module)
    raise UnsupportedError(f"{type(model).__name__} has no list of {count} decoder layers that take hidden_states")


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(change, output)) if isinstance(output, tuple) else change(output)


def _spread(states: Tensor, dim: int, rows: Tensor, count: int) -> Tensor:
    """States of some rows in the place of all that were scheduled: NaN where a token was dropped, which nothing
    reads."""
    shape = list(states.shape)
    shape[dim] = count
    return states.new_full(shape, float("nan")).index_copy_(dim, rows, states)
