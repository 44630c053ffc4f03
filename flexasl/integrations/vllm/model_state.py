"""The part of a step that vLLM's newer runner (V2) tells by its hook for model state. It needs Triton, and so a GPU: it
has not been run. The rest of the plug-in is the same under both runners."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class PrunedModelState(DefaultModelState):
    """Notes the order of a step's requests."""

    names: tuple[str, ...] = ()

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.names = tuple(input_batch.req_ids)
        return super().prepare_attn(input_batch, *args, **kwargs)
