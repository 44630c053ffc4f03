"""Patched torchtitan decoders against unpatched ones, a recomputation, two processes and transformers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import one_model
import pytest
import torch
import two_ranks
from decoders import DECODERS, LONGEST, VOCAB, embedded_model, llama3, tiny
from models import LAYERS, SMALL, counting, held_columns, prompts, pruned_masks
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.config import OverrideConfig
from torchtitan.config.override import apply_overrides
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3 import llama3_configs
from torchtitan.models.qwen3 import qwen3_configs
from two_ranks import CONFIGS, WAYS, batch, run

import flexasl
from flexasl import ASLConfig, FlexASLError, UnsupportedError, embedded
from flexasl.integrations.torchtitan import KVCache, PrunedAttention, generate
from flexasl.quantizing import NUMBERS, dequantize, quantize

KEEP_ALL = SMALL.replace(select_tokens=1.0)
PRUNING = {
    "tokens": SMALL,
    "tokens_and_cache": SMALL.replace(kv_budget=16),
    "tokens_and_top_p": SMALL.replace(kv_top_p=0.7),
    "paper": ASLConfig.paper(select_tokens=24, window=8, kernel_size=3, observe_layers=2, min_layer=1, tau=0.95),
}
CLOSE = {"rtol": 0, "atol": 1e-4}


def left_padded(rows):
    width = max(map(len, rows))
    return torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])


def greedy(model, prompt, tokens):
    """Tokens [B, N], logits [B, tokens, V] and cache of a patched model, pass by pass as `generate` does it."""
    out = generate(model, prompt, max_new_tokens=tokens, pad_id=0)
    cache = KVCache(model, prompt != 0)
    logits = [model(prompt, attention_masks=cache)[:, -1:]]
    for step in range(tokens - 1):
        at = prompt.shape[1] + step
        logits.append(model(out[:, at : at + 1], attention_masks=cache))
    logits = torch.cat(logits, 1)
    assert torch.equal(logits.argmax(-1), out[:, -tokens:])
    return out, logits, cache


def unpatched_greedy(model, row, tokens):
    for _ in range(tokens):
        row = torch.cat([row, model(row[None])[0, -1:].argmax(-1)])
    return row[-tokens:]


@pytest.mark.parametrize("name", DECODERS)
def test_keep_all_is_identity(name):
    model, rows = tiny(name), prompts(70, 41)
    logits = model(rows[0][None])
    want = [unpatched_greedy(model, row, 8) for row in rows]
    with flexasl.patch(model, KEEP_ALL) as patch:
        torch.testing.assert_close(model(rows[0][None]), logits, **CLOSE)
        out = generate(model, left_padded(rows), max_new_tokens=8, pad_id=0)
        assert [row.kept_tokens for row in patch.report.rows] == [70, 41]
    assert torch.equal(out[:, -8:], torch.stack(want))


def test_hooks_of_others_on_layers_see_rows_and_places():
    model, batch, seen = tiny("llama3"), torch.stack(prompts(60, 60)), []

    def steer(layer, args, output):
        seen.append(output.shape)
        output = output.clone()
        output[0, -1] += torch.linspace(-1, 1, output.shape[-1])
        return output

    handles = [layer.register_forward_hook(steer) for layer in model.layers.values()]
    want, shapes = model(batch), list(seen)
    seen.clear()
    with flexasl.patch(model, KEEP_ALL):
        torch.testing.assert_close(model(batch), want, **CLOSE)
        assert seen == shapes
        handles.append(model.layers["2"].attention.register_forward_hook(lambda *_: None))
        with pytest.raises(UnsupportedError, match=r"layers\.2\.attention has a hook of others"):
            model(batch)
    for handle in handles:
        handle.remove()


class Masked(nn.Module):
    """Attention under a mask of its own [1, H, N, N]."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, query, key, value, **ignored):
        states = (states.transpose(1, 2) for states in (query, key, value))
        return scaled_dot_product_attention(*states, self.mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("name", DECODERS)
def test_pruned_decode_equals_recompute(name, pruning):
    model, prompt = tiny(name), prompts(67)[0][None]
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        out, logits, cache = greedy(model, prompt, 17)
    row = patch.report.rows[0]
    if pruning != "paper":
        assert row.kept_tokens < row.prompt_tokens
    columns, kept = [held_columns(layer) for layer in cache.layers], torch.tensor(row.kept_positions)
    masks = pruned_masks(out.shape[1] - 1, 67, columns, [(one.layer, kept) for one in row.selections], [None] * LAYERS)
    for layer, mask in zip(model.layers.values(), masks, strict=True):
        layer.attention.inner_attention = Masked(mask)
    torch.testing.assert_close(logits, model(out[:, :-1])[:, 66:], **CLOSE)


@pytest.mark.parametrize("group", [80, 2048])
@pytest.mark.parametrize("pruning", PRUNING)
def test_a_row_is_alone(pruning, group, monkeypatch):
    monkeypatch.setattr("flexasl.rows.GROUP", group)
    model, rows = tiny("llama3"), prompts(90, 61, 9, 33, seed=1)
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        out, logits, _ = greedy(model, left_padded(rows), 6)
        batch = patch.report.rows
        for index, row in enumerate(rows):
            solo, own, _ = greedy(model, row[None], 6)
            alone = patch.report.rows[0]
            assert batch[index].selected_layer == alone.selected_layer
            assert batch[index].kept_positions == alone.kept_positions
            torch.testing.assert_close(logits[index], own[0], **CLOSE)
            assert torch.equal(out[index, -6:], solo[0, -6:])


def test_dropping_tokens_equals_masking_them_out():
    model, batch, results = tiny("qwen3"), left_padded(prompts(80, 55)), []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, SMALL.replace(propagate=propagate)) as patch:
            results.append((greedy(model, batch, 8)[1], patch.report.rows))
    (dropped, rows), (masked, others) = results
    torch.testing.assert_close(dropped, masked, **CLOSE)
    assert [row.kept_positions for row in rows] == [row.kept_positions for row in others]


