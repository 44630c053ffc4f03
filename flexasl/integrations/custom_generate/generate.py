"""The ordinary `generate` of transformers, for this call with a prompt that is pruned while the model reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flexasl

PREFIX = "asl_"


def generate(
    model: Any,
    asl_config: Any = None,
    asl_policy: Any = "asl",
    asl_kernel: Any = "auto",
    asl_on_report: Callable[[Any], None] | None = None,
    **kwargs: Any,
) -> Any:
    """What `model.generate(**kwargs)` returns, with the prompt pruned; the model is not patched before or after.

    asl_config: an `ASLConfig`, or a dict of its settings; asl_<setting>: one setting, such as asl_select_tokens.
    asl_policy, asl_kernel: as in `flexasl.patch`. asl_on_report: called with the report once the prompt has been read
    and answered. Raises what `flexasl.patch` raises.
    """
    if hasattr(model, "flexasl_patch"):
        raise flexasl.UnsupportedError(
            "custom_generate patches the model for one call, and the model is patched already; call generate without "
            "custom_generate, or model.flexasl_patch.remove() first"
        )
    if asl_config is not None and not isinstance(asl_config, (flexasl.ASLConfig, dict)):
        raise flexasl.FlexASLError(
            f"asl_config is a {type(asl_config).__name__}; give an ASLConfig or a dict of settings"
        )
    config = asl_config.to_dict() if isinstance(asl_config, flexasl.ASLConfig) else dict(asl_config or {})
    config |= {name.removeprefix(PREFIX): kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    # A model that was loaded from a repository with this folder has this function as its `generate`.
    own = vars(model).pop("generate", None)
    try:
        with flexasl.patch(model, flexasl.ASLConfig.from_dict(config), asl_policy, kernel=asl_kernel) as patch:
            out = model.generate(**kwargs)
        if asl_on_report is not None:
            asl_on_report(patch.report)
    finally:
        if own is not None:
            model.generate = own
    return out
