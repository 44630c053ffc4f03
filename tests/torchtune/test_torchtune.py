"""Patched torchtune decoders against unpatched ones, a recomputation without pruning, and transformers."""

import functools

import one_model
import pytest
import torch
from models import HEADS, LAYERS, SMALL, counting, held_columns, prompts, pruned_masks
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from torchtune.generation import generate
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import KVCache
from torchtune.modules.common_utils import delete_kv_caches, disable_kv_cache, local_kv_cache

import flexasl
from flexasl import ASLConfig, FlexASLError, UnsupportedError, embedded
from flexasl.quantizing import NUMBERS, dequantize, quantize

VOCAB, WIDTH, GROUPS = 199, 64, 2
SHAPE = {
    "vocab_size": VOCAB,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "num_kv_heads": GROUPS,
    "embed_dim": WIDTH,
    "intermediate_dim": 96,
    "max_seq_len": 256,
}
BUILDERS = {"llama3": llama3, "llama3_2": llama3_2, "qwen2": qwen2}
KEEP_ALL = SMALL.replace(select_tokens=1.0)
PRUNING = {
    "tokens": SMALL,
    "tokens_and_cache": SMALL.replace(kv_budget=16),
    "tokens_and_top_p": SMALL.replace(kv_top_p=0.7),
    "paper": ASLConfig.paper(select_tokens=24, window=8, kernel_size=3, observe_layers=2, min_layer=1, tau=0.95),
}
CLOSE = {"rtol": 0, "atol": 1e-4}
ROOM = 128


@functools.cache
def tiny(name="llama3", dtype=torch.float32):
    torch.manual_seed(3)
    model = BUILDERS[name](**SHAPE).to(dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def left_padded(rows):
    width = max(map(len, rows))
    return torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])


def caches(model, rows=1, room=ROOM):
    return local_kv_cache(
        model,
        batch_size=rows,
        device=torch.device("cpu"),
        dtype=model.tok_embeddings.weight.dtype,
        decoder_max_seq_len=room,
    )


def greedy(model, prompt, tokens, room=ROOM):
    """Tokens [B, N], logits [B, tokens, V] and caches of torchtune's own loop."""
    with caches(model, len(prompt), room):
        out, logits = generate(model, prompt, max_generated_tokens=tokens, temperature=0.0, top_k=1)
        return out, logits, [layer.attn.kv_cache for layer in model.layers]


def causal(count, past=0, room=ROOM):
    """torchtune's mask of `count` tokens after `past` others, and their positions."""
    mask = torch.ones(past + count, room, dtype=torch.bool).tril()[None, past:]
    return {"mask": mask, "input_pos": torch.arange(past, past + count)[None]}


def nbytes(held):
    return sum(states.untyped_storage().nbytes() for cache in held for states in (cache.k_cache, cache.v_cache))


@pytest.mark.parametrize("name", BUILDERS)
def test_keep_all_is_identity(name):
    model, batch = tiny(name), left_padded(prompts(70, 41))
    want, logits, _ = greedy(model, batch, 12)
    plain = model(batch[:1])
    with flexasl.patch(model, KEEP_ALL) as patch:
        got, mine, _ = greedy(model, batch, 12)
        assert [row.kept_tokens for row in patch.report.rows] == [70, 41]
        torch.testing.assert_close(model(batch[:1]), plain, **CLOSE)
    assert torch.equal(got, want)
    torch.testing.assert_close(mine, logits, **CLOSE)


def test_hooks_of_others_on_layers_see_rows_and_places():
    model, batch, seen = tiny(), torch.stack(prompts(60, 60)), []
    push = torch.linspace(-1, 1, WIDTH)

    def steer(layer, args, output):
        seen.append(output.shape)
        output = output.clone()
        output[0, -1] += push
        return output

    handles = [layer.register_forward_hook(steer) for layer in model.layers]
    want, shapes = model(batch), list(seen)
    seen.clear()
    with flexasl.patch(model, KEEP_ALL):
        torch.testing.assert_close(model(batch), want, **CLOSE)
        assert seen == shapes
        with pytest.raises(UnsupportedError, match=r"layers\.2\.mlp has a hook of others"):
            handles.append(model.layers[2].mlp.register_forward_hook(lambda *_: None))
            model(batch)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("name", BUILDERS)
