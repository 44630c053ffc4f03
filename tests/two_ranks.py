"""Runs under torchrun: generates with a model that transformers' own plan splits over the ranks; see
test_tensor_parallel.py."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from models import GREEDY, SMALL, left_padded, prompts
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import flexasl

CONFIGS = {
    "full": None,
    "keep_all": SMALL.replace(select_tokens=1.0),
    "tokens": SMALL,
    "tokens_and_cache": SMALL.replace(kv_budget=16),
    "tokens_and_top_p": SMALL.replace(kv_top_p=0.7),
    "mask": SMALL.replace(propagate="mask"),
    "squares": SMALL.replace(score_power=2, kv_budget=16),
    "highest": SMALL.replace(score_power="max", pooling="maxpool"),
}
ROWS = (90, 61, 9, 33)


def run(model) -> dict:
    """By setting: tokens, logits, and per row and layer what was decided."""
    batch, results = left_padded(prompts(*ROWS, seed=1)), {}
    for name, config in CONFIGS.items():
        patch = None if config is None else flexasl.patch(model, config)
        out = model.generate(**batch, max_new_tokens=6, output_logits=True, **GREEDY)
        result = {"tokens": out.sequences, "logits": torch.stack(out.logits, 1)}
        if patch is not None:
            patch.remove()
            result["layers"] = [row.selected_layer for row in patch.report.rows]
            result["kept"] = [row.kept_positions for row in patch.report.rows]
            result["variance"] = [row.variance for row in patch.report.rows]
            # Per head, which entries a row's cache has: heads of one rank follow those of the rank before.
            result["columns"] = [_columns(layer) for layer in out.past_key_values.layers]
            result["kv_bytes"] = patch.report.kv_bytes
        results[name] = result
    return results


def _columns(layer) -> list[list[list[int]]]:
    """[heads][rows] of the columns that are cached."""
    shape = (layer.keys.shape[0], layer.keys.shape[1], layer.keys.shape[2])
    columns, valid = layer.positions, layer.valid
    columns = columns if columns.dim() == 3 else columns[:, None].expand(shape)
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else valid if valid.dim() == 3 else valid[:, None]
    valid = valid.expand(shape)
    return [[columns[row, head][valid[row, head]].tolist() for row in range(shape[0])] for head in range(shape[1])]


def load(folder: Path, **sizes):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        distributed_config=DistributedConfig(**sizes),
        experts_implementation="eager",  # the grouped products of experts know no float64
    ).eval()


def refusal(model, **settings) -> str:
    try:
        flexasl.patch(model, SMALL, **settings)
    except flexasl.UnsupportedError as error:
        return str(error)
    raise AssertionError("not refused")


def main(folder: Path) -> None:
    warnings.simplefilter("error", UserWarning)
    results = {}
    for family in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        model = load(folder / family, tp_size=2)
        results[family] = run(model)
    results["compile"] = refusal(model, compile=True)
    model.config.num_key_value_heads = 1
    results["heads"] = refusal(model)
    results["pipeline"] = refusal(load(folder / "llama", pp_size=2))
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
