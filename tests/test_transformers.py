"""Patched transformers models of every family against unpatched ones and against a recomputation without pruning."""

import copy
import functools
import gc
import sys
import weakref

import pytest
import torch
from models import (
    FAMILIES,
    GREEDY,
    LAYERS,
    RULES,
    SHAPE,
    SMALL,
    STAGED,
    counting,
    left_padded,
    prefills,
    prompts,
    recompute,
    selected,
    tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    StaticCache,
    TextStreamer,
)

import flexasl
from flexasl import ASLConfig, UnsupportedError, quantizing, rows_attention
from flexasl.layer_step import LayerStep

KEEP_ALL = SMALL.replace(select_tokens=1.0)
PRUNING = {
    "tokens": SMALL,
    "tokens_and_cache": SMALL.replace(kv_budget=16),
    "tokens_and_top_p": SMALL.replace(kv_top_p=0.7),
    "shares": SMALL.replace(select_tokens=0.4, kv_budget=0.3),
    "stages": STAGED,
    "stages_and_cache": STAGED.replace(kv_budget=16, select_tokens=0.3),
    "paper": ASLConfig.paper(select_tokens=24, window=8, kernel_size=3, observe_layers=2, min_layer=1, tau=0.95),
    "maxpool": SMALL.replace(pooling="maxpool", kv_budget=20),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_identity(family):
    model = tiny(family)
    batch = left_padded(prompts(70, 41))
    want = model(**batch).logits
    real = batch["attention_mask"].bool()
    answer = model.generate(**batch, max_new_tokens=12, **GREEDY).sequences
    with flexasl.patch(model, KEEP_ALL) as patch:
        torch.testing.assert_close(model(**batch).logits[real], want[real], rtol=0, atol=1e-4)
        assert torch.equal(model.generate(**batch, max_new_tokens=12, **GREEDY).sequences, answer)
        assert [row.kept_tokens for row in patch.report.rows] == [70, 41]
        assert patch.report.kv_bytes == patch.report.kv_bytes_full


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_decode_equals_recompute(family, pruning):
    model, steps = tiny(family), 16
    ids = prompts(67)[0][None]
    with flexasl.patch(model, PRUNING[pruning]) as patch, prefills() as read:
        out = model.generate(ids, max_new_tokens=steps + 1, output_logits=True, **GREEDY)
    row, before = patch.report.rows[0], selected(read[0], 0)[:-1]
    assert len(before) == ("stages" in pruning)
    if pruning != "paper":
        assert row.kept_tokens < row.prompt_tokens
    columns = [
        layer.positions if layer.valid is None else layer.positions.masked_fill(~layer.valid, layer.positions.max())
        for layer in out.past_key_values.layers
    ]
    kept = torch.tensor(row.kept_positions)
    full = recompute(model, out.sequences[:, :-1], 67, columns, row.selected_layer, kept, before)
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, 66:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_alone(family, pruning):
    model = tiny(family)
    rows = prompts(90, 61, 9, 33, seed=1)
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        out = model.generate(**left_padded(rows), max_new_tokens=6, output_logits=True, **GREEDY)
        batch, logits = patch.report.rows, torch.stack(out.logits, 1)
        for index, row in enumerate(rows):
            solo = model.generate(row[None], max_new_tokens=6, output_logits=True, **GREEDY)
            alone = patch.report.rows[0]
            assert batch[index].selections == alone.selections
            assert batch[index].kept_positions == alone.kept_positions
            assert batch[index].variance == pytest.approx(alone.variance)
            assert batch[index].lookup == pytest.approx(alone.lookup)
            torch.testing.assert_close(logits[index], torch.stack(solo.logits, 1)[0], rtol=0, atol=1e-4)
            assert torch.equal(out.sequences[index, -6:], solo.sequences[0, -6:])


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_one_batch_select_at_different_layers(rule):
    model = tiny()
    rows = prompts(*[60 + 5 * n for n in range(8)], seed=2)
    with flexasl.patch(model, RULES[rule]) as patch:
        model(**left_padded(rows))
    assert len({row.selected_layer for row in patch.report.rows}) > 1


def biased():
    """A tiny BLOOM, which has ALiBi."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("bloom", **(SHAPE | {"n_layer": LAYERS, "n_head": 4}))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "bloom"])
@pytest.mark.parametrize("rule", RULES)
def test_cached_entries_are_those_that_replay_keeps(rule, kind, monkeypatch):
    model = biased() if kind == "bloom" else tiny(kind)
    ids, seen = prompts(80)[0][None], []
    config = RULES[rule].replace(kv_budget=20)

    original = LayerStep.attend

    def attend(self, query, key, value, sinks=None, *chosen):
        seen.append((query, key, sinks))
        return original(self, query, key, value, sinks, *chosen)

    with flexasl.patch(model, config) as patch, prefills() as read:
        monkeypatch.setattr(LayerStep, "attend", attend)
        out = model(ids)
    row, states = patch.report.rows[0], []
    going = [
        [torch.arange(80), *(at for one, at in selected(read[0], 0) if one < layer)][-1] for layer in range(LAYERS)
    ]
    for part in (0, 1):
        full = torch.zeros(LAYERS, 1, seen[0][part].shape[1], 80, 16)
        for layer in range(LAYERS):
            full[layer][:, :, going[layer]] = seen[layer][part]
        states.append(full)
    sinks = None if seen[0][2] is None else torch.stack([own for *_, own in seen])
    full = [layer for layer, own in enumerate(patch.attention) if own.sliding_window is None]
    how = {"attention": patch.attention, "sinks": sinks, "ranking_layers": full}
    want = flexasl.replay(*states, config, **how)[0]
    assert want.selected_layer == row.selected_layer
    assert tuple(want.selected.tolist()) == row.kept_positions
    assert want.selections == [(one.layer, one.kept_tokens) for one in row.selections]
    for layer, held in enumerate(out.past_key_values.layers):
        if layer in full:
            kept = [sorted(going[layer][head].tolist()) for head in want.kept_indices[layer]]
            assert held.positions[0].tolist() == kept


def test_logits_keep_the_prompts_shape_and_dropped_tokens_are_nan():
    model = tiny()
    ids = prompts(60)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        logits = model(ids).logits
    gone = torch.ones(60, dtype=torch.bool)
    gone[list(patch.report.rows[0].kept_positions)] = False
    assert torch.equal(logits[0].isnan().all(-1), gone) and torch.equal(logits[0].isnan().any(-1), gone)


def test_generate_in_every_common_way():
    model, batch = tiny(), left_padded(prompts(60, 45))
    plain = {key: value for key, value in GREEDY.items() if key != "return_dict_in_generate"}
    with flexasl.patch(model, SMALL) as patch:
        greedy = model.generate(**batch, max_new_tokens=8, **plain)
        returned = model.generate(**batch, max_new_tokens=8, output_logits=True, **GREEDY)
        assert torch.equal(greedy, returned.sequences) and len(returned.logits) == 8
        torch.manual_seed(5)
        sampled = model.generate(**batch, max_new_tokens=8, do_sample=True, pad_token_id=0, eos_token_id=None)
        torch.manual_seed(5)
        again = model.generate(**batch, max_new_tokens=8, do_sample=True, pad_token_id=0, eos_token_id=None)
        assert torch.equal(sampled, again)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        from_embeds = model.generate(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], max_new_tokens=8, **plain
        )
        assert torch.equal(from_embeds, greedy[:, 60:])
        uncached = model.generate(**batch, max_new_tokens=1, use_cache=False, **plain)
        assert torch.equal(uncached, greedy[:, :61])
        beams = model.generate(**batch, max_new_tokens=8, num_beams=3, **plain)
        assert beams.shape == greedy.shape
        assert all(row.kept_tokens == 24 for row in patch.report.rows)


def test_beam_search_with_one_path_is_greedy_per_row():
    model = tiny()
    ids = prompts(60)[0][None]
    with flexasl.patch(model, SMALL):
        many = model.generate(ids.repeat(2, 1), max_new_tokens=6, num_beams=3, **GREEDY).sequences
        one = model.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY).sequences
    assert torch.equal(many, one.repeat(2, 1))


def test_streaming(capsys):
    class Tokenizer:
        def decode(self, ids, **settings):
            return " ".join(str(int(token)) for token in ids) + " "

    model, ids = tiny(), prompts(60)[0][None]
    with flexasl.patch(model, SMALL):
        out = model.generate(ids, max_new_tokens=8, streamer=TextStreamer(Tokenizer(), skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.split() == [str(token) for token in out.sequences[0, 60:].tolist()]


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_a_second_turn_sees_the_pruned_cache_and_itself(family, pruning):
    model = tiny(family)
    rows = prompts(64, 50, seed=4)
    batch, more = left_padded(rows), torch.stack(prompts(7, 7, seed=9))
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        first = model.generate(**batch, max_new_tokens=4, **GREEDY)
        report = patch.report
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        cache = copy.deepcopy(first.past_key_values)
        second = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, output_logits=True, **GREEDY
        )
        assert patch.report is report, "a later turn prunes nothing"
        cache = copy.deepcopy(first.past_key_values)
        step = [
            model(
                ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=mask[:, : at + 1].sum(1, keepdim=True) - 1,
                past_key_values=cache,
            ).logits
            for at in range(67, 75)
        ][-1]
    torch.testing.assert_close(second.logits[0], step[:, -1], rtol=0, atol=1e-4)
    assert {layer.seen for layer in second.past_key_values.layers} == {79}


def test_cropped_cache_forgets_the_last_tokens():
    model, ids = tiny(), prompts(64)[0][None]
    tail = prompts(5, seed=7)[0][None]
    with flexasl.patch(model, SMALL):
        cache = model(ids).past_key_values
        want = model(tail, past_key_values=cache).logits
        cache.crop(-5)
        assert cache.get_seq_length() == 64
        torch.testing.assert_close(model(tail, past_key_values=cache).logits, want)
        with pytest.raises(flexasl.FlexASLError, match="tokens_to_remove=3 is positive"):
            cache.crop(3)


def test_refuses_to_crop_what_a_sliding_window_has_dropped():
    model, ids = tiny("mistral_sliding"), prompts(60)[0][None]
    with flexasl.patch(model, policy="full"):
        cache = model(ids).past_key_values
        with pytest.raises(flexasl.FlexASLError, match=r"crop by 10 tokens .* crop at most 0"):
            cache.crop(-10)
        want = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, want)


def test_what_is_dropped_is_freed():
    model, ids = tiny("phi3"), prompts(90)[0][None]
    for config in (SMALL, SMALL.replace(kv_budget=16)):
        with flexasl.patch(model, config) as patch:
            cache = model(ids).past_key_values
        held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        stored = {states.untyped_storage().data_ptr(): states.untyped_storage().nbytes() for states in held}
        assert len(stored) == 2 * LAYERS
        assert sum(stored.values()) == patch.report.kv_bytes
        assert patch.report.kv_tokens == tuple(layer.keys.shape[2] for layer in cache.layers)
        deepest = 16 if config.kv_budget else 24
        assert patch.report.kv_tokens[-1] == deepest
        assert patch.report.kv_bytes_full == 90 * LAYERS * 2 * 2 * 16 * 4


def test_nothing_of_a_call_outlives_it():
    model, ids = tiny(), prompts(90)[0][None]
    with flexasl.patch(model, SMALL):
        out = model(ids)
        keys = weakref.ref(out.past_key_values.layers[0].keys)
        assert keys() is not None
        del out
        gc.collect()
        assert keys() is None


def test_one_prompt_leaves_no_trace_on_the_next():
    model = tiny()
    first, second = (row[None] for row in prompts(64, 77))
    with flexasl.patch(model, SMALL) as patch:
        fresh = model(second)
        rows = patch.report.rows
        model.generate(first, max_new_tokens=3, **GREEDY)
        again = model(second)
    assert patch.report.rows == rows
    assert torch.equal(torch.nan_to_num(fresh.logits), torch.nan_to_num(again.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_take_rows_in_groups(family, monkeypatch):
    model, rows = tiny(family, torch.float64), prompts(90, 61, 9, 33, 8, seed=1)
    config = SMALL.replace(kv_budget=16)
    with flexasl.patch(model, config) as patch:
        want = model(**left_padded(rows), use_cache=True)
        report = patch.report
        monkeypatch.setattr("flexasl.rows.GROUP", 80)
        sizes = attended(monkeypatch)
        got = model(**left_padded(rows), use_cache=True)
        assert sizes[:3] == [[90], [61, 9], [33, 8]]
        assert patch.report.rows == report.rows and patch.report.kv_bytes == report.kv_bytes
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5, equal_nan=True)
    for mine, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.equal(mine.positions, other.positions)
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=1e-5)


def attended(monkeypatch):
    """Rows' lengths of each attention from now on."""
    sizes, attend = [], rows_attention.attend

    def seen(rows, *args):
        sizes.append(rows.lengths)
        return attend(rows, *args)

    monkeypatch.setattr("flexasl.layer_step.attend", seen)
    return sizes


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_a_token(model, ids, tokens=20):
    cache = model(ids).past_key_values
    with Operations() as counted:
        for _ in range(tokens):
            model(ids[:, :1], past_key_values=cache)
    return counted.count / tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3", "gemma3_text"])
def test_a_new_token_after_a_prompt_within_the_budget_costs_what_it_does_unpatched(family):
    model, ids = tiny(family), prompts(20)[0][None]
    want = operations_a_token(model, ids)
    with flexasl.patch(model, SMALL):
        got = operations_a_token(model, ids)
    assert got <= want + 2 * LAYERS + 4, "at most two views more in each layer"


def test_columns_that_are_written_ahead_are_those_of_the_tokens_that_come():
    model, ids = tiny(), prompts(60)[0][None]
    with flexasl.patch(model, SMALL.replace(kv_budget=16)):
        cache = model(ids).past_key_values
        before = [layer.positions.clone() for layer in cache.layers]
        for _ in range(150):
            model(ids[:, :1], past_key_values=cache)
        for layer, first in zip(cache.layers, before, strict=True):
            came = torch.arange(60, 210).expand(*first.shape[:-1], -1)
            assert torch.equal(layer.positions, torch.cat([first, came], -1))
            assert layer.keys.shape[2] == layer.positions.shape[-1] and layer.valid is None
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        cache.crop(-3)
        model(ids[:, :1], past_key_values=cache)
        assert all(layer.positions[..., -1].unique().tolist() == [207] for layer in cache.layers)


def test_remove_puts_back_a_forward_of_another_library():
    model = copy.deepcopy(tiny())
    layer = model.model.layers[2]
    mine = layer.forward = functools.partial(type(layer).forward, layer)
    flexasl.patch(model, SMALL).remove()
    assert layer.forward is mine
    assert "forward" not in vars(model.model.layers[1])


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_remove_restores_the_model_exactly():
    model, ids = tiny(), prompts(64)[0][None]
    want, attributes, count = model(ids).logits, set(vars(model)), hooks(model)
    with pytest.raises(RuntimeError, match="mine"), flexasl.patch(model, SMALL):
        assert hooks(model) > count
        raise RuntimeError("mine")
    patch = flexasl.patch(model, SMALL)
    model(ids)
    patch.remove()
    patch.remove()
    assert torch.equal(model(ids).logits, want)
    assert model.config._attn_implementation == "sdpa"
    assert (set(vars(model)), hooks(model)) == (attributes, count)


def test_an_error_inside_a_layer_leaves_patch_and_model_usable():
    model, ids = tiny(), prompts(64)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        want = model(ids).logits
        report = patch.report

        def fail(*_):
            raise RuntimeError("out of memory")

        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids)
        handle.remove()
        assert patch.report is report
        assert torch.equal(model(ids).logits.nan_to_num(), want.nan_to_num())