def test_caches_take_memory_for_what_they_hold():
    model, prompt = tiny("llama3"), prompts(90)[0][None]
    with flexasl.patch(model, SMALL.replace(kv_budget=16)) as patch:
        cache = KVCache(model)
        model(prompt, attention_masks=cache)
    held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert sum(states.untyped_storage().nbytes() for states in held) == cache.nbytes == patch.report.kv_bytes
    assert patch.report.kv_bytes_full == 90 * LAYERS * 2 * 2 * 16 * 4
    assert patch.report.kv_tokens[-1] == 16 and cache.seen == 90


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_cache_in_eight_bits_is_one_that_is_rounded_after_each_pass(kind):
    pytest.importorskip("torchao")
    model, ids = tiny("llama3").double(), prompts(67)[0][None]
    want, got = [], []
    with flexasl.patch(model, SMALL) as patch:
        plain, before = patch.config, KVCache(model)
        for at in range(7):
            want.append(model(ids if at == 0 else ids[:, at : at + 1], attention_masks=before)[:, -1])
            for layer in before.layers:
                for states in layer.stored:
                    states.copy_(dequantize(*quantize(states, kind), states.dtype))
        full, before = patch.report.kv_bytes_full, KVCache(model)
    with flexasl.patch(model, plain.replace(kv_dtype=kind)) as patch:
        for at in range(7):
            got.append(model(ids if at == 0 else ids[:, at : at + 1], attention_masks=before)[:, -1])
        assert {layer.stored[0].dtype for layer in before.layers} == {NUMBERS[kind]}, "though it was made before"
        assert patch.report.kv_bytes_full == full > 5 * patch.report.kv_bytes
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-6, atol=1e-6)


def test_logits_of_dropped_tokens_are_nan():
    model, prompt = tiny("llama3"), prompts(60)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        logits = model(prompt)
    gone = torch.ones(60, dtype=torch.bool)
    gone[list(patch.report.rows[0].kept_positions)] = False
    assert torch.equal(logits[0].isnan().all(-1), gone) and torch.equal(logits[0].isnan().any(-1), gone)


def test_a_second_turn_sees_the_pruned_cache_and_itself():
    model, prompt, more = tiny("llama3"), prompts(64)[0][None], prompts(7, seed=9)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        cache = KVCache(model)
        model(prompt, attention_masks=cache)
        report, other = patch.report, copy.deepcopy(cache)
        want = model(more, attention_masks=cache)
        assert patch.report is report
        steps = [model(more[:, at : at + 1], attention_masks=other) for at in range(7)]
    torch.testing.assert_close(torch.cat(steps, 1), want, **CLOSE)


def test_padding_and_positions_can_be_given():
    model, rows = tiny("llama3"), prompts(64, 40)
    batch = left_padded(rows)
    with flexasl.patch(model, SMALL):
        want = model(batch, attention_masks=batch != 0)[:, -1]
        shifted = torch.arange(64).expand(2, -1)
        torch.testing.assert_close(model(batch, shifted, batch != 0)[:, -1], want, **CLOSE)
        torch.testing.assert_close(model(rows[1][None])[:, -1], want[1:], **CLOSE)


