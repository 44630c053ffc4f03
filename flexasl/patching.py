"""`patch`: which adapter serves which model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.policies import Policy, find_policy

if TYPE_CHECKING:
    from flexasl.integrations.transformers import Patch


def patch(
    model: Any,
    config: ASLConfig | None = None,
    policy: str | Policy = "asl",
    *,
    kernel: Literal["auto", "flex", "sdpa", "eager"] = "auto",
    compile: bool = False,
) -> Patch:
    """Makes `model` prune its prompts while it reads them, until `remove()` or the end of the `with` block.

    model: a transformers causal decoder in eval mode. config: the settings (default `ASLConfig()`). policy: a name from
    `flexasl.policies.POLICIES` or an instance. kernel: what computes attention, see `FlexASLAttention`. compile: run
    decoder layers as compiled graphs, made on the first prompt and the first new token, good for all lengths; such a
    model gives no gradients. Returns the patch, whose `report` tells of the last prompt. Raises `UnsupportedError` for
    a model that cannot be patched and `ConfigError` for settings that do not fit it; the model is then untouched.
    """
    if config is not None and not isinstance(config, ASLConfig):
        raise FlexASLError(f"config={config!r} is a {type(config).__name__}; give an ASLConfig or None")
    chosen = find_policy(policy)
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "model is the result of torch.compile; patch the model itself, with compile=True to compile its layers"
        )
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise UnsupportedError(
            f"model is a {type(model).__name__}; give a transformers causal language model (a PreTrainedModel)"
        )
    from flexasl.integrations.transformers import Patch

    return Patch(model, config or ASLConfig(), chosen, kernel=kernel, compile=compile)
