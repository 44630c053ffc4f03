"""Models as they come: offloaded, quantised, with adapters, in half precision, from sharded checkpoints, and under
versions of transformers that nobody has tried."""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import GREEDY, LAYERS, SMALL, left_padded, prompts, tiny
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import flexasl
from flexasl import UnsupportedError
from flexasl.integrations.transformers import models

pytestmark = pytest.mark.cpu("loads models from files")

CPU = torch.device("cpu")
KEEP_ALL = SMALL.replace(select_tokens=1.0)
TIGHT = SMALL.replace(kv_budget=16)
BATCH = left_padded(prompts(70, 41))
ORDERS = ("patch_last", "patch_first")


def generate(model):
    return model.generate(**BATCH, max_new_tokens=6, output_logits=True, **GREEDY)


def pruned(model, config=TIGHT):
    """Tokens, logits and kept positions of the patched model."""
    with flexasl.patch(model, config) as patch:
        return results(model, patch)


def results(model, patch):
    out = generate(model)
    return out.sequences, torch.stack(out.logits), [row.kept_positions for row in patch.report.rows]


def check_same(got, want):
    assert torch.equal(got[0], want[0]) and got[2] == want[2]
    assert max(map(len, got[2])) < 70
    # Products round by where weights lie in memory.
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=rounding(want[1]))


def rounding(logits):
    """A few times the spacing of numbers as large as the largest logit."""
    return 8 * torch.finfo(logits.dtype).eps * logits.abs().max().item()


