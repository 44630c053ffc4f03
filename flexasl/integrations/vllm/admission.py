"""What requests ask for, checked where they come in, by vLLM's hook for custom logits processors: a request that cannot
be honoured ends with an error, HTTP 400, and the others continue. Logits are left as they are."""

from __future__ import annotations

import functools
import json
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor as OfV1

from flexasl.errors import FlexASLError
from flexasl.integrations.vllm.methods import Methods, asked_for

NAME = "Admission_"
"""Before the settings of the server in hex, so that each process makes the same class by its name alone."""


def name_of(methods: Methods, v2: bool) -> str:
    """What vLLM's `logits_processors` takes."""
    told = json.dumps(methods.to_dict() | {"v2": v2}, separators=(",", ":"))
    return f"{__name__}:{NAME}{told.encode().hex()}"


def __getattr__(name: str) -> Any:
    if not name.startswith(NAME):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)


@functools.cache
def _made(name: str) -> type:
    told = json.loads(bytes.fromhex(name.removeprefix(NAME)))
    base: type = OfV1
    if told["v2"]:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as OfV2

        base = OfV2
    return type("Admission", (_Check, base), {"methods": Methods.from_dict(told), "__module__": __name__})


class _Check:
    """Checks requests, for one server."""

    methods: Methods

    def __init__(self, *settings: Any) -> None:
        """Takes what either runner gives, and needs nothing of it."""

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """Raises `VLLMValidationError` for a request that cannot be honoured."""
        try:
            asked = asked_for(params.extra_args)
            question = asked.pop("question", None)
            method = cls.methods.of(asked)
            _refuse(params, method, question, cls.methods.settings.max_new_tokens)
        except FlexASLError as error:
            raise VLLMValidationError(str(error)) from error

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Tells the newer runner that there is nothing to apply."""
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Any, *context: Any) -> Any:
        return logits


def _refuse(params: Any, method: Any, question: Any, longest: int | None) -> None:
    if longest is not None and (params.max_tokens is None or params.max_tokens > longest):
        raise FlexASLError(
            f"max_tokens={params.max_tokens} is more than this server's max_new_tokens={longest}; give fewer"
        )
    if params.prompt_logprobs is not None and method.policy.prunes_tokens:
        raise FlexASLError(
            f"prompt_logprobs={params.prompt_logprobs} is not available under policy {method.policy.name!r}: dropped "
            "tokens have no logits; leave it out (echo with logprobs asks for it too), or give flexasl_policy='full'"
        )
    if question is not None and not (method.policy.prunes_tokens or method.config.compresses_cache):
        raise FlexASLError(f"flexasl_question would have no effect under policy {method.policy.name!r}; leave it out")
