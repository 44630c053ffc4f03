"""What a prefill holds and computes: its peak, in processes of their own, by `bench/memory.py`, and layer by layer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import SMALL, decoder_layers, left_padded, prompts, tiny

import flexasl
from flexasl.layer_step import LayerStep
from flexasl.ops import scoring

BENCH = Path(__file__).parents[1] / "bench" / "memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
@pytest.mark.parametrize("model", ["random", pytest.param("embedded", marks=pytest.mark.slow)])
def test_peak_of_a_prefill_at_8k_is_below_the_unpatched_models(model, tmp_path):
    out = tmp_path / "memory"
    command = [sys.executable, BENCH, "--model", model, "--tokens", "8000", "--out", out]
    subprocess.run(command, check=True, capture_output=True, cwd=BENCH.parents[1])
    cases = json.loads(out.with_suffix(".json").read_text())["cases"]
    full, pruned, small = cases.values()
    # A quarter of the layers keep 512 of 8,000 tokens; with a cache budget all of them do.
    assert pruned["cache"] < 0.8 * full["cache"] and small["cache"] < 0.07 * full["cache"]
    assert full["prefill"] - pruned["prefill"] > 0.5 * (full["cache"] - pruned["cache"])
    assert full["prefill"] - small["prefill"] > 0.5 * (full["cache"] - small["cache"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "deepseek_v3"])
def test_the_rest_of_a_layer_holds_keys_values_and_the_queries_that_are_scored(family, monkeypatch):
    """Also where queries, keys and values are parts of one tensor."""
    model, steps, attend = tiny(family), [], LayerStep.attend
    monkeypatch.setattr(LayerStep, "attend", lambda self, *states: (steps.append(self), attend(self, *states))[1])
    held, layer = [], decoder_layers(model)[0]

    def look(*ignored):
        query, key, cached = steps[-1].query, steps[-1].key, steps[-1].cached
        parts = {part.data_ptr(): part for part in (query, key, *cached)}.values()
        held.append((query.shape[2], [part.untyped_storage().nbytes() - part.nbytes for part in parts]))

    handle = layer.mlp.register_forward_pre_hook(look)
    try:
        with flexasl.patch(model, SMALL, foreign_hooks="packed"):
            model(**left_padded(prompts(90, 70)), use_cache=True)
    finally:
        handle.remove()
    ((queries, more),) = held
    assert queries == 2 * SMALL.window and not any(more)


def test_kv_top_p_scores_a_layer_once(monkeypatch):
    seen, mass = [], scoring.window_mass
    monkeypatch.setattr(scoring, "window_mass", lambda *states: (seen.append(len(states[0])), mass(*states))[1])
    with flexasl.patch(tiny(), SMALL.replace(kv_top_p=0.5)) as patch:
        tiny()(prompts(90)[0][None], use_cache=True)
    assert seen == [1] * len(patch.report.rows[0].scored_layers)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_what_a_decision_holds_grows_with_the_tokens_and_no_faster(tmp_path):
    """From 131,072 to 1,048,576 tokens; bytes a token as docs/benchmarks/long.md has them, and a tenth more."""
    most = {
        "scoring": 610,
        "ranking": 36,
        "rank variance": 107,
        "selection and dropping": 25,
        "the rule of look-ups, three layers": 50,
    }
    long = BENCH.with_name("long.py")
    command = [sys.executable, long, "--runs", "1", "--tokens", "131072", "1048576", "--out", tmp_path / "long"]
    subprocess.run(command, check=True, capture_output=True, cwd=BENCH.parents[1])
    cases = json.loads((tmp_path / "long.json").read_text())["cases"]
    for few, many in zip(cases[::2], cases[1::2], strict=True):
        assert few["part"] == many["part"] and many["tokens"] == 8 * few["tokens"]
        assert many["peak"] < most[few["part"]] * many["tokens"], few["part"]
        # Of few tokens, up to a MiB may find room in memory that was there before.
        assert many["peak"] < 8 * (few["peak"] + 2**20) + 4 * 2**20, few["part"]
