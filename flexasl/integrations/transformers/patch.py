"""A patched model: hooks that hand each forward pass to a `ForwardPass`, and what they refuse."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import defaultdict
from contextvars import ContextVar
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from flexasl.calibrated import CalibratedFor
from flexasl.compiling import compile_region, kind_of, require_compiler, run_layer
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError, UnsupportedError
from flexasl.forward_pass import ForwardPass, is_prompt, positions_read
from flexasl.integrations.base import SLACK, BasePatch, rows_of
from flexasl.integrations.inputs import padding_of_turn, refuse_training, restart
from flexasl.integrations.transformers.adapters import forgetting_rows, refuse_adapters
from flexasl.integrations.transformers.cache import Layer, adopt, new_layers
from flexasl.integrations.transformers.carrying import carry
from flexasl.integrations.transformers.checking import check_by_running
from flexasl.integrations.transformers.fingerprint import calibrated_for
from flexasl.integrations.transformers.generation import guard_generation
from flexasl.integrations.transformers.interface import PASS
from flexasl.integrations.transformers.likelihoods import refuse_likelihoods
from flexasl.integrations.transformers.media import (
    Given,
    in_order,
    layers_added_to,
    refuse_media,
    refuse_parts,
    with_images,
)
from flexasl.integrations.transformers.models import CACHES, NAME, decoder_of, find_stack, layers_of
from flexasl.integrations.transformers.own_config import OwnConfig
from flexasl.integrations.transformers.placement import input_device, over_ranks
from flexasl.integrations.transformers.states import RunningCache, StateLayer
from flexasl.layer_step import LayerStep
from flexasl.policies import Policy
from flexasl.profiles import Profile, find

OUTER = "flexasl_outer"
"""Keyword from model to decoder, which puts the `ForwardPass` there."""
GIVEN = "flexasl_given"
"""Keyword from a model that reads images to its decoder, with what it was given."""
RUNNING: ContextVar[weakref.ref[ForwardPass] | None] = ContextVar("flexasl_running", default=None)
"""The pass of a decoder that gives no keyword to its layers, as long as it runs."""
LONG = 2**20
"""Tokens of a prompt that all limits of caches are below."""
CHOSEN = "prev_topk_indices"
"""The keyword by which layers are given what an earlier one chose."""
REFUSED = {
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "layers after the selection see fewer tokens than those before",
    "output_router_logits": "layers after the selection route fewer tokens than those before",
    "labels": "dropped tokens have no logits",
}


class Patch(BasePatch):
    """A patched transformers model."""

    KEYWORD = PASS
    MASK = "attention_mask"
    TABLES = ("position_embeddings", "position_ids", "original_hidden_states", "per_layer_input", "attention_scaling")

    def __init__(
        self,
        model: Any,
        config: ASLConfig,
        policy: Policy,
        *,
        kernel: Any,
        compile: bool,
        foreign_hooks: str,
        profile: Profile | Literal[False] | None = None,
    ) -> None:
        """profile: the one to use; None: it is looked for; False: there is none."""
        stack = find_stack(model, kernel, compile)
        if compile:
            require_compiler(input_device(model))
        reduce = over_ranks(model)
        text = model.config.get_text_config(decoder=True)
        settings: dict[str, Any] = {"ranking_layers": stack.ranking_layers, "reduce": reduce}
        settings["lenders"] = stack.lenders
        settings["profile"] = profile
        settings["foreign_hooks"] = foreign_hooks
        self._stack = stack
        super().__init__(model, stack.layers, stack.attention, config, policy, **settings)
        self.ARGUMENTS = stack.layer_arguments
        self.compiled = compile
        self.slack = SLACK if compile else 0
        """Cache entries that room is made for at a time."""
        self._reads_media = model.config is not stack.decoder.config
        self._streams_first = hasattr(stack.decoder.config, "altup_num_inputs")
        self._in_order = in_order(model.config, len(stack.layers))
        self._arguments = _arguments(stack.decoder)
        self._outer_arguments = _arguments(model)
        self._path = next(name for name, module in model.named_modules() if module is stack.decoder).split(".")
        self._cache_name = next((name for name in CACHES[:2] if name in self._arguments), CACHES[0])
        replaced = [] if stack.own_attention is None else stack.own_attention.forwards(stack.layers)
        check = None if stack.tested else check_by_running(model, stack)
        # A user may set it on the whole model, whose configuration the decoder shares again in the end.
        self._implementations = [(config, config._attn_implementation) for config in (model.config, text)]
        if compile:
            self._compile(stack.layers, model.get_output_embeddings())
        self._named = "model" if model.config is stack.decoder.config else "model.get_decoder()"
        """Whose attention implementation a user would set to have the patched one again."""
        self._own = OwnConfig(stack.decoder, NAME)
        attributes = dict(vars(model))
        self._guarded = [*guard_generation(model), "set_attn_implementation"]
        model.set_attn_implementation = functools.partial(_set_attention, model)
        self._shadowed = {name: attributes[name] for name in self._guarded if name in attributes}
        self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(model.register_forward_pre_hook(_begin_pass, with_kwargs=True))
        self._handles.append(model.register_forward_hook(_end_pass, with_kwargs=True))
        self._handles += carry(
            stack.carriers, PASS, lambda kwargs: next(kwargs[name] for name in CACHES if name in kwargs)
        )
        for module, own in replaced:
            self.replace_forward(module, own)
        self.hook(stack.decoder)
        if check is not None:
            check(self)

    def _compile(self, layers: list[Any], head: Any) -> None:
        """Makes the forward of layers, of each kind by itself, and of the head compiled regions."""
        kinds: defaultdict[Any, Any] = defaultdict(lambda: defaultdict(lambda: compile_region(run_layer)))
        for layer, attention in zip(layers, self.attention, strict=True):
            assert attention is not None
            regions = kinds[kind_of(layer), attention.extra_repr()]
            self.replace_forward(layer, functools.partial(_run, regions, layer))
        self.replace_forward(head, functools.partial(_run_head, compile_region(run_layer), head))

    def _own_profile(self) -> Profile | None:
        if self._profile is None:  # it is looked for once
            self._profile = find(calibrated_for(self._model)) or False
        return super()._own_profile()

    def refuse_settings(self, config: ASLConfig) -> None:
        if config.propagate == "mask" and self._stack.stateful:
            raise ConfigError(
                "propagate='mask' does not go with a model whose layers keep states, which would read the tokens that "
                "are masked out; give propagate='gather'"
            )

        if config.kv_dtype is not None and any(self._stack.indexed):
            raise ConfigError(
                f"kv_dtype={config.kv_dtype!r} does not go with a model whose layers choose the keys that they attend "
                "to: keys of the indexer in eight bits choose others; leave kv_dtype out"
            )
        if self._stack.reusing:
            retention = self.policy.retention(config, len(self._layers))
            trims = any(retention.limit(layer, LONG) is not None for layer in range(len(self._layers)))
            if trims or self.policy.second_pass:
                what = "trims caches layer by layer" if trims else "reads tokens twice"
                raise ConfigError(
                    f"policy {self.policy.name!r} with these settings {what}, which does not go with a model some of "
                    "whose layers attend to the keys that an earlier layer chose; give 'asl' without kv_budget and "
                    "kv_top_p"
                )

    def refuse_calibrated(self, model: CalibratedFor) -> None:
        model.refuse_other(calibrated_for(self._model))

    def restore(self) -> None:
        self._own.put_back()
        for config, implementation in self._implementations:
            if config._attn_implementation == NAME:
                config._attn_implementation = implementation
        for name in self._guarded:
            delattr(self._model, name)
        vars(self._model).update(self._shadowed)

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the whole model's forward."""
        given = dict(zip(self._outer_arguments, args, strict=False)) | kwargs
        with forgetting_rows(model):
            inner: Any = model
            for name in self._path:  # quicker than get_decoder
                inner = getattr(inner, "_modules", {}).get(name)
            if inner is not self._stack.decoder:
                self._refuse_replaced("decoder and layers")
            _refuse_arguments(model, given)
            self.refuse_media(given)
        if self._reads_media and self._stack.no_media is None:
            return args, kwargs | {GIVEN: Given(model.config, given)}
        return None

    def _refuse_replaced(self, part: str) -> NoReturn:
        raise UnsupportedError(
            f"{part} of the patched {type(self._model).__name__} were replaced since; call patch.remove(), and patch "
            "the model again"
        )

    def refuse_media(self, given: dict[str, Any]) -> None:
        """Raises `UnsupportedError` where the model is given an image, or the like, that a patch cannot honour."""
        if self._stack.no_media is not None:
            refuse_media(self._model, given, self._stack.no_media)

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
        with forgetting_rows(self._model):
            self._start(decoder, kwargs)
        return (), kwargs

    def _start(self, decoder: Any, kwargs: dict[str, Any]) -> None:
        """Makes the forward pass from the decoder's arguments, which take it down."""
        kind = decoder.config._attn_implementation
        if kind != NAME:
            raise UnsupportedError(
                f"the attention implementation of the patched model was set to {kind!r}; "
                f"call {self._named}.set_attn_implementation({NAME!r}), or patch.remove() first"
            )
        refuse_training(self._layers[0])
        embeds = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if embeds is None else embeds
        batch, count = tokens.shape[:2]
        if count > 1 or not any(_has_read(kwargs.get(name)) for name in CACHES[:2]):
            refuse_adapters(self._model, batch)
            if layers_of(decoder, len(self._layers)) != self._layers:
                self._refuse_replaced("layers")
        _refuse_arguments(decoder, kwargs)
        if "logits_to_keep" in self._arguments:  # else layers that use others' keys would run on the last tokens alone
            kwargs["logits_to_keep"] = 0
        added = layers_added_to(self._model, kwargs, self._stack.no_media)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _positions(kwargs["position_ids"], batch, count)
        cache = self._cache(decoder, kwargs)
        caches = None if cache is None else cache.layers
        past = positions_read(caches, batch) if caches else 0
        if past == 0:
            refuse_likelihoods(self.policy, self.config, count)
        given: Given | None = kwargs.get(GIVEN)
        further = {} if given is None else given.see_later_ones(count, past)
        if further and self.compiled:
            raise UnsupportedError(
                "compile=True cannot read images whose tokens see each other in both directions; patch with "
                "compile=False"
            )
        mask, device = self._mask(kwargs), tokens.device
        valid, padded = padding_of_turn(mask, batch, past, past + count, device, self.MASK)
        self._refuse_turn(valid, padded and past > 0, past, count, kwargs.get("position_ids"))
        kwargs[PASS] = forward_pass = self.begin(
            caches, valid, batch, count, tokens.device, _ids(kwargs, count), whole=added, **further
        )
        if self._stack.own_attention is not None:
            RUNNING.set(weakref.ref(forward_pass))
        outer: _Pass | None = kwargs.pop(OUTER, None)
        if outer is not None:
            outer.forward_pass = forward_pass
        elif torch.is_grad_enabled():
            forward_pass.blank = float("nan")  # the decoder alone: nobody would blank out its output

    def _mask(self, kwargs: dict[str, Any]) -> Any:
        """The mask of padding that the decoder is given, or where it is given what the whole model made of it, that
        one's."""
        mask, given = kwargs.get(self.MASK), kwargs.get(GIVEN)
        made = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)
        return given.mask if made and given is not None else mask

    def _leave(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward_pass: ForwardPass = kwargs[PASS]
        RUNNING.set(None)
        report = self.end(forward_pass)
        given: Given | None = kwargs.get(GIVEN)
        if report is not None and forward_pass.prefill is not None and given is not None:
            self.report = report = with_images(report, self._model.config, given.ids, forward_pass.prefill.lengths)
        cache = kwargs.get(self._cache_name)
        if cache is not None and forward_pass.caches is not None:
            count = forward_pass.positions.shape[1]
            cache.record(self._model, _ids(kwargs, count), self._mask(kwargs), count, report)

    def _run_layer(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self._stack.own_attention is not None and PASS not in kwargs:
            running = RUNNING.get()
            forward_pass = None if running is None else running()
            kwargs |= {} if forward_pass is None else {PASS: forward_pass}
        return super()._run_layer(index, forward, *args, **kwargs)

    def _hand_down(self, forward_pass: ForwardPass, step: LayerStep, kwargs: dict[str, Any]) -> None:
        kwargs[PASS] = kwargs[self._stack.cache_argument] = step
        if step.module is None:  # what is no attention may pass its keywords to kernels that know none of ours
            del kwargs[PASS]

    def _run_whole(
        self, index: int, forward: Any, forward_pass: ForwardPass, step: LayerStep, hidden: Tensor, kwargs: Any
    ) -> Any:
        if self._stack.states[index] is not None:
            assert forward_pass.caches is not None
            kwargs[self._stack.cache_argument] = RunningCache(step, _states(forward_pass.caches[index]))
        if self._stack.indexed[index]:
            kwargs["attention_mask"] = step.seen(hidden.shape[0], hidden.shape[1], hidden.device)
        return forward(hidden, **kwargs)

    def _run_groups(
        self, index: int, forward: Any, forward_pass: ForwardPass, step: LayerStep, hidden: Any, kwargs: Any
    ) -> Any:
        number = self._stack.states[index]
        if self._stack.indexed[index]:
            return self._run_choosing(forward, step, hidden, kwargs)
        if index in self._stack.lenders:  # for all rows at once, as keys and values are
            return forward(hidden, **kwargs)
        if number is None:
            return super()._run_groups(index, forward, forward_pass, step, hidden, kwargs)
        held = None if forward_pass.caches is None else _states(forward_pass.caches[index])
        # Rows have no padding, and each runs alone: what a state has read cannot be taken back.
        kwargs |= {name: None for name in kwargs if "mask" in name}
        goes_on = held is not None and bool(held.states)
        parts: list[StateLayer] = []
        rest: tuple[Any, ...] | None = None

        def run(tokens: slice) -> Tensor:
            nonlocal rest
            own = held.row(len(parts)) if held is not None and goes_on else StateLayer(number)
            own.record_past = held is not None and held.record_past
            parts.append(own)
            tables = {name: rows_of(kwargs[name], tokens) for name in self.TABLES if kwargs.get(name) is not None}
            kwargs[self._stack.cache_argument] = RunningCache(step, own)
            output = forward(hidden[:, tokens], **kwargs | tables)
            rest = output[1:] if isinstance(output, tuple) else None
            return output[0] if isinstance(output, tuple) else output

        joined = step.in_groups(run, alone=True)
        if held is not None:
            held.join(parts)
        return joined if rest is None else (joined, *rest)

    def _run_choosing(self, forward: Any, step: LayerStep, hidden: Any, kwargs: Any) -> Any:
        """A layer that chooses keys for each query, on the rows of prompts one by one. What it chose passes to the
        layers after it as a tuple of the rows'."""
        before = kwargs.get(CHOSEN)
        rest: list[Any] = []

        def run(tokens: slice) -> Tensor:
            own = {name: rows_of(kwargs[name], tokens) for name in self.TABLES if kwargs.get(name) is not None}
            if before is not None:
                own[CHOSEN] = before[len(rest)]
            own["attention_mask"] = step.seen(1, tokens.stop - tokens.start, hidden.device)
            output = forward(hidden[:, tokens], **kwargs | own)
            rest.append(output[1] if isinstance(output, tuple) else None)
            return output[0] if isinstance(output, tuple) else output

        joined = step.in_groups(run, alone=True)
        return joined if rest[0] is None else (joined, tuple(rest))

    def _whole(self, hidden: Any) -> Tensor:
        """Streams of hidden states [B, M, streams, C], or [streams, B, M, C], beside each other."""
        if hidden.dim() < 4:
            made: Tensor = hidden
            return made
        return (hidden.permute(1, 2, 0, 3) if self._streams_first else hidden).flatten(2)

    def _some(self, hidden: Any, tokens: slice) -> Any:
        return hidden[:, :, tokens] if hidden.dim() == 4 and self._streams_first else hidden[:, tokens]

    def _spread(self, like: Any, hidden: Tensor) -> Any:
        if like.dim() < 4:
            return hidden
        streams = hidden.unflatten(2, (-1, like.shape[3]))
        return streams.permute(2, 0, 1, 3) if self._streams_first else streams

    def _cache(self, decoder: Any, kwargs: dict[str, Any]) -> Any:
        """The pass's cache with layers of ours, made or adopted where it is new; None where there is to be none."""
        given = [kwargs.pop(name) for name in CACHES[:2] if name in kwargs]
        cache = kwargs[self._cache_name] = next((one for one in given if one is not None), None)
        use_cache = kwargs.get("use_cache")
        if cache is None:
            if use_cache is None:
                use_cache = kwargs["use_cache"] = self._model.config.get_text_config(decoder=True).use_cache
            if not use_cache:
                return None
            cache = kwargs[self._cache_name] = DynamicCache(config=decoder.config)
        adopt(cache, self.new_layers, self.slack)
        return cache

    def new_layers(self) -> list[Layer]:
        """Those of a cache that has read nothing."""
        attends = [own is not None and at not in self._stack.lenders for at, own in enumerate(self.attention)]
        return new_layers(attends, self._stack.states, self.slack)

    def _refuse_turn(
        self, valid: Tensor | None, padded: bool, past: int, count: int, position_ids: Tensor | None
    ) -> None:
        """padded: whether a later turn has padding."""
        slides = any(attention is not None and attention.sliding_window is not None for attention in self.attention)
        if padded and (slides or self._stack.stateful):
            what = "sliding windows, which count positions" if slides else "states, which would read the padding"
            raise UnsupportedError(
                f"attention_mask pads a later turn of a model with {what}; give turns of equal length, or one row at "
                "a time"
            )
        if not is_prompt(self.config, past, count):
            return
        if self._stack.no_media is not None or not self._reads_media:
            refuse_parts(position_ids)
        elif position_ids is not None and position_ids.dim() == 3:  # parts of an image's positions begin again
            position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
        if valid is None and restart(position_ids):
            raise UnsupportedError("position_ids restart within a row; give packed prompts as rows of a padded batch")


class _Pass:
    """What the model learns from its decoder; no list, which other libraries' hooks would copy on the way down."""

    forward_pass: ForwardPass | None = None


def _begin_pass(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {OUTER: _Pass()} if torch.is_grad_enabled() else kwargs


def _end_pass(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Writes NaN into the logits of dropped tokens where gradients are recorded: in hidden states, it would become the
    gradients of the model's last weights."""
    forward_pass = None if OUTER not in kwargs else kwargs[OUTER].forward_pass
    if forward_pass is None:
        return
    logits = output[0] if isinstance(output, tuple) else output.logits
    wanted = kwargs.get("logits_to_keep", 0)
    forward_pass.blank_out(logits, wanted if isinstance(wanted, Tensor) else slice(-logits.shape[1], None))


def _states(layer: Any) -> StateLayer:
    """The states of a cache layer, which has some."""
    found: StateLayer = layer if isinstance(layer, StateLayer) else layer.beside
    return found


def _set_attention(model: Any, implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """A patched model's `set_attn_implementation`. transformers 5.17 takes decoder and model to share a configuration,
    and would leave out the decoder."""
    type(model).set_attn_implementation(model, implementation, *args, **kwargs)
    if isinstance(implementation, str):
        decoder_of(model).config._attn_implementation = implementation


def _run(regions: dict[Any, Any], layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward as the compiled region for such inputs, each of which is one graph. What is too rare to be
    worth one, a prompt of one token and several tokens over a cache, runs uncompiled."""
    step: LayerStep = kwargs[PASS]
    prompt, one = step.rows is not None, hidden.shape[1] == 1
    if prompt == one or (step.rows is not None and step.rows.past is not None):
        return run_layer(layer, (hidden, *args), kwargs)
    region = regions[prompt, hidden.shape[0] == 1, step.visible is None]
    return region(layer, (hidden, *args), kwargs)


def _run_head(region: Any, head: nn.Module, hidden: Tensor) -> Any:
    """The head as a compiled region for a single row, whose product is bound by reading its weight."""
    return (region if hidden.shape[:-1].numel() == 1 else run_layer)(head, (hidden,), {})


def _ids(kwargs: dict[str, Any], count: int) -> Tensor | None:
    """The ids [B, count] that the decoder was given, or the whole model, whose features took the places of some; None
    where neither was."""
    given: Given | None = kwargs.get(GIVEN)
    ids: Tensor | None = kwargs.get("input_ids") if given is None else given.ids
    return None if ids is None or ids.shape[1] != count else ids


def _has_read(cache: Any) -> bool:
    return isinstance(cache, DynamicCache) and cache.get_seq_length() > 0


def _positions(given: Tensor, batch: int, count: int) -> Tensor:
    """position_ids [B or 1, M], before which there may be a dimension of parts; [M] is taken for all rows."""
    positions = given[None] if given.dim() == 1 else given
    if positions.dim() not in (2, 3) or positions.shape[-1] != count or positions.shape[-2] not in (1, batch):
        raise UnsupportedError(
            f"position_ids is {list(given.shape)}; a patched model takes a position for each new token, here "
            f"{[batch, count]}, [1, {count}] or [{count}]"
        )
    return positions


def _arguments(module: Any) -> list[str]:
    """Names of what its forward takes, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _refuse_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, why in REFUSED.items():
        given = kwargs.get(name)
        if given is None and name != "labels":
            given = getattr(module.config, name, None)
        if given is not None and given is not False:
            raise UnsupportedError(f"{name} is not available on a patched model: {why}; call patch.remove() first")