def test_generate_stops_and_chooses():
    model, batch = tiny("llama3"), left_padded(prompts(60, 45))
    with flexasl.patch(model, SMALL):
        plain = generate(model, batch, max_new_tokens=8, pad_id=0)
        first, second = plain[0, 62].item(), plain[1, 60].item()
        out = generate(model, batch, max_new_tokens=8, pad_id=0, stop_ids=[first, second])
        assert out.shape == (2, 63)
        assert torch.equal(out[0], plain[0, :63]) and out[1, 60:].tolist() == [second, 0, 0]
        least = generate(model, batch, max_new_tokens=2, pad_id=0, choose=lambda logits: logits.argmin(-1))
        assert least.shape == (2, 62) and not torch.equal(least[:, 60], plain[:, 60])


def state(model):
    return [
        (
            sorted(vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            {name: id(child) for name, child in module._modules.items()},
        )
        for module in model.modules()
    ]


def test_remove_restores_the_model_exactly():
    model, prompt = tiny("llama3"), prompts(64)[0][None]
    want, before = model(prompt), state(model)
    with pytest.raises(RuntimeError, match="mine"), flexasl.patch(model, SMALL):
        model(prompt)
        raise RuntimeError("mine")
    patch = flexasl.patch(model, SMALL)
    assert all(type(layer.attention.inner_attention) is PrunedAttention for layer in model.layers.values())
    patch.remove()
    patch.remove()
    assert state(model) == before
    assert torch.equal(model(prompt), want)


def test_a_decoder_built_through_torchtitans_overrides():
    config = llama3()
    done = apply_overrides(OverrideConfig(imports=["flexasl.integrations.torchtitan.inner_attention"]), config)
    assert len(done) == LAYERS
    model, plain, prompt = tiny("llama3", config), tiny("llama3"), prompts(64)[0][None]
    inner = model.layers["0"].attention.inner_attention
    assert type(inner) is PrunedAttention
    torch.testing.assert_close(model(prompt), plain(prompt), **CLOSE)
    with flexasl.patch(plain, SMALL):
        want = generate(plain, prompt, max_new_tokens=6)
    with flexasl.patch(model, SMALL):
        assert model.layers["0"].attention.inner_attention is inner
        assert torch.equal(generate(model, prompt, max_new_tokens=6), want)
    with pytest.raises(
        UnsupportedError, match="attention_masks is a KVCache; without a patch this attention is causal"
    ):
        model(prompt, attention_masks=KVCache(model))


@pytest.mark.parametrize(
    "config",
    [
        llama3_configs["debugmodel"](attn_backend="flex"),
        qwen3_configs["debugmodel_moe"](attn_backend="flex", moe_comm_backend="standard"),
    ],
    ids=["llama3", "qwen3_moe"],
)
def test_decoders_as_torchtitan_builds_them(config):
    model = config.build().eval().requires_grad_(False)
    model.init_states()
    with flexasl.patch(model, SMALL) as patch:
        generate(model, prompts(64)[0][None], max_new_tokens=3)
    assert patch.report.rows[0].kept_tokens == 24
    assert type(model.layers["0"].attention.inner_attention) is FlexAttention


@pytest.mark.parametrize("policy", [name for name in flexasl.policies.POLICIES if name != "full"])
def test_policies_prune(policy):
    model, batch = tiny("llama3"), left_padded(prompts(90, 70))
    with flexasl.patch(model, counting(policy), policy) as patch:
        greedy(model, batch, 3)
    assert patch.report.kv_bytes < patch.report.kv_bytes_full


def test_half_precision():
    model, prompt = tiny("qwen3").to(torch.bfloat16), prompts(64)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        cache = KVCache(model)
        model(prompt, attention_masks=cache)
        model(prompt[:, :1], attention_masks=cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16 and patch.report.rows[0].kept_tokens == 24


def test_refuses_caches_that_do_not_fit():
    model, prompt = tiny("llama3"), prompts(64)[0][None]
    with flexasl.patch(model, SMALL):
        cache = KVCache(model)
        model(prompt, attention_masks=cache)
        with pytest.raises(UnsupportedError, match="the batch has 2 rows where KV caches hold 1; give as many"):
            model(prompt[:, :1].repeat(2, 1), attention_masks=cache)
        handle = model.layers["1"].register_forward_hook(lambda *_: 1 / 0)
        cache = KVCache(model)
        with pytest.raises(ZeroDivisionError):
            model(prompt, attention_masks=cache)
        handle.remove()
        with pytest.raises(UnsupportedError, match="KV caches are half filled by a pass that failed"):
            model(prompt, attention_masks=cache)


def test_refuses_models():
    def refuses(model, message, **settings):
        with pytest.raises(UnsupportedError, match=message):
            flexasl.patch(model, **settings)

    model = tiny("llama3")
    refuses(model, "compile=True is not available for torchtitan models", compile=True)
    refuses(model, "kernel='flex' would compile a graph", kernel="flex")
    with flexasl.patch(model):
        refuses(model, "is patched already; call model.flexasl_patch.remove")
    refuses(tiny("llama3").train(), r"is in training mode; call model.eval\(\)")
    first_stage = tiny("llama3")
    first_stage.norm = first_stage.lm_head = None
    refuses(first_stage, "Llama3Model is a stage of a pipeline.*give pipeline_parallel_degree=1")
    inner_stage = tiny("llama3")
    del inner_stage.layers["5"]
    refuses(inner_stage, "Llama3Model is a stage of a pipeline")
    compiled = tiny("llama3")
    compiled.layers["0"].compile()
    refuses(compiled, r"is compiled already \(its compile\(\) was called\)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_masks": "causal"}, r"attention_masks is a str; a patched model makes its own, give a KVCache"),
        ({"attention_masks": torch.ones(1, 30, dtype=torch.bool)}, r"attention_masks is \[1, 30\]; .* here \[1, 64\]"),
        ({"attention_masks": (torch.arange(64) < 60)[None]}, "attention_masks has padding on the right or between"),
        ({"positions": torch.cat([torch.arange(32), torch.arange(32)])[None]}, "positions restart within a row"),
    ],
)
def test_refuses_arguments_before_work_starts(arguments, message):
    model, prompt, ran = tiny("llama3"), prompts(64)[0][None], []
    model.layers["0"].register_forward_pre_hook(lambda *_: ran.append(1))
    with flexasl.patch(model, SMALL), pytest.raises(UnsupportedError, match=message):
        model(prompt, **arguments)
    assert not ran


