"""The `custom_generate` folder through transformers' own loader."""

from pathlib import Path

import pytest
import torch
from models import GREEDY, SMALL, left_padded, prompts, tiny
from transformers import AutoModelForCausalLM, dynamic_module_utils

import flexasl
from flexasl import ConfigError, UnsupportedError

pytestmark = pytest.mark.cpu("loads models from files")

RECIPE = Path(flexasl.__file__).parent / "integrations"
SETTINGS = {f"asl_{name}": value for name, value in SMALL.to_dict().items()}


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """transformers copies the folder to where it imports it from."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def recipe(model, batch, **settings):
    return model.generate(
        **batch, max_new_tokens=8, custom_generate=str(RECIPE), trust_remote_code=True, **GREEDY, **settings
    )


def state(model):
    return set(vars(model)), sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (SETTINGS, SMALL),
        ({"asl_config": SMALL}, SMALL),
        ({"asl_config": SMALL.to_dict(), "asl_kv_budget": 16}, SMALL.replace(kv_budget=16)),
        ({"asl_config": SMALL, "asl_kv_top_p": 0.7, "asl_kernel": "eager"}, SMALL.replace(kv_top_p=0.7)),
    ],
)
def test_gives_what_a_patch_gives_and_leaves_no_trace(settings, config):
    model, batch, reports = tiny(), left_padded(prompts(70, 41)), []
    before = state(model)
    out = recipe(model, batch, asl_on_report=reports.append, **settings)
    assert state(model) == before and model.config._attn_implementation == "sdpa"
    with flexasl.patch(model, config) as patch:
        want = model.generate(**batch, max_new_tokens=8, **GREEDY)
    assert torch.equal(out.sequences, want.sequences)
    assert [row.kept_positions for row in reports[0].rows] == [row.kept_positions for row in patch.report.rows]
    assert reports[0].kv_bytes == patch.report.kv_bytes < patch.report.kv_bytes_full


def test_takes_a_policy():
    model, batch, reports = tiny(), left_padded(prompts(70)), []
    given = {"asl_select_tokens": 24, "asl_window": 8, "asl_on_report": reports.append}
    recipe(model, batch, asl_policy=flexasl.policies.FixedLayer(2), **given)
    recipe(model, batch, asl_policy="fixed_layer:layer=3", **given)
    assert [report.rows[0].selected_layer for report in reports] == [2, 3]


def test_the_patch_goes_when_generation_fails():
    model, batch = tiny(), left_padded(prompts(70))
    before = state(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        recipe(model, batch, **SETTINGS)
    handle.remove()
    assert state(model) == before and model.config._attn_implementation == "sdpa"


def test_refuses_what_it_cannot_do():
    model, batch = tiny(), left_padded(prompts(70))
    with pytest.raises(ConfigError, match="'budget' is not a setting of ASLConfig; the settings are select_tokens"):
        recipe(model, batch, asl_budget=3)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=16 is not available on a patched model"):
        recipe(model, batch, prefill_chunk_size=16, **SETTINGS)
    with flexasl.patch(model, SMALL), pytest.raises(UnsupportedError, match="patched already; call generate without"):
        recipe(model, batch, **SETTINGS)
    assert not hasattr(model, "flexasl_patch")


def test_a_repository_with_the_folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "model/custom_generate").mkdir()
    for file in (RECIPE / "custom_generate").iterdir():
        if file.is_file():
            (tmp_path / "model/custom_generate" / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    ids, reports = prompts(70)[0][None], []
    own = model.generate
    out = model.generate(input_ids=ids, max_new_tokens=8, asl_on_report=reports.append, **GREEDY, **SETTINGS)
    assert model.generate is own and reports[0].rows[0].pruned
    with flexasl.patch(tiny(), SMALL):
        want = tiny().generate(ids, max_new_tokens=8, **GREEDY)
    assert torch.equal(out.sequences, want.sequences)
    flexasl.patch(model, SMALL).remove()
    assert model.generate is own
