"""Tiny random models on disk, engines of vLLM in this process, and what transformers makes of the same prompts."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.plugins import load_general_plugins

import flexasl
from flexasl.integrations import vllm as plugin

load_general_plugins()

VOCAB, LAYERS = 199, 6
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {},
    "mixtral": MOE,
    "qwen3_moe": MOE,
}
STAGED = flexasl.ASLConfig(
    select_tokens=24,
    window=8,
    kernel_size=3,
    pooling="maxpool",
    stages=flexasl.Stage(tokens=0.5, tau=0.25, min_layer=1, max_layer=2),
    min_layer=2,
    min_layer_unasked=2,
    max_layer=4,
    tau=0.2,
)
"""Loose and final selections from short prompts, by the rule of look-ups."""
VARIANCE = flexasl.ASLConfig(
    select_tokens=24, window=8, kernel_size=3, observe_layers=2, min_layer=1, max_layer=3, tau=0.9
)
LEAN = STAGED.replace(kv_budget=24)
ROOM = 16 * 2**20
"""Bytes of KV memory, which is plenty."""


@functools.cache
def home() -> Path:
    return Path(tempfile.mkdtemp(prefix="flexasl-vllm-"))


@functools.cache
def folder(family: str) -> str:
    """The family's tiny model, as `from_pretrained` reads it."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(SHAPE | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    place = home() / family
    model.save_pretrained(place)
    return str(place)


@functools.cache
def reference(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32).eval().requires_grad_(False)


@functools.cache
def _known(name: str) -> None:
    """Registers the class itself, which spares a process that would import everything to look at it."""
    from flexasl.integrations.vllm import models

    ModelRegistry.register_model(name, getattr(models, name))


@contextlib.contextmanager
def engine(family: str, config: Any = STAGED, policy: str = "asl", **how: Any) -> Iterator[LLM]:
    """vLLM over a tiny model, pruned as the plug-in does it."""
    own = {key: how.pop(key) for key in ("max_new_tokens", "reports") if key in how}
    made = plugin.server_arguments(folder(family), policy, config, rank_by_question=False, **own)
    _known(made["hf_overrides"]["architectures"][0])
    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": ROOM,
        "block_size": 32,
        "max_num_seqs": 8,
        "disable_log_stats": True,
    }
    llm = LLM(**(made | defaults | how))
    try:
        yield llm
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def params(count: int = 6, **extra: Any) -> SamplingParams:
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=count, extra_args=extra or None, **greedy)


def run(llm: LLM, given: Sequence[Sequence[int]], sampling: Any) -> tuple[list[list[int]], list[flexasl.Report]]:
    """Tokens and reports, in the order of the prompts."""
    out = llm.generate([{"prompt_token_ids": list(ids)} for ids in given], sampling, use_tqdm=False)
    reports = pruning(llm).reports
    found = [next(reports[name] for name in reversed(reports) if name.split("-")[0] == one.request_id) for one in out]
    return [list(one.outputs[0].token_ids) for one in out], found


def model_of(llm: LLM) -> Any:
    """The model inside an engine of this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()


def pruning(llm: LLM) -> Any:
    """Its adapter."""
    return model_of(llm).flexasl


def want(
    family: str, given: Sequence[Sequence[int]], config: Any, policy: str = "asl", count: int = 6, **asking: Any
) -> tuple[list[list[int]], list[Any]]:
    """The same by transformers, each prompt alone."""
    model, tokens, rows = reference(family), [], []
    with flexasl.patch(model, config, policy=policy, **asking) as patch:
        for ids in given:
            prompt = torch.tensor([list(ids)])
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None
            )
            tokens.append(out[0, len(ids) :].tolist())
            rows.append(patch.report)
    return tokens, rows