def test_pruned_decode_equals_recompute(name, pruning):
    model, prompt = tiny(name), prompts(67)[0][None]
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        out, logits, held = greedy(model, prompt, 17)
    row = patch.report.rows[0]
    if pruning != "paper":
        assert row.kept_tokens < row.prompt_tokens
    columns = [held_columns(cache) for cache in held]
    kept = torch.tensor(row.kept_positions)
    masks = pruned_masks(out.shape[1] - 1, 67, columns, [(one.layer, kept) for one in row.selections], [None] * LAYERS)
    torch.testing.assert_close(logits, recompute(model, out[:, :-1], masks)[:, 66:], **CLOSE)


def recompute(model, ids, masks):
    """Logits [1, N, V] of the unpatched model, each layer under its own mask [1, H, N, N]."""
    before = [layer.attn._attention_call for layer in model.layers]
    for layer, mask in zip(model.layers, masks, strict=True):
        layer.attn._attention_call = functools.partial(_with_mask, mask)
    try:
        return model(ids)
    finally:
        for layer, function in zip(model.layers, before, strict=True):
            layer.attn._attention_call = function


def _with_mask(own, query, key, value, **ignored):
    return scaled_dot_product_attention(query, key, value, own)


@pytest.mark.parametrize("group", [80, 2048])
@pytest.mark.parametrize("pruning", PRUNING)
def test_a_row_is_alone(pruning, group, monkeypatch):
    monkeypatch.setattr("flexasl.rows.GROUP", group)
    model, rows = tiny(), prompts(90, 61, 9, 33, seed=1)
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
    model, batch = tiny("qwen2", torch.float64), left_padded(prompts(80, 55))
    results = []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, SMALL.replace(propagate=propagate)) as patch:
            results.append((greedy(model, batch, 8)[1], patch.report.rows))
    (dropped, rows), (masked, others) = results
    torch.testing.assert_close(dropped, masked, rtol=0, atol=1e-9)
    assert [row.kept_positions for row in rows] == [row.kept_positions for row in others]


def test_caches_take_memory_for_what_they_hold():
    model, prompt, room = tiny(), prompts(90)[0][None], 250
    full = nbytes(greedy(model, prompt, 4, room)[2])
    with flexasl.patch(model, SMALL.replace(kv_budget=16)) as patch, caches(model, room=room):
        held = [layer.attn.kv_cache for layer in model.layers]
        assert all(isinstance(cache, KVCache) and cache.k_cache is None for cache in held)
        model(prompt, **causal(90, room=room))
        assert nbytes(held) == patch.report.kv_bytes == full * 16 // room
        assert {cache.size for cache in held} == {90}
        model(prompt[:, :1], **causal(1, 90, room))
        assert nbytes(held) <= full * (16 + 1 + 128) // room
        assert {cache.size for cache in held} == {91}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_cache_in_eight_bits_is_one_that_is_rounded_after_each_pass(kind):
    """In float64, where rounding is too small to carry a number of eight bits to the next."""
    model, batch = tiny("llama3", torch.float64), left_padded(prompts(67, 67))
    want, got = [], []
    with flexasl.patch(model, SMALL) as patch, caches(model, 2):
        plain = patch.config
        for at in range(7):
            ids = batch if at == 0 else batch[:, at : at + 1]
            want.append(model(ids, **causal(ids.shape[1], 0 if at == 0 else 66 + at))[:, -1])
            for layer in model.layers:
                for states in layer.attn.kv_cache.stored:
                    states.copy_(dequantize(*quantize(states, kind), states.dtype))
        full = patch.report.kv_bytes_full
    with flexasl.patch(model, plain.replace(kv_dtype=kind)) as patch, caches(model, 2):
        for at in range(7):
            ids = batch if at == 0 else batch[:, at : at + 1]
            got.append(model(ids, **causal(ids.shape[1], 0 if at == 0 else 66 + at))[:, -1])
        held = [layer.attn.kv_cache for layer in model.layers]
        assert {cache.stored[0].dtype for cache in held} == {NUMBERS[kind]}
        assert patch.report.kv_bytes_full == full > 5 * patch.report.kv_bytes
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-6, atol=1e-6)


def test_logits_of_dropped_tokens_are_nan():
    model, prompt = tiny(), prompts(60)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        logits = model(prompt)
    gone = torch.ones(60, dtype=torch.bool)
    gone[list(patch.report.rows[0].kept_positions)] = False
    assert torch.equal(logits[0].isnan().all(-1), gone) and torch.equal(logits[0].isnan().any(-1), gone)


