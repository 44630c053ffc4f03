"""Tiny models and batches on the device of a test, which the fixture `device` gives: a GPU where there is one."""

import copy
import functools

import pytest
import torch
from models import FAMILIES, GREEDY, left_padded, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FEATURED = ["llama", "mistral_sliding", "gemma2", "gpt_oss"]
"""Families of each kind of attention: plain, sliding, with soft-cap, with sinks."""
EXPERTS = [family for family in FAMILIES if "num_experts_per_tok" in FAMILIES[family]]


@functools.cache
def model_on(device, family="llama", dtype=torch.float32):
    """The family's tiny model on a device; shared, so leave it as it was."""
    return copy.deepcopy(tiny(family, dtype)).to(device)


def batch_on(device, rows):
    """input_ids, attention_mask and position_ids of left-padded rows, on a device."""
    batch = left_padded(rows)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {name: states.to(device) for name, states in batch.items()}


def generate(model, rows, count=6, **settings):
    """Output of `generate` for left-padded rows, and its logits [B, count, V] on the CPU."""
    batch = batch_on(model.device, rows)
    del batch["position_ids"]  # which generate makes
    out = model.generate(**batch, max_new_tokens=count, output_logits=True, **(GREEDY | settings))
    return out, torch.stack(out.logits, 1).cpu()


def decided(report):
    """What was decided of each row."""
    return [(row.selected_layer, row.kept_positions) for row in report.rows]
