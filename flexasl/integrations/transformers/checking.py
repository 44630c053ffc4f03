"""Whether a model that the tests do not cover can be patched, found out by running it on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.integrations.transformers.placement import input_device
from flexasl.policies import FixedLayer
from flexasl.selectors import ScheduledSelector
from flexasl.selectors.base import Prompts, Selection, Selector

TOKENS = 24
"""Tokens of the two prompts together with what follows them, by rows of unlike length."""
TRIES = 4
"""Pairs of prompts of which one must do, in half precision, with experts or states."""
RULE = ASLConfig(select_tokens=8, window=4, kernel_size=1)


class _EverySecond(FixedLayer):
    """Keeps every second token at its layer, whatever it scores."""

    name = "every_second"

    def selector(self, config: ASLConfig, prompts: Prompts) -> Selector:
        return _SecondTokens(lambda tokens: {self.layer: tokens // 2}, config, prompts)  # type: ignore[dict-item]


class _SecondTokens(ScheduledSelector):
    def select(self, layer: int) -> list[Selection]:
        return [replace(one, keep=_every_second(self._prompts.lengths[one.row])) for one in super().select(layer)]


def _every_second(tokens: int) -> Tensor:
    """[tokens] bool, of which the last ones are True, and half in all."""
    keep = torch.arange(tokens, dtype=torch.int64, device="cpu") % 2 == 1
    keep[-RULE.window :] = True
    keep[: RULE.window] = False
    return keep


def check_by_running(model: Any, stack: Any) -> Callable[[Any], None]:
    """Runs the unpatched model; returns a check of its patch, which removes it and raises `UnsupportedError` unless:

    with every token kept, the patched model says what the unpatched one does, in a padded batch and for the next token;
    and dropping tokens gives what masking them out gives, or, where layers keep states, what the deeper layers make of
    the kept ones alone.
    """
    ids = torch.arange(2 * TOKENS, dtype=torch.int64, device=input_device(model)).view(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, : TOKENS // 3] = 0
    layer = stack.ranking_layers[len(stack.ranking_layers) // 2]
    kind = f"{type(model).__name__} is not among the tested models, and its self-test failed"
    # What rounding may do grows with the numbers: a share of the largest logit. In half precision states carry it from
    # token to token, and experts turn it into other choices; there only what is wrong with all prompts is seen.
    chooses = any("expert" in name or "router" in name for name, _ in model.named_modules())
    exact = {torch.float64: 1e-6, torch.float32: 1e-3}.get(model.dtype)
    loose = exact is None and (stack.stateful or chooses)
    share = exact or (0.5 if loose else 0.1)
    vocab, cases = model.config.get_text_config().vocab_size - 1, []
    for shift in range(TRIES if loose else 1):
        own = (ids + shift * 2 * TOKENS) % vocab
        with torch.no_grad():
            want, alone = [_plain(model, own, mask, TOKENS - 1), _plain(model, own, mask, TOKENS)], []
            if stack.stateful:
                try:
                    alone = [_of_the_kept(model, stack, layer, row[real.bool()]) for row, real in zip(own, mask)]
                except Exception as error:
                    raise UnsupportedError(f"{kind}: layers do not run on some tokens alone: {error}") from error
        cases.append((own, want, alone, share * max(1.0, want[1].abs().max().item())))

    def run(patch: Any, ids: Tensor, want: list[Tensor], alone: list[list[Tensor]], close: float) -> None:
        _set(patch, FixedLayer(layer), RULE.replace(select_tokens=1.0))
        got = _two_steps(model, ids, mask)
        for before, now, what in zip(want, got, ("the prompt", "the token after it"), strict=True):
            _compare(before, now, close, f"with every token kept, logits of {what} differ")
        if stack.stateful:
            _set(patch, _EverySecond(layer), RULE)
            dropped, what = _two_steps(model, ids, mask), "a run on the kept ones alone"
            others = [torch.cat(rows) for rows in zip(*alone)]
        else:
            _set(patch, FixedLayer(layer), RULE)
            dropped, what = _two_steps(model, ids, mask), "masking them out"
            _set(patch, FixedLayer(layer), RULE.replace(propagate="mask"))
            others = _two_steps(model, ids, mask)
        for one, other in zip(dropped, others, strict=True):
            _compare(one, other, close, f"logits differ between dropping tokens and {what}")

    def check(patch: Any) -> None:
        settings = patch._config, patch.policy, patch.profile
        try:
            for place, case in enumerate(cases, 1):
                try:
                    with torch.no_grad():
                        run(patch, *case)
                    break
                except _DifferError:
                    if place == len(cases):
                        raise
        except Exception as error:
            patch.remove()
            raise UnsupportedError(f"{kind}: {error}") from error
        patch._config, patch.policy, patch.profile = settings
        patch.report = None

    return check


class _DifferError(UnsupportedError):
    """Logits are further apart than rounding explains."""


def _of_the_kept(model: Any, stack: Any, layer: int, ids: Tensor) -> list[Tensor]:
    """Last logits [1, V] of an unpatched model whose layers behind this one run on every second token [M] alone: of the
    prompt, which is all but the last token, and of that."""
    kept = _every_second(len(ids) - 1).nonzero()[:, 0].to(ids.device)
    return [
        _run_on(model, stack, layer, ids[:-1], kept),
        _run_on(model, stack, layer, ids, F.pad(kept, (0, 1), value=len(ids) - 1)),
    ]


def _run_on(model: Any, stack: Any, layer: int, ids: Tensor, kept: Tensor) -> Tensor:
    """Last logits [1, V] of tokens [M], of which the layers behind this one run on the kept ones [K] alone."""

    def gather(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(gather, value))
        own = value.dim() > 1 and value.shape[1] == len(ids)
        return value[:, kept] if own else value[..., kept, :][..., kept] if value.dim() == 4 else value

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = {name: gather(value) for name, value in kwargs.items() if isinstance(value, (tuple, Tensor))}
        return tuple(gather(value) if isinstance(value, Tensor) else value for value in args), kwargs | own

    handles = [one.register_forward_pre_hook(before, with_kwargs=True) for one in stack.layers[layer + 1 :]]
    try:
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[:, -1].float()


def _plain(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    mask = mask[:, :count]
    logits: Tensor = model(input_ids=ids[:, :count], attention_mask=mask, position_ids=_positions(mask)).logits
    return logits[:, -1].float()


def _two_steps(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Last logits [B, V] of the prompt and of the token after it, through the cache."""
    first = mask[:, :-1]
    inputs = {"input_ids": ids[:, :-1], "attention_mask": first, "position_ids": _positions(first)}
    out = model(**inputs, use_cache=True)
    after = model(
        input_ids=ids[:, -1:],
        attention_mask=mask,
        position_ids=_positions(mask)[:, -1:],
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    return [out.logits[:, -1].float(), after.logits[:, -1].float()]


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _set(patch: Any, policy: FixedLayer, rule: ASLConfig) -> None:
    patch.policy = policy
    patch.config = rule


def _compare(want: Tensor, got: Tensor, close: float, what: str) -> None:
    apart = (want - got).abs().max().item()
    if not apart <= close:
        raise _DifferError(f"{what} by {apart:.2g}, where rounding explains {close:.2g}")