def test_two_patched_models_do_not_disturb_each_other():
    one, two, ids = tiny("llama"), tiny("qwen2"), prompts(64)[0][None]
    with flexasl.patch(one, SMALL) as first, flexasl.patch(two, SMALL.replace(select_tokens=40)) as second:
        one(ids), two(ids)
        assert (first.report.rows[0].kept_tokens, second.report.rows[0].kept_tokens) == (24, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = tiny("llama", dtype), prompts(64)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        out = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert out.past_key_values.layers[0].keys.dtype == dtype
    assert patch.report.rows[0].kept_tokens == 24


@pytest.mark.parametrize(
    ("policy", "kept", "slots"),
    [
        ("full", 64, [64] * LAYERS),
        ("snapkv", 64, [24] * LAYERS),
        (flexasl.policies.FixedLayer(1), 24, [64] * 2 + [24] * 4),
        ("fixed_layer", 24, [64] * 3 + [24] * 3),
    ],
)
def test_policies(policy, kept, slots):
    model, ids = tiny(), prompts(64)[0][None]
    with flexasl.patch(model, counting(policy), policy) as patch:
        model(ids)
    assert patch.report.rows[0].kept_tokens == kept
    assert list(patch.report.kv_tokens) == slots


def test_layers_that_no_decision_needs_are_not_scored():
    model, ids = tiny(), prompts(64)[0][None]
    with flexasl.patch(model, SMALL.replace(min_layer=2, tau=1e-9)) as patch:
        model(ids)
        assert patch.report.rows[0].scored_layers == (1, 2, 3)
        model(prompts(20)[0][None])
        assert patch.report.rows[0].scored_layers == ()
    with flexasl.patch(model, policy="full") as patch:
        model(ids)
        assert patch.report.rows[0].scored_layers == ()


def test_refuses_models():
    def refuses(model, message):
        with pytest.raises(UnsupportedError, match=message):
            flexasl.patch(model)

    refuses(torch.nn.Linear(2, 2), "model is a Linear; give a transformers causal language model")
    refuses("gpt", "model is a str")
    tiny_bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    refuses(tiny_bert.eval(), "BertModel cannot generate; give the model with its language-model head")
    refuses(tiny().model, "LlamaModel cannot generate")
    training = copy.deepcopy(tiny()).train()
    refuses(training, "is in training mode; call model.eval")
    with flexasl.patch(tiny()):
        refuses(tiny(), "is patched already; call model.flexasl_patch.remove")
    with flexasl.patch(tiny()):
        pass


def test_refuses_settings_before_touching_the_model(monkeypatch):
    model = tiny()
    count = hooks(model)
    with pytest.raises(flexasl.ConfigError, match="min_layer=9 is beyond the model, which has 6 layers"):
        flexasl.patch(model, ASLConfig(min_layer=9))
    with pytest.raises(flexasl.FlexASLError, match="policy='best' is not known; give one of asl, asl_two_pass"):
        flexasl.patch(model, policy="best")
    with pytest.raises(flexasl.FlexASLError, match="config=512 is an int"):
        flexasl.patch(model, 512)
    quantizing._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.quantization.quant_primitives", None)
    with pytest.raises(UnsupportedError, match=r"kv_dtype='int8' needs torchao .*: pip install 'flexasl\[quant\]'"):
        flexasl.patch(model, ASLConfig(kv_dtype="int8"))
    assert hooks(model) == count and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.ones(1, 64, dtype=torch.long)}, "labels is not available"),
        ({"output_attentions": True}, "output_attentions is not available"),
        ({"output_hidden_states": True}, "output_hidden_states is not available"),
        ({"attention_mask": torch.ones(1, 30)}, r"attention_mask is \[1, 30\]; .* here \[1, 64\]"),
        ({"attention_mask": torch.ones(1, 1, 64, 64)}, r"attention_mask is \[1, 1, 64, 64\]"),
        ({"attention_mask": torch.tensor([[1] * 60 + [0] * 4])}, "pad prompts on the left"),
        ({"attention_mask": torch.tensor([[1] * 30 + [0] + [1] * 33])}, "pad prompts on the left"),
        ({"attention_mask": torch.zeros(1, 64)}, "attention_mask has no token in row 0, only padding"),
        ({"position_ids": torch.cat([torch.arange(32), torch.arange(32)])[None]}, "position_ids restart within a row"),
        (
            {"position_ids": torch.arange(70)[None]},
            r"position_ids is \[1, 70\]; .* here \[1, 64\], \[1, 64\] or \[64\]",
        ),
        ({"position_ids": torch.arange(64).expand(2, -1)}, r"position_ids is \[2, 64\]"),
        ({"position_ids": torch.arange(64).view(1, 1, 1, -1)}, r"position_ids is \[1, 1, 1, 64\]"),
    ],
)
def test_refuses_arguments_before_work_starts(arguments, message):
    model, ids, ran = tiny(), prompts(64)[0][None], []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with flexasl.patch(model, SMALL), pytest.raises(UnsupportedError, match=message):
            model(ids, **arguments)
    finally:
        handle.remove()
    assert not ran


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_without_rows_are_those_of_all_rows(family):
    model, ids = tiny(family), torch.stack(prompts(64, 64))
    want = model(ids).logits
    with flexasl.patch(model, KEEP_ALL):
        torch.testing.assert_close(model(ids, position_ids=torch.arange(64)).logits, want, rtol=0, atol=1e-4)