def test_a_second_turn_sees_the_pruned_cache_and_itself():
    model, prompt, more = tiny(), prompts(64)[0][None], prompts(7, seed=9)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        with caches(model):
            model(prompt, **causal(64))
            report = patch.report
            want = model(more, **causal(7, 64))
            assert patch.report is report
        with caches(model):
            model(prompt, **causal(64))
            steps = [model(more[:, at : at + 1], **causal(1, 64 + at)) for at in range(7)]
    torch.testing.assert_close(torch.cat(steps, 1), want, **CLOSE)


def test_reset_caches_begin_a_new_prompt():
    model, (first, second) = tiny(), (row[None] for row in prompts(64, 77))
    with flexasl.patch(model, SMALL) as patch, caches(model):
        fresh = model(second, **causal(77))
        rows = patch.report.rows
        model.reset_caches()
        model(first, **causal(64))
        with pytest.raises(UnsupportedError, match=r"not causal over 64 cached and 60 new tokens.*reset_caches\(\)"):
            model(second[:, :60], **causal(60))
        with pytest.raises(FlexASLError, match="the sequence has 141 tokens where KV caches were set up for 128"):
            model(second, **causal(77))
        model.reset_caches()
        assert torch.equal(model(second, **causal(77)).nan_to_num(), fresh.nan_to_num())
        assert patch.report.rows == rows


def test_without_and_beside_caches():
    model, prompt = tiny(), prompts(64)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        plain = model(prompt)
        assert patch.report.kv_tokens == ()
        with caches(model):
            cached = model(prompt, **causal(64))
            with disable_kv_cache(model):
                beside = model(prompt)
            assert {layer.attn.kv_cache.size for layer in model.layers} == {64}
    for other in (cached, beside):
        torch.testing.assert_close(other.nan_to_num(), plain.nan_to_num(), **CLOSE)


def state(model):
    """Everything that a patch could leave behind."""
    return [
        (
            {name: value for name, value in vars(module).items() if not name.startswith("_") or "attention" in name},
            list(module._forward_hooks) + list(module._forward_pre_hooks),
            {name: type(child) for name, child in module._modules.items() if child is not None},
        )
        for module in model.modules()
    ]


def test_remove_restores_the_model_exactly():
    model, prompt = tiny.__wrapped__(), prompts(64)[0][None]
    want, before = model(prompt), state(model)
    with pytest.raises(RuntimeError, match="mine"), flexasl.patch(model, SMALL):
        model.setup_caches(1, torch.float32, decoder_max_seq_len=ROOM)
        model(prompt, **causal(64))
        raise RuntimeError("mine")
    patch = flexasl.patch(model, SMALL)
    patch.remove()
    patch.remove()
    assert state(model) == before
    assert torch.equal(model(prompt), want)


def test_caches_that_were_there_before_stand_there_again():
    model, prompt = tiny(), prompts(64)[0][None]
    with caches(model):
        want = model(prompt, **causal(64))
        with pytest.raises(UnsupportedError, match=r"hold 64 tokens .* unpatched model; call model.reset_caches\(\)"):
            flexasl.patch(model)
        model.reset_caches()
        with flexasl.patch(model, SMALL):
            model(prompt, **causal(64))
        assert all(type(layer.attn.kv_cache) is KVCache for layer in model.layers)
        assert torch.equal(model(prompt, **causal(64)), want)


@pytest.mark.parametrize("policy", [name for name in flexasl.policies.POLICIES if name != "full"])
def test_policies_prune(policy):
    model, batch = tiny(), left_padded(prompts(90, 70))
    with flexasl.patch(model, counting(policy), policy) as patch:
        out, _, held = greedy(model, batch, 4)
    assert patch.report.kv_bytes < patch.report.kv_bytes_full
    assert out.shape == (2, 94) and {cache.size for cache in held} == {93}


def test_half_precision():
    model, prompt = tiny("llama3_2", torch.bfloat16), prompts(64)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        _, _, held = greedy(model, prompt, 4)
    assert held[0].k_cache.dtype == torch.bfloat16
    assert patch.report.rows[0].kept_tokens == 24


