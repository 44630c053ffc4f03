"""The process's default dtype and device are the user's: they change nothing."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from models import GREEDY, SHAPE, SMALL, STAGED, left_padded, prompts, tiny
from transformers import AutoConfig, AutoModelForCausalLM

import flexasl

pytestmark = pytest.mark.places

FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}


def factory_calls():
    folder = Path(flexasl.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        for call in calls:
            owner, _, name = ast.unparse(call.func).rpartition(".")
            if owner == "torch" and name in FACTORIES:
                yield f"{path.relative_to(folder)}:{call.lineno}", {word.arg for word in call.keywords}


def test_every_tensor_is_made_with_its_dtype_and_device():
    calls = dict(factory_calls())
    assert len(calls) > 40, "the calls are found"
    assert [place for place, given in calls.items() if not {"dtype", "device"} <= given] == []


@contextlib.contextmanager
def default(kind):
    """kind: a dtype or a device, as the process's default."""
    if isinstance(kind, str):
        with torch.device(kind):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


INPUTS, MORE = left_padded(prompts(90, 70)), prompts(40, seed=4)[0][None]
STATES = [torch.randn(6, 1, heads, 60, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2)]
SMALLER = SMALL.replace(kv_budget=20, later_turns="prune")
RULES = {
    **{family: (family, SMALLER, "asl") for family in ("llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2")},
    "stages": ("gemma2", STAGED.replace(kv_budget=20, later_turns="prune"), "asl"),
    "masked stages": ("llama", STAGED.replace(propagate="mask"), "asl"),
    "kv_top_p": ("llama", SMALL.replace(kv_top_p=0.5), "asl"),
    "mask": ("gemma2", SMALL.replace(propagate="mask"), "asl"),
    "asl_two_pass": ("llama", SMALL, "asl_two_pass"),
    "pyramid_infer": ("llama", flexasl.ASLConfig(select_tokens=24, window=8), "pyramid_infer"),
    "streaming": ("llama", flexasl.ASLConfig(select_tokens=24, window=8), "streaming"),
}


def everything(rule, path):
    """Logits and cache entries of prompts, of decode, of a later turn and of a saved cache, and a replay."""
    family, config, policy = RULES[rule]
    model, found = tiny(family), []
    with flexasl.patch(model, config, policy) as patch:
        out = model.generate(**INPUTS, max_new_tokens=3, output_logits=True, **GREEDY)
        report = patch.report
        assert report.rows[0].pruned or report.kv_share < 0.5
        found += [out.sequences, *out.logits]
        one = model(INPUTS["input_ids"][:1], use_cache=True)
        one.past_key_values.save(path)
        held = flexasl.load_cache(path, model)
        for _ in range(2):
            found += [part for layer in held.layers for part in (layer.keys, layer.values, layer.positions)]
            found.append(model(MORE, past_key_values=held).logits)
    replayed = [flexasl.replay(*STATES, config)[0] for config in (SMALLER, STAGED)]
    told = [(one.selected.tolist(), one.variance, one.lookup) for one in replayed]
    return found, report.to_dict() | {"prefill_seconds": 0}, told


@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_is_read_and_continued_as_ever(rule, tmp_path):
    want, *told = everything(rule, tmp_path / "cache")
    for kind in (torch.bfloat16, torch.float16, torch.float64, "meta"):
        with default(kind):
            got, *same = everything(rule, tmp_path / "cache")
        assert same == told
        for mine, its in zip(got, want, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, "meta"])
def test_a_model_that_is_tried_when_patched_is_tried_as_ever(kind):
    shape = {name: value for name, value in SHAPE.items() if name != "initializer_range"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", **shape)).eval()
    with default(kind), flexasl.patch(model, SMALL) as patch:
        model(INPUTS["input_ids"][:1])
        assert patch.report.rows[0].pruned