def test_rows_without_a_token():
    model, batch = tiny(), left_padded(prompts(64, 50))
    batch["attention_mask"][1] = 0
    with flexasl.patch(model, SMALL):
        with pytest.raises(UnsupportedError, match="attention_mask has no token in row 1, only padding"):
            model(**batch)
        with pytest.raises(UnsupportedError, match="the batch has no rows; give at least one prompt"):
            model(torch.zeros(0, 50, dtype=torch.long))
        with pytest.raises(UnsupportedError, match="the batch has rows without a token; give at least one prompt"):
            model(torch.zeros(2, 0, dtype=torch.long))


def test_other_settings_for_the_next_prompts():
    model, ids = tiny(), prompts(64)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        patch.config = ASLConfig(settled_by="variance")
        assert (patch.config.observe_layers, patch.config.max_layer, patch.config.stages) == (2, 3, ())
        patch.config = ASLConfig(select_tokens=40, window=8)
        assert (patch.config.score_from, patch.config.max_layer, len(patch.config.stages)) == (0, 3, 1)
        model(ids)
        assert patch.report.rows[0].kept_tokens == 40
        before = patch.config
        patch.config = before.replace(select_tokens=30)
        for wrong, message in (
            (512, "config=512 is an int; give an ASLConfig"),
            (ASLConfig(min_layer=9), "min_layer=9"),
        ):
            with pytest.raises(flexasl.ConfigError, match=message):
                patch.config = wrong
        model(ids)
        assert patch.report.rows[0].kept_tokens == 30


