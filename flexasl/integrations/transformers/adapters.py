"""PEFT adapters in a patched model's layers.

Layers see all prompts as one row, from which tokens go; so what an adapter does to a token must not depend on where it
stands, on the tokens beside it, or on its row.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from flexasl.errors import FlexASLError, UnsupportedError

TOKENWISE = {
    "adalora",
    "adamss",
    "adaption_prompt",
    "beft",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "miss",
    "oft",
    "osf",
    "peanut",
    "poly",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "shira",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "unilora",
    "vblora",
    "vera",
    "waveft",
}
"""PEFT's kinds of adapters that do to each token alone what they do, by the names of their folders."""
REFUSED = {
    "lily": "mixes its experts by the mean over all tokens of the batch",
    "shadow": "runs a second decoder beside the layers, which sees every token",
    "xlora": "weighs its adapters for each token by a pass over the whole prompt",
}
BY_ROW = {"adapter_names", "alora_offsets"}
"""What PEFT hands to layers by a hook of its own, with an entry for each row."""


def refuse_adapters(model: nn.Module, rows: int = 1) -> None:
    """Raises `UnsupportedError` where an active adapter, or what PEFT was given for each of these rows, cannot be
    honoured."""
    if "peft" not in sys.modules:
        return
    kind = type(model).__name__
    modules: Any = model.modules()
    for module in modules:
        for name, given in _given_by_row(module):
            if name == "alora_offsets":
                _refuse_activated(kind)
            if len(given) > 1:
                raise UnsupportedError(
                    f"adapter_names of {len(given)} rows cannot be honoured on a patched {kind}, whose layers see a "
                    "batch as one row; give one row at a time, or rows that share an adapter, after "
                    "set_adapter(...) of the PEFT model"
                )
        found = _kind(type(module))  # type: ignore[arg-type]
        if found is None:
            continue
        if isinstance(getattr(module.forward, "__self__", None), _xlora()):
            found = "xlora"
        elif getattr(module, "disable_adapters", True) or not module.active_adapters:
            continue
        if found == "lora":
            variants: Any = getattr(module, "lora_variant", {})
            if any(type(variants.get(name)).__name__.startswith("ALora") for name in module.active_adapters):
                _refuse_activated(kind)
        if found not in TOKENWISE:
            why = REFUSED.get(found, "is not among those that are known to treat every token alone")
            raise UnsupportedError(
                f"{kind} has an adapter of type {found.upper()}, which {why}; patch it without that adapter"
            )
        if found == "poly" and rows > 1:
            raise UnsupportedError(
                f"{kind} has an adapter of type POLY, which takes task_ids by row, and the layers of a patched model "
                f"see a batch of {rows} as one row; give one row at a time"
            )


def adapters_in_use(model: nn.Module) -> list[str]:
    """Adapters that the model's layers add to what they compute, with their scales."""
    found = set()
    modules: Any = model.modules() if "peft" in sys.modules else ()
    for module in modules:
        if _kind(type(module)) is None or getattr(module, "disable_adapters", True):  # type: ignore[arg-type]
            continue
        given = getattr(module, "scaling", None)
        scales = given if isinstance(given, dict) else {}
        found |= {f"{name} scaled by {scales[name]}" if name in scales else name for name in module.active_adapters}
    return sorted(found)


@contextlib.contextmanager
def forgetting_rows(model: nn.Module) -> Iterator[None]:
    """Where a call is refused inside, takes away the hooks that PEFT has put on layers for it and would leave behind:
    with them, the next call would have the refused one's adapters."""
    try:
        yield
    except FlexASLError:
        if "peft" in sys.modules:
            _forget_rows(model)
        raise


def _forget_rows(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if BY_ROW & set(_keywords(hook)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _given_by_row(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for hook in module._forward_pre_hooks.values():
        keywords = _keywords(hook)
        yield from ((name, keywords[name]) for name in BY_ROW & set(keywords))


def _keywords(hook: Any) -> dict[str, Any]:
    theirs = isinstance(hook, functools.partial) and str(getattr(hook.func, "__module__", "")).startswith("peft.")
    return hook.keywords if theirs else {}


def _refuse_activated(kind: str) -> None:
    raise UnsupportedError(
        f"{kind} has an activated LoRA (alora_invocation_tokens), which counts its tokens from the end of the row, and "
        "a patched model drops tokens from rows; patch without it, or activate another adapter"
    )


@functools.cache
def _kind(module: type) -> str | None:
    """The kind of adapter that a class of modules belongs to, by its folder in PEFT; None for other modules."""
    for base in module.__mro__:
        path = base.__module__.split(".")
        if path[:2] == ["peft", "tuners"] and len(path) > 3:
            return path[2]
    return None


def _xlora() -> Any:
    module: Any = sys.modules.get("peft.tuners.xlora.layer")
    return () if module is None else module.XLoraLayer