def test_generate_refuses():
    model, prompt = tiny("llama3"), prompts(64)[0][None]
    with pytest.raises(UnsupportedError, match=r"Llama3Model is not patched; call flexasl.patch"):
        generate(model, prompt, max_new_tokens=1)
    with flexasl.patch(model, SMALL):
        with pytest.raises(FlexASLError, match=r"prompts are \[64\], max_new_tokens=1; give \[batch, tokens\]"):
            generate(model, prompt[0], max_new_tokens=1)
        with pytest.raises(
            FlexASLError, match=f"64 prompt tokens and max_new_tokens=200 exceed the {LONGEST} positions"
        ):
            generate(model, prompt, max_new_tokens=200)
        with pytest.raises(UnsupportedError, match="attention_masks has padding on the right or between tokens"):
            generate(model, torch.tensor([[5, 0, 7, 8]]), max_new_tokens=1, pad_id=0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(two_ranks.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    places = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """The same in one process, for each rank's prompts."""
    return {name: [run(tiny(name), batch(rank)) for rank in (0, 1)] for name in DECODERS}


@pytest.mark.parametrize("setting", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_two_processes_give_what_one_gives(ranks, alone, name, way, setting):
    for rank, seen in enumerate(ranks):
        got, want = seen[name, way][setting], alone[name][rank if way == "fsdp" else 0][setting]
        assert torch.equal(got["tokens"], want["tokens"])
        assert (got["layers"], got["kept"]) == (want["layers"], want["kept"])
        # Each rank of tensor parallelism stores its own heads.
        assert got["kv_bytes"] == want["kv_bytes"] // (1 if way == "fsdp" else 2)


def test_ranks_of_fsdp_make_as_many_passes(ranks):
    one, other = (seen["stopped"][0, 90:] for seen in ranks)
    assert one[1:].tolist() == [0] * (two_ranks.NEW - 1)
    assert len(other) == two_ranks.NEW and VOCAB not in other


def test_refuses_ways_to_spread_a_model(ranks):
    for seen in ranks:
        assert "Llama3Model has context parallelism" in seen["context"]
        assert "give context_parallel_degree=1" in seen["context"]
        assert "sequence parallelism with spmd_backend='spmd_types'" in seen["sequence"]
        assert "spmd_backend='full_dtensor'; give 'partial_dtensor' or 'spmd_types'" in seen["full_dtensor"]


def test_the_embedded_model_does_what_it_does_under_transformers():
    want = one_model.want()
    model = embedded_model(embedded.model_path())
    with flexasl.patch(model, policy="full"):
        torch.testing.assert_close(model(want.prompts[:1])[0], want.logits, rtol=0, atol=5e-3)
    with flexasl.patch(model, want.config) as patch:
        out = generate(model, want.prompts, max_new_tokens=one_model.NEW_TOKENS, pad_id=one_model.PAD)
    assert [row.selected_layer for row in patch.report.rows] == want.layers
    assert [row.kept_positions for row in patch.report.rows] == want.kept
    assert torch.equal(out[:, -one_model.NEW_TOKENS :], want.answer)