@pytest.mark.parametrize("policy", ["asl", "fixed_layer", "full", "snapkv", "pyramid_kv", "gemfilter", "streaming"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_settings_that_run_can_be_set_again(family, policy):
    with flexasl.patch(tiny(family), counting(policy, SMALL), policy) as patch:
        before = patch.config
        patch.config = before
        assert patch.config == before


def test_refuses_parts_of_the_model_that_were_replaced():
    model, ids = copy.deepcopy(tiny()), prompts(64)[0][None]
    mine, layer = model.model, model.model.layers[2]
    with flexasl.patch(model, SMALL):
        model.model = copy.deepcopy(tiny()).model
        with pytest.raises(UnsupportedError, match="decoder and layers of the patched LlamaForCausalLM were replaced"):
            model(ids)
        with pytest.raises(UnsupportedError, match="decoder and layers of the patched LlamaForCausalLM were replaced"):
            model.generate(ids, max_new_tokens=2, **GREEDY)
        model.model = mine
        mine.layers[2] = copy.deepcopy(tiny()).model.layers[2]
        with pytest.raises(UnsupportedError, match=r"^layers of the patched LlamaForCausalLM were replaced since"):
            model(ids)
        mine.layers[2] = layer
        model(ids)
    assert torch.equal(model(ids).logits, tiny()(ids).logits)


def test_refuses_caches_that_it_cannot_fill():
    model, ids = tiny(), prompts(64)[0][None]
    unpatched = DynamicCache(config=model.config)
    model(ids, past_key_values=unpatched)
    with flexasl.patch(model, SMALL):
        with pytest.raises(UnsupportedError, match="past_key_values holds 64 tokens that were read by an unpatched"):
            model(ids, past_key_values=unpatched, attention_mask=torch.ones(1, 128))
        with pytest.raises(UnsupportedError, match="past_key_values is a StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=128))
        with pytest.raises(UnsupportedError, match="an offloaded DynamicCache"):
            cache = DynamicCache(config=model.config)
            cache.offloading = True
            model(ids, past_key_values=cache)
        pruned = model(ids).past_key_values
    with pytest.raises(flexasl.FlexASLError, match="made by a patched model and is used by an unpatched one"):
        model(ids[:, :1], past_key_values=pruned)


def test_refuses_training_mode_later_on():
    model = copy.deepcopy(tiny())
    with flexasl.patch(model, SMALL), pytest.raises(UnsupportedError, match="training mode"):
        model.train()
        model(prompts(64)[0][None])


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("rule", [SMALL, SMALL.replace(propagate="mask"), KEEP_ALL])
def test_states_behind_the_last_layer_are_zero_at_padding_and_nan_where_dropped(rule, recorded):
    """Zero where gradients are recorded, too, until the last weights have been used."""
    model, seen = tiny(), []
    handle = model.model.norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    try:
        with torch.set_grad_enabled(recorded), flexasl.patch(model, rule) as patch:
            logits = model(**left_padded(prompts(90, 70))).logits
    finally:
        handle.remove()
    (states,) = seen
    assert (states[1, :20] == 0).all(), "padding"
    for row, start in zip(range(2), (0, 20)):
        gone = torch.ones(90 - start, dtype=torch.bool)
        gone[list(patch.report.rows[row].kept_positions)] = False
        own = states[row, start:]
        assert own[~gone].isfinite().all() and (own[gone] == 0 if recorded else own[gone].isnan()).all()
        assert torch.equal(logits[row, start:].isnan().any(-1), gone)
