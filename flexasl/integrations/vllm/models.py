"""Model classes of our own names, made on demand from vLLM's class of the architecture."""

from __future__ import annotations

import functools
import json
from typing import Any

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available

from flexasl.integrations.vllm import ARCHITECTURES, PREFIX
from flexasl.integrations.vllm.methods import Methods
from flexasl.integrations.vllm.pruning import Pruning
from flexasl.integrations.vllm.startup import methods_of


def __getattr__(name: str) -> Any:
    if name.removeprefix(PREFIX) not in ARCHITECTURES or not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return derived(name.removeprefix(PREFIX))


@functools.cache
def derived(architecture: str) -> type:
    """A subclass of vLLM's class for this architecture."""
    plain: Any = ModelRegistry.models[architecture].load_model_cls()

    class Pruned(plain):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            methods = methods_of(vllm_config)
            self.flexasl = Pruning(self, methods, vllm_config, _tokenizer(vllm_config, methods))
            if methods.lean:
                _hold_less(self.flexasl)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Not forward, which may be compiled as a whole.
            if not is_forward_context_available():
                return super().__call__(*args, **kwargs)
            with self.flexasl.running(get_forward_context()):
                return super().__call__(*args, **kwargs)

        def get_model_state_cls(self) -> type:
            """vLLM's hook for its newer runner."""
            from flexasl.integrations.vllm.model_state import PrunedModelState

            return PrunedModelState

    Pruned.__name__ = Pruned.__qualname__ = f"{PREFIX}{architecture}"
    Pruned.__module__ = __name__
    return Pruned


def _hold_less(pruning: Pruning) -> None:
    """Has each layer ask for memory of what it keeps."""
    told = json.dumps(pruning.methods.to_dict(), sort_keys=True)
    for attention in pruning.attention:
        attention.get_kv_cache_spec = functools.partial(_pruned_spec, attention.get_kv_cache_spec, told)


def _pruned_spec(plain: Any, told: str, vllm_config: VllmConfig) -> Any:
    from vllm.v1.kv_cache_interface import replace_as

    from flexasl.integrations.vllm.memory import PrunedSpec

    return replace_as(plain(vllm_config), PrunedSpec, methods=told)


def _tokenizer(vllm_config: VllmConfig, methods: Methods) -> Any:
    """What finds questions; None where prompts are ranked by their last tokens."""
    model = vllm_config.model_config
    if not methods.settings.rank_by_question or model.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model)
