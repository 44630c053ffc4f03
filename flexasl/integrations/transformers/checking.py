"""Whether a model that the tests do not cover can be patched, found out by running it on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.integrations.transformers.placement import input_device
from flexasl.policies import FixedLayer

TOKENS = 24
"""Tokens of the two prompts together with what follows them, by rows of unlike length."""
RULE = ASLConfig(select_tokens=8, window=4, kernel_size=1)


def check_by_running(model: Any) -> Callable[[Any], None]:
    """Runs the unpatched model; returns a check of its patch, which removes it and raises `UnsupportedError` unless:

    with every token kept, the patched model says what the unpatched one does, in a padded batch and for the next token;
    and dropping tokens gives what masking them out gives.
    """
    ids = torch.arange(2 * TOKENS, dtype=torch.int64, device=input_device(model)).view(2, TOKENS) % (
        model.config.get_text_config().vocab_size - 1
    )
    mask = torch.ones_like(ids)
    mask[0, : TOKENS // 3] = 0
    with torch.no_grad():
        want = [_plain(model, ids, mask, TOKENS - 1), _plain(model, ids, mask, TOKENS)]
    # What rounding may do grows with the numbers: a share of the largest logit.
    close = {torch.float64: 1e-6, torch.float32: 1e-3}.get(model.dtype, 5e-2) * max(1.0, want[1].abs().max().item())

    def check(patch: Any) -> None:
        settings = patch._config, patch.policy, patch.profile
        kind = f"{type(model).__name__} is not among the tested models, and its self-test failed"
        try:
            with torch.no_grad():
                _set(patch, RULE.replace(select_tokens=1.0), "gather")
                got = _two_steps(model, ids, mask)
                for before, now, what in zip(want, got, ("the prompt", "the token after it"), strict=True):
                    _compare(before, now, close, f"with every token kept, logits of {what} differ")
                _set(patch, RULE, "gather")
                dropped = _two_steps(model, ids, mask)
                _set(patch, RULE, "mask")
                for one, other in zip(dropped, _two_steps(model, ids, mask), strict=True):
                    _compare(one, other, close, "logits differ between dropping tokens and masking them out")
        except Exception as error:
            patch.remove()
            raise UnsupportedError(f"{kind}: {error}") from error
        patch._config, patch.policy, patch.profile = settings
        patch.report = None

    return check


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


def _set(patch: Any, rule: ASLConfig, propagate: Any) -> None:
    stack = patch._stack
    patch.policy = FixedLayer(stack.ranking_layers[len(stack.ranking_layers) // 2])
    patch.config = rule.replace(propagate=propagate)


def _compare(want: Tensor, got: Tensor, close: float, what: str) -> None:
    apart = (want - got).abs().max().item()
    if not apart <= close:
        raise UnsupportedError(f"{what} by {apart:.2g}, where rounding explains {close:.2g}")