def test_an_error_inside_a_layer_leaves_model_usable():
    model, prompt = tiny(), prompts(64)[0][None]
    with flexasl.patch(model, SMALL), caches(model):
        want = model(prompt, **causal(64))
        model.reset_caches()

        def fail(*_):
            raise RuntimeError("out of memory")

        handle = model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(prompt, **causal(64))
        handle.remove()
        with pytest.raises(UnsupportedError, match="half filled by a pass that failed; reset them"):
            model(prompt, **causal(64))
        model.reset_caches()
        assert torch.equal(model(prompt, **causal(64)).nan_to_num(), want.nan_to_num())


def test_refuses_models():
    def refuses(model, message, **settings):
        with pytest.raises(UnsupportedError, match=message):
            flexasl.patch(model, **settings)

    softcapped = gemma2(
        **SHAPE,
        head_dim=16,
        hidden_capping_value=30.0,
        final_capping_value=30.0,
        sliding_window_size=8,
    ).eval()
    refuses(softcapped, "layer 0 of TransformerDecoder has a Gemma2.*llama3, llama3_2 and qwen2")
    refuses(llama3(**SHAPE), r"is in training mode; call model.eval\(\)")
    refuses(tiny(), "compile=True is not available for torchtune models", compile=True)
    refuses(tiny(), "kernel='flex' would compile a graph", kernel="flex")
    refuses(torch.compile(tiny()), "the result of torch.compile")
    with flexasl.patch(tiny()):
        refuses(tiny(), "is patched already; call model.flexasl_patch.remove")
    with pytest.raises(flexasl.ConfigError, match="min_layer=9 is beyond the model, which has 6 layers"):
        flexasl.patch(tiny(), ASLConfig(min_layer=9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_input": torch.ones(1, 2, WIDTH)}, "encoder_input is not available"),
        ({"mask": torch.ones(1, 64, 64, dtype=torch.bool)}, "mask is not causal over 0 cached and 64 new"),
        ({"mask": torch.ones(1, 64, 32, dtype=torch.bool)}, r"mask is torch.bool \[1, 64, 32\]; .* here \[1, 64, 64\]"),
        ({"mask": torch.zeros(1, 64, 64)}, r"mask is torch.float32 \[1, 64, 64\]"),
        (
            {"mask": torch.ones(64, 64, dtype=torch.bool).tril()[None] & (torch.arange(64) != 20)},
            "mask is not causal over 0 cached and 64 new",
        ),
    ],
)
def test_refuses_arguments_before_work_starts(arguments, message):
    model, prompt, ran = tiny(), prompts(64)[0][None], []
    handle = model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with flexasl.patch(model, SMALL), pytest.raises(UnsupportedError, match=message):
            model(prompt, **arguments)
    finally:
        handle.remove()
    assert not ran


def test_refuses_caches_that_do_not_fit():
    model, batch = tiny(), torch.stack(prompts(30, 30))
    with flexasl.patch(model, SMALL):
        with caches(model), pytest.raises(FlexASLError, match="tokens has 2 rows where KV caches are for 1"):
            model(batch, **causal(30))
        with caches(model), pytest.raises(ValueError, match="causal masks must be provided"):
            model(batch[:1])
        model.setup_caches(1, torch.bfloat16, decoder_max_seq_len=ROOM)
        with pytest.raises(FlexASLError, match=r"set up in torch.bfloat16 for a model in torch.float32"):
            model(batch[:1], **causal(30))
        delete_kv_caches(model)
        with pytest.raises(UnsupportedError, match="mask has padding on the right or between tokens"):
            generate(model, torch.tensor([[5, 0, 7, 8]]), max_generated_tokens=1)


def test_the_embedded_model_does_what_it_does_under_transformers():
    want = one_model.want()
    model = llama3_2(
        vocab_size=49152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        intermediate_dim=1536,
        max_seq_len=8192,
        rope_base=100_000,
        scale_factor=1,
    )
    weights = load_file(embedded.model_path() / "model.safetensors")
    model.load_state_dict(hf_to_tune(weights, num_heads=9, num_kv_heads=3, dim=576))
    model.eval().requires_grad_(False)
    torch.testing.assert_close(model(want.prompts[:1])[0], want.logits, rtol=0, atol=5e-3)
    with flexasl.patch(model, want.config) as patch:
        out = greedy(model, want.prompts, one_model.NEW_TOKENS, room=1024)[0]
    assert [row.selected_layer for row in patch.report.rows] == want.layers
    assert [row.kept_positions for row in patch.report.rows] == want.kept
    assert torch.equal(out[:, -one_model.NEW_TOKENS :], want.answer)
