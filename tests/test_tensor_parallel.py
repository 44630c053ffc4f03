"""A model split over two processes by transformers' own plan against the same model in one."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import VOCAB, tiny
from two_ranks import CONFIGS, run

pytestmark = pytest.mark.cpu("processes of the CPU, over gloo")

SPLITS_HEADS = {"gpt_oss": False, "llama": True}
"""Families in the order in which they are run, and whether their plan gives each rank a part of the heads."""


@functools.cache
def even(family):
    """The tiny model with a vocabulary that can be halved, which older plans need."""
    model = copy.deepcopy(tiny(family, torch.float64))
    model.resize_token_embeddings(VOCAB + 1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw, by rank."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in SPLITS_HEADS:
        even(family).save_pretrained(folder / family, max_shard_size="200KB")
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    return {family: run(even(family)) for family in SPLITS_HEADS}


@pytest.mark.parametrize("setting", CONFIGS)
@pytest.mark.parametrize("family", SPLITS_HEADS)
def test_two_processes_give_what_one_gives(ranks, alone, family, setting):
    want = alone[family][setting]
    for rank in ranks:
        got = rank[family][setting]
        assert torch.equal(got["tokens"], want["tokens"])
        torch.testing.assert_close(got["logits"], want["logits"], rtol=0, atol=1e-9)
        for decided in ("layers", "kept", "variance"):
            assert got.get(decided) == want.get(decided)


@pytest.mark.parametrize("setting", [name for name, config in CONFIGS.items() if config is not None])
@pytest.mark.parametrize("family", SPLITS_HEADS)
def test_each_rank_caches_its_own_heads(ranks, alone, family, setting):
    want = alone[family][setting]
    parts = [rank[family][setting] for rank in ranks]
    for layer, heads in enumerate(want["columns"]):
        if SPLITS_HEADS[family]:
            assert [head for part in parts for head in part["columns"][layer]] == heads
        else:
            assert all(part["columns"][layer] == heads for part in parts)
    # A head is stored as long as the longest of its rank.
    assert sum(part["kv_bytes"] for part in parts) <= (1 if SPLITS_HEADS[family] else 2) * want["kv_bytes"]


@pytest.mark.parametrize("family", SPLITS_HEADS)
def test_ranks_agree_to_the_bit(ranks, family):
    one, other = (rank[family]["tokens"] for rank in ranks)
    assert torch.equal(one["logits"], other["logits"])
    assert any(layer is not None for layer in one["layers"])


def test_refusals(ranks):
    for rank in ranks:
        assert "compile=True cannot take LlamaForCausalLM, which is split over 2 processes" in rank["compile"]
        assert "tp_size=2 splits a head of LlamaForCausalLM (num_attention_heads=4" in rank["heads"]
        assert "LlamaForCausalLM is split into 2 pipeline stages" in rank["pipeline"]
        assert "load it with DistributedConfig(tp_size=2)" in rank["pipeline"]
