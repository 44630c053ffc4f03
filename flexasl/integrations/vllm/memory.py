"""Memory of requests where every layer's cache has a limit: what is kept of the prompt, and what is generated. A
prompt's full length is never allocated. Importing this module tells vLLM of it, in the process that has the scheduler
as in those that have the model."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from flexasl.integrations.vllm.methods import Methods

KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # registers vLLM's own, which it does only where there is none


class PrunedManager(FullAttentionManager):
    """Blocks for the entries that a request keeps of its prompt, and for every token behind it. What is read again
    after a preemption counts from the same prompt."""

    def __init__(self, kv_cache_spec: PrunedSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self._held = held_by(kv_cache_spec.methods)
        self._prompts: dict[str, int] = {}
        """By request that holds blocks, or is about to, the tokens of its prompt."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """vLLM calls it before every allocation; here it tells how long the prompt is."""
        if num_prompt_tokens is not None:
            self._prompts[request_id] = num_prompt_tokens

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return super().get_num_blocks_to_allocate(request_id, self.entries(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        return super().allocate_new_blocks(request_id, self.entries(request_id, num_tokens), num_tokens_main_model)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._prompts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def entries(self, request_id: str, num_tokens: int) -> int:
        """The most entries that a layer holds of a request with so many tokens. Where vLLM only asks whether a request
        would fit, all of its tokens are taken for its prompt."""
        prompt = self._prompts.get(request_id, num_tokens)
        return num_tokens if num_tokens < prompt else self._held(prompt) + num_tokens - prompt


@register_kv_cache_spec(manager_class=PrunedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PrunedSpec(FullAttentionSpec):
    """A layer's cache of requests whose prompts are pruned."""

    methods: str = ""
    """The server's `Methods` as JSON: this goes to the process that has the scheduler."""

    @property
    def prefix_cacheable(self) -> bool:
        """What is kept depends on the whole prompt, so no other prompt can begin with it."""
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What one request may need, so that it never waits for memory that there is not. Without a limit to answers
        this is the whole length: a short prompt with a long answer loses nothing."""
        answer = Methods.from_dict(json.loads(self.methods)).settings.max_new_tokens
        longest = vllm_config.model_config.max_model_len
        if answer is None or answer >= longest:
            return super().max_memory_usage_bytes(vllm_config)
        return -(-(held_by(self.methods)(longest - answer) + answer) // self.block_size) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: Sequence[Self]) -> Self:
        """One spec for layers that have the same; the base class would lose our field."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError("layers of a model that is pruned have caches of different kinds")
        return copy.deepcopy(specs[0])


@functools.cache
def held_by(methods: str) -> Any:
    """Of a prompt of so many tokens, the most entries that a layer keeps."""
    own = Methods.from_dict(json.loads(methods)).own

    @functools.cache
    def held(prompt_tokens: int) -> int:
        entries = own.entries(prompt_tokens)
        assert entries is not None
        return entries

    return held
