"""`make gpu` where there is no GPU, and what it needs: no package that a GPU image with transformers may lack."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "pytest", "hypothesis", "safetensors", "rich", "matplotlib")
USE = """
import importlib.util, pathlib, sys, tempfile
absent = [name for name in ("gguf", "platformdirs", "accelerate", "peft", "torchao") if importlib.util.find_spec(name)]
assert not absent, absent
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import flexasl
shape = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval()
ids = torch.randint(3, 99, (1, 80))
config = flexasl.ASLConfig(select_tokens=40, kv_budget=40, max_layer=2)
with torch.no_grad(), flexasl.patch(model, config) as patch:
    cache = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert patch.report.rows[0].kept_tokens == 40 and "prefill" in str(patch.report)
    path = pathlib.Path(tempfile.mkdtemp()) / "cache.safetensors"
    cache.save(path)
    flexasl.load_cache(path, model)
    patch.report.plot(path.with_suffix(".png"))
print("used")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of a process that finds these packages and what they need, and no others."""
    folder, found, left = tmp_path_factory.mktemp("packages"), set(), list(PACKAGES)
    while left:
        name = left.pop()
        try:
            own = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system
        if own.name in found:
            continue
        found.add(own.name)
        wanted = (Requirement(text) for text in own.requires or ())
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in own.files or ()} - {"..", "__pycache__"}:
            place = Path(own.locate_file(top))
            if place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    assert {"torch", "transformers"} <= found and "gguf" not in found
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests", ROOT / "bench")))
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def run(bare, *arguments):
    """Without site-packages (-S)."""
    done = subprocess.run(
        [sys.executable, "-S", *map(str, arguments)], env=bare, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout + done.stderr


def test_the_library_needs_no_more_than_torch_and_transformers(bare):
    assert run(bare, "-c", USE).strip().endswith("used")


def test_the_tests_of_a_gpu_are_found(bare):
    listed = run(bare, "-c", "import gpu; print(*gpu.TESTS)").split()
    files = [ROOT / "tests" / name for name in listed]
    said = run(bare, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files)
    assert "error" not in said.lower() and int(said.strip().splitlines()[-1].split()[0]) > 400


@pytest.mark.skipif("cuda" in os.environ.get("FLEXASL_TEST_DEVICE", ""), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(bare):
    bare = bare | {"CUDA_VISIBLE_DEVICES": ""}
    said = run(bare, ROOT / "bench" / "gpu.py", "--tests")
    assert said == "no GPU to measure on; --quick runs tiny shapes on the CPU\n"
    made = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"],
        env=bare,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == said and not made.stderr


def test_it_writes_as_it_goes_and_goes_on_where_it_stopped(bare, tmp_path):
    command = ROOT / "bench" / "gpu.py", "--quick", "--no-compile", "--out", tmp_path / "gpu"
    run(bare, *command, "--seconds", "0")
    begun = json.loads((tmp_path / "gpu.json").read_text())
    assert not begun["prefill"] and {row["why"] for row in begun["left_out"]} == {
        "no time was left for one round",
        "no time was left for 2 rounds",
    }
    run(bare, *command)
    first = json.loads((tmp_path / "gpu.json").read_text())
    whats = {row["what"] for row in first["prefill"]}
    assert len(whats) == 6 and all(len(row["seconds"]) == 2 for row in first["prefill"]) and not first["left_out"]
    assert all(row["limit"] <= 1 for row in first["prefill"] if "limit" in row) and first["decode"]
    page = (tmp_path / "gpu.md").read_text()
    assert "## Goals" in page and page.count("| tiny |") == len(first["prefill"]) + len(first["decode"])
    # A round that is missing is measured, and nothing else.
    changed = json.loads(json.dumps(first))
    cut = changed["prefill"][3]
    cut["seconds"] = cut["seconds"][:1]
    for row in changed["prefill"]:
        if row["batch"] == cut["batch"] and row["tokens"] == cut["tokens"]:
            row["seconds"] = row["seconds"][:1]
    (tmp_path / "gpu.json").write_text(json.dumps(changed))
    run(bare, *command)
    again = json.loads((tmp_path / "gpu.json").read_text())
    for row, before in zip(again["prefill"], first["prefill"], strict=True):
        same = row["batch"] != cut["batch"] or row["tokens"] != cut["tokens"]
        assert len(row["seconds"]) == 2 and (row["seconds"] == before["seconds"]) == same
        assert row["seconds"][0] == before["seconds"][0]
    assert again["decode"] == first["decode"]