def two_steps(model):
    """Logits of the prompt and of the token after it."""
    out = model(**BATCH)
    mask = torch.cat([BATCH["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    after = model(torch.full((2, 1), 5), attention_mask=mask, past_key_values=out.past_key_values)
    return [out.logits[BATCH["attention_mask"].bool()], after.logits]


def offload_all(model, folder):
    return cpu_offload(model, CPU)


def offload_to_disk(model, folder):
    return disk_offload(model, folder, CPU)


def dispatch(model, folder):
    places = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(LAYERS)}
    places |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("offload", [offload_all, offload_to_disk, dispatch])
def test_offloaded_weights(offload, order, tmp_path):
    want, model = pruned(tiny()), copy.deepcopy(tiny())
    if order == "patch_last":
        offload(model, tmp_path)
    patch = flexasl.patch(model, TIGHT)
    if order == "patch_first":
        offload(model, tmp_path)
    check_same(results(model, patch), want)
    assert any(parameter.is_meta for parameter in model.parameters())
    patch.remove()
    plain = generate(model).sequences
    with flexasl.patch(model, KEEP_ALL):
        assert torch.equal(generate(model).sequences, plain)
    assert torch.equal(generate(tiny()).sequences, plain)


def test_offloading_with_from_pretrained(tmp_path):
    tiny().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    places = {"model": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=places, offload_folder=tmp_path / "weights"
    )
    assert model.lm_head.weight.is_meta
    check_same(pruned(model.eval()), pruned(tiny()))


def test_an_offloaded_model_that_is_not_among_the_tested_ones(monkeypatch):
    monkeypatch.setattr(models, "SUPPORTED", ())
    check_same(pruned(cpu_offload(copy.deepcopy(tiny()), CPU)), pruned(tiny()))


def test_refuses_compiled_layers_where_accelerate_has_hooks():
    with pytest.raises(UnsupportedError, match="compile=True cannot take LlamaForCausalLM, because another library"):
        flexasl.patch(cpu_offload(copy.deepcopy(tiny()), CPU), TIGHT, compile=True)


def test_refuses_several_devices_that_compute():
    model = cpu_offload(copy.deepcopy(tiny()), CPU)
    add_hook_to_module(model.model.layers[3], AlignDevicesHook(execution_device=torch.device("meta", 1)), append=True)
    with pytest.raises(UnsupportedError, match=r"computes on several devices \(cpu, meta:1\); give a device_map with"):
        flexasl.patch(model, TIGHT)


def test_refuses_pipeline_stages():
    class Stage:
        pp_size = 2

    model = copy.deepcopy(tiny())
    model._pp_stage = Stage()
    with pytest.raises(UnsupportedError, match=r"split into 2 pipeline stages.* DistributedConfig\(tp_size=2\)"):
        flexasl.patch(model, TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_weights(quantization, dtype):
    model, first = copy.deepcopy(tiny("llama", dtype)), copy.deepcopy(tiny("llama", dtype))
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, getattr(torchao, quantization)())
    want = two_steps(model)
    assert not torch.equal(want[0], two_steps(first)[0])
    model.set_attn_implementation("eager")
    # Int8 activations round rounding up: two attentions of transformers differ by a share of a logit.
    apart = max((one - other).abs().max().item() for one, other in zip(two_steps(model), want))
    model.set_attn_implementation("sdpa")
    with flexasl.patch(model, KEEP_ALL):
        for one, other in zip(two_steps(model), want):
            torch.testing.assert_close(one, other, rtol=0, atol=apart)
    got = pruned(model)
    assert got[1].isfinite().all()
    with flexasl.patch(first, TIGHT) as patch:
        torchao.quantize_(first, getattr(torchao, quantization)())
        check_same(results(first, patch), got)


LORA = LoraConfig(
    r=4,
    target_modules=["q_proj", "v_proj", "down_proj"],
    lora_dropout=0.1,
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)


def adapted(model):
    torch.manual_seed(5)
    return get_peft_model(model, LORA).eval()


def test_lora_adapters_before_and_after_the_patch():
    first = copy.deepcopy(tiny())
    patch = flexasl.patch(first, TIGHT)
    inner = results(adapted(first), patch)
    model = adapted(copy.deepcopy(tiny()))
    plain = generate(model).sequences
    assert not torch.equal(plain, generate(tiny()).sequences)
    check_same(inner, pruned(model))
    check_same(inner, pruned(model.get_base_model()))
    with flexasl.patch(model, KEEP_ALL) as patch:
        assert model.flexasl_patch is patch
        assert torch.equal(generate(model).sequences, plain)
        with pytest.raises(UnsupportedError, match="LlamaForCausalLM is patched already"):
            flexasl.patch(model)
        with model.disable_adapter():
            assert torch.equal(generate(model).sequences, generate(tiny()).sequences)
    assert torch.equal(generate(model).sequences, plain)


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_adapters_that_go_while_the_model_is_patched(way):
    model = adapted(copy.deepcopy(tiny()))
    with flexasl.patch(model, TIGHT) as patch:
        bare = getattr(model, way)()
        got = results(bare, patch)
    if way == "unload":
        check_same(got, pruned(tiny()))
    else:
        check_same(got, pruned(adapted(copy.deepcopy(tiny())).merge_and_unload()))
    assert bare.config._attn_implementation == "sdpa" and "generate" not in vars(bare)


def test_adapters_that_transformers_adds():
    model = copy.deepcopy(tiny())
    with flexasl.patch(model, TIGHT) as patch:
        torch.manual_seed(5)
        model.add_adapter(LORA)
        got = results(model.eval(), patch)
    check_same(got, pruned(adapted(copy.deepcopy(tiny()))))


def test_refuses_adapters_that_are_tokens():
    model = get_peft_model(copy.deepcopy(tiny()), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="adapter of type PREFIX_TUNING, which puts tokens of its own before"):
        flexasl.patch(model.eval(), TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sharded_checkpoints(dtype, tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    want = generate(model)
    with flexasl.patch(model, KEEP_ALL):
        got = generate(model)
    assert got.past_key_values.layers[0].keys.dtype == dtype
    torch.testing.assert_close(got.logits[0], want.logits[0], rtol=0, atol=rounding(want.logits[0].to(dtype)))
    if dtype == torch.float32:
        check_same(pruned(model), pruned(tiny()))
    else:
        _, logits, kept = pruned(model)
        assert logits.isfinite().all() and list(map(len, kept)) == [24, 24]


def test_an_unknown_newer_transformers_warns_once_and_is_checked_by_running(monkeypatch):
    want, ran = pruned(tiny()), []
    monkeypatch.setattr(models.transformers, "__version__", "5.99.0")
    models._is_tested.cache_clear()
    handle = tiny().model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ran.clear()
            with flexasl.patch(tiny(), TIGHT) as patch:
                assert ran
                check_same(results(tiny(), patch), want)
    handle.remove()
    models._is_tested.cache_clear()
    ours = [warning for warning in caught if "flexasl" in str(warning.message)]
    newest = models.TESTED[1]
    assert [str(warning.message).partition(",")[0] for warning in ours] == [
        f"transformers 5.99.0 is newer than {newest}"
    ]
    assert ours[0].filename == __file__
