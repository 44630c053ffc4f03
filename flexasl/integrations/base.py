"""What the patches of all frameworks share: a forward pass as a `ForwardPass`, from layer to layer, and how it is
undone.

Shapes: B batch, M new tokens, C width of hidden states, T tokens of all prompts at the current layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexasl.attention import FlexASLAttention
from flexasl.cache import LayerCache
from flexasl.calibrated import CalibratedFor
from flexasl.checks import instance
from flexasl.compiling import bare
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError, UnsupportedError
from flexasl.forward_pass import ForwardPass, is_prompt
from flexasl.integrations import questions
from flexasl.integrations.hooks import ForeignHooks
from flexasl.layer_step import LayerStep
from flexasl.policies import Policy
from flexasl.policies.contract import resolved
from flexasl.prefill import Observer, Prefill, Reduce
from flexasl.profiles import Profile, filled, is_open
from flexasl.prompt_pass import PromptPass
from flexasl.quantizing import primitives
from flexasl.report import Report, also
from flexasl.rows import by_token, left_padded_lengths
from flexasl.second_pass import RecordedLayers
from flexasl.states import LayerStates

SLACK = 128
"""Cache entries that decode makes room for at a time, where it writes them in place."""


class BasePatch:
    """A patched model: `report` describes the last prompt, `remove` restores the model. As a context manager it removes
    itself at the end of the block.

    An adapter's `_enter`, a hook before the decoder, makes the forward pass with `begin` and hands it down by a
    keyword that reaches attention, where `ForwardPass.step` attends.
    """

    KEYWORD: str
    """The keyword by which layers take the forward pass."""
    MASK: str
    """The argument that says where padding is."""
    ARGUMENTS: Sequence[str] = ()
    """What a layer's forward takes after the hidden states, in order, where the decoder gives it by position."""
    TABLES: Sequence[str]
    """Those of a layer's arguments that have an entry per token."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        attention: Sequence[FlexASLAttention | None],
        config: ASLConfig,
        policy: Policy,
        *,
        ranking_layers: Sequence[int] | None = None,
        lenders: Mapping[int, int] | None = None,
        reduce: Reduce | None = None,
        profile: Profile | Literal[False] | None = False,
        foreign_hooks: str = "refuse",
    ) -> None:
        """ranking_layers and reduce: as for `Prefill`; lenders: as for `ForwardPass`. profile: the one to use; None: it
        is looked for; False: none."""
        self._model = model
        self.policy = policy
        self.profile: str | None = None
        """Name of the profile that filled in settings, and where it was found; None where none did."""
        self._profile = profile
        self.ranking_layers = ranking_layers
        """Layers whose ranks count, ascending; None for all."""
        self._lenders = lenders
        self._in_order: Collection[int] = ()
        """Layers where no token sees later ones, though elsewhere some do."""
        self._layers = list(layers)
        self.config = config
        self.report: Report | None = None
        """What the last prefill decided and saved; None before the first."""
        self.compiled = False
        """Whether decoder layers run as compiled graphs."""
        self.attention = tuple(attention)
        """What computes each layer's attention; None for a layer that has none."""
        self.observer: Observer | None = None
        """Where set, called with each layer and the pooled scores [B, G, P] of prompts, of this process's heads."""
        self.reduce = reduce
        """Joins token scores [R, P] of the processes that hold a part of the heads each; None where one holds all."""
        self.tokenizer: Any = None
        """What finds the question in each prompt; None: their last tokens rank them."""
        self._question: Any = None
        self._foreign = ForeignHooks(model, self._layers, foreign_hooks)
        self._handles: list[RemovableHandle] = []
        self._forwards: list[tuple[Any, Any, Any]] = []
        """Layers, their forward of ours, and what stood in the place of their class's, None where nothing did."""

    @property
    def config(self) -> ASLConfig:
        """The settings that run on this model, with no default left open. Others can be set, for prompts from then on;
        raises `ConfigError` where they do not fit the model, and the former ones stay."""
        return self._config

    @config.setter
    def config(self, given: ASLConfig) -> None:
        instance("config", given, ASLConfig, "an ASLConfig", ConfigError)
        if given.calibrated_for is not None:
            self.refuse_calibrated(given.calibrated_for)
        open_to_one = self.policy.takes_profiles and is_open(given)
        made, profile = filled(
            given,
            self._own_profile() if open_to_one else None,
            self.policy.takes,
            lambda config: resolved(self.policy, config, len(self._layers), self.ranking_layers),
        )
        if made.kv_dtype is not None:
            primitives(made.kv_dtype)
        self.refuse_settings(made)
        self._config, self.profile = made, profile

    def refuse_settings(self, config: ASLConfig) -> None:
        """Raises `ConfigError` where settings do not go with the model."""

    def _own_profile(self) -> Profile | None:
        """The model's profile."""
        return self._profile or None

    @property
    def question(self) -> Any:
        """The question of the prompts from now on, as `flexasl.patch` takes it; None: the tokenizer finds it."""
        return self._question

    @question.setter
    def question(self, given: Any) -> None:
        questions.check(given, self.tokenizer)
        self._question = given

    def refuse_calibrated(self, model: CalibratedFor) -> None:
        """Raises `ConfigError` where settings were calibrated for another model than this one."""
        model.refuse_depth(len(self._layers))

    def hook(self, decoder: nn.Module) -> None:
        """Puts the hooks on decoder and layers, which makes the patch active."""
        self._model.flexasl_patch = self
        self._handles.append(decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._leave, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            # A forward, and no hooks, so that hooks of others stand around it, whenever they were put there.
            self.replace_forward(layer, functools.partial(self._run_layer, index, layer.forward))

    def replace_forward(self, module: Any, own: Callable[..., Any]) -> None:
        """Gives a module another forward until the patch is removed."""
        self._forwards.append((module, own, vars(module).get("forward")))
        module.forward = own

    def remove(self) -> None:
        """Restores the model to exactly what it was; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, own, before in reversed(self._forwards):
            if vars(module).get("forward") is not own:  # another library has put its own around it, which calls it
                continue
            del module.forward
            if before is not None:
                module.forward = before
        self.restore()
        del self._model.flexasl_patch

    def restore(self) -> None:
        """Undoes what the adapter has changed besides its hooks."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"<flexasl.Patch {self.policy.name} on {type(self._model).__name__}, {state}>"

    def begin(
        self,
        caches: Sequence[LayerCache | LayerStates] | None,
        valid: Tensor | None,
        batch: int,
        count: int,
        device: torch.device,
        ids: Tensor | None = None,
        whole: int = 0,
        last_seen: Tensor | None = None,
        ahead: int = 0,
    ) -> ForwardPass:
        """The pass over `count` new tokens in each row, after those that the caches hold. valid [B, positions so far]
        bool is False at padding, None where there is none. ids [B, count]: the new tokens; None: not known. whole: of
        how many first layers the decoder changes the outputs [B, count, C] of all tokens. last_seen and ahead: as for
        `Prefill`."""
        if batch == 0 or count == 0:
            what = "no rows" if batch == 0 else "rows without a token"
            raise UnsupportedError(f"the batch has {what}; give at least one prompt of at least one token")
        past = caches[0].seen if caches else 0
        positions = torch.arange(past, past + count, dtype=torch.int64, device=device).expand(batch, -1)
        if not is_prompt(self.config, past, count):
            assert caches is not None
            self._foreign.check_decode(self.compiled)
            going_on: dict[str, Any] = {"compiled": self.compiled, "lenders": self._lenders, "ahead": ahead}
            return ForwardPass(caches, positions, valid, **going_on, last_seen=last_seen, in_order=self._in_order)
        lengths = [count] * batch if valid is None else left_padded_lengths(valid[:, past:], self.MASK)
        asked = questions.of_prompts(self, ids, lengths, count)
        prefill = Prefill(
            self.policy,
            self.config,
            len(self._layers),
            lengths,
            tokens=count,
            device=device,
            ranking_layers=self.ranking_layers,
            reduce=self.reduce,
            observer=self.observer,
            question=asked.positions,
            question_texts=asked.texts,
            past=past,
            last_seen=last_seen,
            ahead=ahead,
        )
        rerun = RecordedLayers(self._layers, self.KEYWORD, self._whole) if self.policy.second_pass else None
        unpacks = self._foreign.check_prompt(prefill, self.compiled)
        if whole:
            unpacks = True
            if prefill.first_drop is not None and prefill.first_drop < whole:
                raise UnsupportedError(
                    f"tokens may be dropped after layer {prefill.first_drop}, and features of images are added to the "
                    f"outputs of the first {whole} layers; give min_layer={whole} or more, stages and other policies "
                    "likewise"
                )
        how: dict[str, Any] = {"compiled": self.compiled, "rerun": rerun, "unpacks": unpacks, "lenders": self._lenders}
        how["in_order"] = self._in_order
        made = PromptPass(caches, prefill, positions, valid if past > 0 else None, **how)
        if torch.is_grad_enabled():
            made.blank = 0.0  # until the weights after the last layer have been used
        return made

    def end(self, forward_pass: ForwardPass) -> Report | None:
        """After the pass: the report, where it was a prompt."""
        report = forward_pass.close()
        if report is not None:
            self.report = report = also(report, profile=self.profile)
        return report

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _leave(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.end(kwargs[self.KEYWORD])

    def _run_layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of a layer's forward, which it runs on the tokens that are left, with a step of the pass."""
        if len(args) > 1:
            args, kwargs = args[:1], dict(zip(self.ARGUMENTS, args[1:], strict=False)) | kwargs
        forward_pass = kwargs.get(self.KEYWORD)
        if not isinstance(forward_pass, ForwardPass) or not self._handles:
            return forward(*args, **kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if forward_pass.prefill is not None or self.compiled:
            return self._run_packed(index, forward, forward_pass, hidden, kwargs)
        hidden, step = forward_pass.before_layer(index, self.attention[index], hidden)
        self._hand_down(forward_pass, step, kwargs)
        output = self._run_whole(index, forward, forward_pass, step, hidden, kwargs)
        forward_pass.after_layer(index, step, hidden)
        return output

    def _run_packed(
        self, index: int, forward: Callable[..., Any], forward_pass: ForwardPass, given: Any, kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(forward_pass.rerun, RecordedLayers):
            forward_pass.rerun.record(index, given, kwargs)
        hidden, step = forward_pass.before_layer(index, self.attention[index], self._whole(given))
        table = forward_pass.table
        for name in self.TABLES:
            states = kwargs.get(name)
            if states is not None:
                kwargs[name] = tuple(map(table, states)) if isinstance(states, tuple) else table(states)
        self._hand_down(forward_pass, step, kwargs)
        output = self._run_groups(index, forward, forward_pass, step, self._spread(given, hidden), kwargs)
        made = output[0] if isinstance(output, tuple) else output
        like = made if made.dim() == given.dim() else given  # some rows at a time, outputs come whole
        hidden = self._spread(like, forward_pass.after_layer(index, step, self._whole(made)))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _run_whole(
        self,
        index: int,
        forward: Callable[..., Any],
        forward_pass: ForwardPass,
        step: LayerStep,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        """The layer's forward over a cache [B, M, C]."""
        return forward(hidden, **kwargs)

    def _run_groups(
        self,
        index: int,
        forward: Callable[..., Any],
        forward_pass: ForwardPass,
        step: LayerStep,
        hidden: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """The layer's forward over prompts [1, T, C]. On CPU it takes a batch of prompts some rows at a time: memory of
        32 MiB or more goes back to the system when a tensor ends, and the next one pays for each page of it again."""
        plain = type(hidden) is Tensor and hidden.is_cpu and not torch.compiler.is_compiling()
        rows = step.rows if plain else None
        one_run = rows is None or rows.past is not None or len(rows.groups()) == 1
        if one_run or any(weight.is_meta for weight in self._layers[index].parameters()):  # loaded for each run
            return forward(hidden, **kwargs)
        output: Any = None

        def run(tokens: slice) -> Tensor:
            nonlocal output
            own = {name: rows_of(kwargs[name], tokens) for name in self.TABLES if kwargs.get(name) is not None}
            output = forward(self._some(hidden, tokens), **kwargs | own)
            return self._whole(output[0] if isinstance(output, tuple) else output)

        joined = step.in_groups(run)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    def _hand_down(self, forward_pass: ForwardPass, step: LayerStep, kwargs: dict[str, Any]) -> None:
        """Puts the step where the layer's attention finds it."""
        forward_pass.step = step

    def _whole(self, hidden: Any) -> Tensor:
        """Hidden states whole on this rank."""
        made: Tensor = hidden
        return made

    def _some(self, hidden: Any, tokens: slice) -> Any:
        """Hidden states of some of all rows' tokens."""
        return hidden[:, tokens]

    def _spread(self, like: Any, hidden: Tensor) -> Any:
        """Hidden states that are whole on this rank, spread over the ranks as those are that they are like."""
        return hidden


def rows_of(table: Any, tokens: slice) -> Any:
    """A per-token tensor [1, T, ...] at some tokens, or several of them."""
    if isinstance(table, tuple):
        return tuple(rows_of(states, tokens) for states in table)
    return bare(by_token(table, lambda states: states[:, tokens]))
