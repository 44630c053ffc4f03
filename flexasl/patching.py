"""`patch` and `load_cache`: which adapter serves which model."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Literal

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError, UnsupportedError
from flexasl.policies import Policy, find_policy

if TYPE_CHECKING:
    import os

    from flexasl.integrations.base import BasePatch
    from flexasl.integrations.transformers import PrunedCache


def patch(
    model: Any,
    config: ASLConfig | None = None,
    policy: str | Policy = "asl",
    *,
    kernel: Literal["auto", "flex", "sdpa", "eager"] = "auto",
    compile: bool = False,
) -> BasePatch:
    """Makes `model` prune its prompts while it reads them, until `remove()` or the end of the `with` block.

    model: a causal decoder in eval mode, of transformers (or a PEFT model around one), torchtune or torchtitan. config:
    the settings (default `ASLConfig()`). policy: a name from `flexasl.policies.POLICIES` or an instance. kernel: what
    computes attention, see `FlexASLAttention`. compile: run a transformers model's layers as compiled graphs, made on
    the first prompt and the first new token, good for all lengths; such a model gives no gradients, and a backward pass
    through it raises `UnsupportedError`. Returns the patch, whose `report` tells of the last prompt. Raises
    `UnsupportedError` for a model that cannot be patched and `ConfigError` for settings that do not fit it; the model
    is then untouched.
    """
    if config is not None and not isinstance(config, ASLConfig):
        raise FlexASLError(f"config={config!r} is a {type(config).__name__}; give an ASLConfig or None")
    chosen = find_policy(policy)
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "model is the result of torch.compile; patch the model itself, with compile=True to compile its layers"
        )
    model = without_peft(model)
    settings = config or ASLConfig()
    if _is_a(model, "transformers", "PreTrainedModel"):
        from flexasl.integrations.transformers import Patch

        return Patch(model, settings, chosen, kernel=kernel, compile=compile)
    others = {
        "torchtune": ("torchtune.modules", "TransformerDecoder"),
        "torchtitan": ("torchtitan.models.common.decoder", "Decoder"),
    }
    framework = next((name for name, place in others.items() if _is_a(model, *place)), None)
    if framework is None:
        raise UnsupportedError(
            f"model is a {type(model).__name__}; give a transformers causal language model (a PreTrainedModel), a "
            "torchtune TransformerDecoder or a torchtitan Decoder"
        )
    if compile:
        raise UnsupportedError(f"compile=True is not available for {framework} models; give compile=False")
    adapter: Any = importlib.import_module(f"flexasl.integrations.{framework}")
    patched: BasePatch = adapter.Patch(model, settings, chosen, kernel=kernel)
    return patched


def _is_a(model: Any, module: str, name: str) -> bool:
    """Whether the model is of this class, without importing the module: nobody else can have made such a model."""
    found = sys.modules.get(module)
    return found is not None and isinstance(model, getattr(found, name, ()))


def load_cache(path: str | os.PathLike[str], model: Any) -> PrunedCache:
    """A cache that `save` wrote, for `model`, which must be patched and be the one that read the prompt.

    Give it on as `past_key_values`, with the new ids behind `cache.token_ids` and, in a padded batch, ones behind
    `cache.attention_mask`. On a CPU its tensors are mapped from the file: replace the file, but never write into it,
    while the cache is in use. Raises `FlexASLError`, and builds nothing, where the file is not an unchanged cache of
    this format version or belongs to another model, FileNotFoundError where there is none.
    """
    model = without_peft(model)
    if not _is_a(model, "transformers", "PreTrainedModel"):
        raise UnsupportedError(
            f"model is a {type(model).__name__}; saved caches are for transformers causal language models"
        )
    if not hasattr(model, "flexasl_patch"):
        raise UnsupportedError(
            f"{type(model).__name__} is not patched, and a pruned cache can only be read by a patched model; "
            "call flexasl.patch(model) first"
        )
    from flexasl.integrations.transformers.loading import load

    return load(path, model)


def without_peft(model: Any) -> Any:
    """The model inside a PEFT model, whose adapters are modules of its layers."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    adapter = model.active_peft_config
    if adapter.is_prompt_learning:
        raise UnsupportedError(
            f"{type(model).__name__} has an adapter of type {adapter.peft_type.value}, which puts tokens of its own "
            "before the prompt; give a model with adapters inside its layers, such as LoRA"
        )
    return model.get_base_model()
