"""Runs under torchrun: generates with decoders that torchtitan spreads over two processes; see test_torchtitan.py."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from decoders import DECODERS, VOCAB, tiny
from models import SMALL, prompts
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.qwen3 import parallelize_qwen3

import flexasl
from flexasl.integrations.torchtitan import generate

PARALLELIZE = {"llama3": parallelize_llama, "qwen3": parallelize_qwen3}
CONFIGS = {
    "keep_all": SMALL.replace(select_tokens=1.0),
    "tokens": SMALL,
    "tokens_and_cache": SMALL.replace(kv_budget=16),
}
LENGTHS, NEW = (90, 61, 33), 6


def batch(rank=0):
    rows = prompts(*LENGTHS, seed=1 + rank)
    width = max(map(len, rows))
    return torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])


def run(model, prompt):
    """By setting: tokens, and what was decided."""
    results = {}
    for name, config in CONFIGS.items():
        with flexasl.patch(model, config) as patch:
            tokens = generate(model, prompt, max_new_tokens=NEW, pad_id=0)
        rows = patch.report.rows
        results[name] = {
            "tokens": tokens,
            "layers": [row.selected_layer for row in rows],
            "kept": [row.kept_positions for row in rows],
            "kv_bytes": patch.report.kv_bytes,
        }
    return results


@contextmanager
def spread(name, *, backend="partial_dtensor", enable_sp=False, **degrees):
    """The decoder over two processes, in the context that it runs in."""
    set_spmd_backend(backend)
    make, set_sharding = DECODERS[name]
    config = make()
    set_sharding(config, enable_sp=enable_sp, **({"enable_ep": False} if name == "qwen3" else {}))
    sizes = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1} | degrees
    dims = ParallelDims(**sizes, world_size=2, spmd_backend=backend)
    dims.build_mesh()
    model = tiny(name, config)
    if backend == "spmd_types":
        model.parallelize(dims)  # torch 2.13 cannot shard by FSDP what is spread so
    else:
        model = PARALLELIZE[name](
            model,
            parallel_dims=dims,
            training=TrainingConfig(mixed_precision_param="float32"),
            parallelism=ParallelismConfig(spmd_backend=backend),
            compile_config=CompileConfig(),
            ac_config=None,
            dump_folder="",
        )
    with get_spmd_context(parallel_dims=dims)():
        yield model.eval().requires_grad_(False)


def refusal(model):
    try:
        flexasl.patch(model, SMALL)
    except flexasl.UnsupportedError as error:
        return str(error)
    raise AssertionError("not refused")


WAYS = {
    "tensor": {"tp": 2},
    "sequence": {"tp": 2, "enable_sp": True},
    "spmd_types": {"tp": 2, "backend": "spmd_types"},
    "fsdp": {"dp_shard": 2},
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    parallel_dims.device_type = "cpu"  # where there is no accelerator torchtitan takes "cuda" all the same
    rank, results = dist.get_rank(), {}
    for name in DECODERS:
        for way, settings in WAYS.items():
            with spread(name, **settings) as model:
                own = rank if way == "fsdp" else 0
                results[name, way] = run(model, batch(own))
    with spread("llama3", dp_shard=2) as model, flexasl.patch(model, SMALL):
        prompt = batch(rank)[:1]
        first = generate(model, prompt, max_new_tokens=1)[0, -1].item()
        # One rank stops at once and goes on making passes with the other.
        results["stopped"] = generate(model, prompt, max_new_tokens=NEW, stop_ids={first} if rank == 0 else {VOCAB})
    with spread("llama3", cp=2) as model:
        results["context"] = refusal(model)
    with spread("llama3", tp=2, enable_sp=True, backend="spmd_types") as model:
        results["sequence"] = refusal(model)
    with spread("llama3", tp=2) as model:
        set_spmd_backend("full_dtensor")
        results["full_dtensor"] = refusal(model)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
