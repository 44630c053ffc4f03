"""Peak memory of a prefill, in processes of their own, by `bench/memory.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
