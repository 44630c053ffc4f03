"""FlexASL inside vLLM: an out-of-tree plug-in. vLLM finds `register` by its entry point in every process, and nothing
else happens unless a model is asked for by one of our names, `FlexASL` and the architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexasl.config import ASLConfig

PREFIX = "FlexASL"
"""Before the name of an architecture."""
KEY = "flexasl"
"""The part of vLLM's `additional_config` that is ours."""
ARCHITECTURES = (
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Those in the tests."""


def register() -> None:
    """Called by vLLM in each of its processes: names the model classes, which are made when one is asked for, and what
    is checked before such a model starts."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from flexasl.integrations.vllm.startup import Startup

    for architecture in ARCHITECTURES:
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"flexasl.integrations.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = Startup


def server_arguments(
    model: str,
    policy: str = "asl",
    config: ASLConfig | None = None,
    *,
    rank_by_question: bool = True,
    profile: str | bool | None = None,
    reports: str | None = None,
    max_model_len: int | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, and of vLLM's server, that serve a model (a folder or a hub id) with prompts pruned.

    policy and config are as for `flexasl.patch`, the policy as a text. rank_by_question: each prompt's question is
    found by the model's chat template. profile: a file of settings that calibration found; None: one that comes with
    the library; False: none. reports: a file that gets a line of JSON for each prompt. max_model_len: None for the
    model's. max_new_tokens: of an answer, at most; with kv_budget memory for one request is then that much and the
    budget. Weights keep the dtype that they are stored in. Raises `FlexASLError` for what cannot be honoured.
    """
    from transformers import AutoConfig

    from flexasl.checks import integer
    from flexasl.errors import UnsupportedError
    from flexasl.integrations.vllm.methods import Settings

    how: dict[str, Any] = {"rank_by_question": rank_by_question, "profile": profile, "reports": reports}
    settings = Settings(policy, config, **how, max_new_tokens=max_new_tokens)
    known = AutoConfig.from_pretrained(model)
    text = known.get_text_config(decoder=True)
    architecture = next(iter(known.architectures or ()), None)
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"model {model} is a {architecture}, which was not tested inside vLLM; tested are "
            + ", ".join(ARCHITECTURES)
        )
    longest = text.max_position_embeddings
    if max_model_len is not None:
        longest = integer("max_model_len", max_model_len, 1, longest)
    made = {
        "model": model,
        "max_model_len": longest,
        "max_num_batched_tokens": longest,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "hf_overrides": {"architectures": [PREFIX + architecture]},
        "additional_config": {KEY: settings.to_dict()},
    }
    stored = getattr(known, "dtype", None) or getattr(text, "dtype", None)
    if stored is not None:  # vLLM would make half precision of float32
        made["dtype"] = str(stored).removeprefix("torch.")
    if max_new_tokens is not None:  # what a request that names no length gets
        made["override_generation_config"] = {"max_new_tokens": max_new_tokens}
    return made
