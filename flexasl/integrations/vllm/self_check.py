"""Whether the plug-in works in a release of vLLM that the tests have not passed with: a tiny random model answers the
same inside vLLM and in transformers.

    python -m flexasl.integrations.vllm.self_check

It runs in a process of its own, which takes about half a minute, and exits with 1 and the reason where it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

from flexasl.errors import UnsupportedError
from flexasl.report import Report, RowReport

CHECKED = "FLEXASL_VLLM_CHECKED"
"""The environment variable that names the release that was checked; vLLM's processes inherit it."""
LENGTHS = (150, 40, 90, 24)
SHAPE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
"""Environment of the check: its engine runs in its own process."""
FAILED = "the check failed: "


def check_once(version: str) -> None:
    """Runs the check, unless it passed in a parent of this process.

    Raises:
        UnsupportedError: the answers differ, or vLLM did not run.
    """
    if os.environ.get(CHECKED) == version:
        return
    command = [sys.executable, "-m", "flexasl.integrations.vllm.self_check"]
    ran = subprocess.run(command, env=os.environ | ALONE | {CHECKED: version}, capture_output=True, text=True)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        why = next((line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)), lines[-1])
        raise UnsupportedError(f"flexasl does not work with vLLM {version}: a tiny model failed the check: {why}")
    os.environ[CHECKED] = version


def check() -> None:
    """Compares tokens, selections and kept positions of a tiny model in vLLM, in this process, with those of
    `flexasl.patch`.

    Raises:
        UnsupportedError: they differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import flexasl

    stages = (flexasl.Stage(tokens=0.5, tau=0.25, min_layer=1, max_layer=2),)
    config = flexasl.ASLConfig(
        select_tokens=24,
        kv_budget=24,
        window=8,
        kernel_size=3,
        stages=stages,
        min_layer=2,
        min_layer_unasked=2,
        max_layer=4,
        tau=0.2,
    )
    generator = torch.Generator("cpu").manual_seed(0)
    prompts = [
        torch.randint(3, SHAPE["vocab_size"], (1, length), generator=generator, dtype=torch.int64, device="cpu")
        for length in LENGTHS
    ]
    with tempfile.TemporaryDirectory(prefix="flexasl-") as folder:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float32)
        model.eval().save_pretrained(folder)
        wanted: list[tuple[list[int], flexasl.RowReport]] = []
        with flexasl.patch(model, config, profile=False) as patch:
            for ids in prompts:
                how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
                out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
                assert patch.report is not None
                wanted.append((out[0, ids.shape[1] :].tolist(), patch.report.rows[0]))
        found = _answers(folder, config, [ids[0].tolist() for ids in prompts])
    for length, (tokens, row), (own_tokens, own_row) in zip(LENGTHS, wanted, found, strict=True):
        for what in ("selections", "kept_positions"):
            if getattr(row, what) != getattr(own_row, what):
                raise UnsupportedError(f"{what} of {length} tokens differ from those in transformers")
        if tokens != own_tokens:
            raise UnsupportedError(f"{length} tokens are answered by {own_tokens}, in transformers by {tokens}")


def _answers(folder: str, config: Any, prompts: list[list[int]]) -> list[tuple[list[int], RowReport]]:
    """By vLLM: tokens and the report of each prompt."""
    from vllm import LLM, SamplingParams

    from flexasl.integrations.vllm import server_arguments

    made = server_arguments(folder, "asl", config, rank_by_question=False, profile=False)
    bare = {"skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_memory_bytes": 2**24, "max_num_seqs": 8}
    llm = LLM(**(made | bare))
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    reports, *_ = llm.collective_rpc("flexasl_reports")
    by_request = {name.split("-")[0]: Report.from_dict(report) for name, report in reports.items()}
    return [(list(one.outputs[0].token_ids), by_request[one.request_id].rows[0]) for one in out]


if __name__ == "__main__":
    os.environ |= ALONE
    try:
        check()
    except UnsupportedError as error:
        sys.exit(f"{FAILED}{error}")
