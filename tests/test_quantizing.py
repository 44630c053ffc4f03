"""Caches in eight bits: numbers against float64, a cache against one that is quantised afterwards, models against
models whose cache is rounded after every pass."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, GREEDY, SMALL, counting, left_padded, prompts, tiny
from test_saving import opened, sealed
from tiny_chat import save_tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

import flexasl
from flexasl import FlexASLError, UnsupportedError, embedded, run
from flexasl.cache import LayerCache
from flexasl.quantizing import LARGEST, NUMBERS, dequantize, quantize
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids

pytest.importorskip("torchao")

BATCH, GROUPS, DIM = 2, 2, 8
PRUNING = {"tokens": SMALL, "tokens and cache": SMALL.replace(kv_budget=16)}
EXACT = {"rtol": 1e-6, "atol": 1e-6}
"""For models in float64, whose rounding is too small to carry a number to the next of 8 bits; those are float32."""

kinds = pytest.mark.parametrize("kind", NUMBERS)


# ---------------------------------------------------------------- numbers


def steps(numbers, scales):
    """Distance to the next number on either side, in float64."""
    if numbers.dtype == torch.int8:
        return scales.double().expand(numbers.shape)
    exponent = numbers.double().abs().clamp(min=2.0**-6).log2().floor()
    return 2.0 ** (exponent - 3) * scales.double()


@kinds
@given(size=st.floats(-5, 3), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_no_number_is_wrong_by_more_than_half_a_step(kind, size, seed, dtype):
    states = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**size
    states[0, 0] *= torch.logspace(-3, 3, 64)
    states = states.to(dtype)
    numbers, scales = quantize(states, kind)
    assert (numbers.dtype, scales.dtype) == (NUMBERS[kind], torch.float16)
    assert (numbers.shape, scales.shape) == (states.shape, (2, 3, 5, 1))
    exact = numbers.double() * scales.double()
    wrong = (exact - states.double()).abs()
    # A number between two powers of two may round up to the greater, below which steps are half as wide.
    assert (wrong <= steps(numbers, scales) / 2 * (1 + 1e-5)).all()
    largest = states.double().abs().amax(-1, keepdim=True)
    assert (scales.double() * LARGEST[NUMBERS[kind]] <= largest * (1 + 2**-8) + 1e-9).logical_or(scales <= 2**-17).all()
    assert_close(dequantize(numbers, scales, torch.float64), exact, rtol=1e-6, atol=0)
    assert_close(dequantize(numbers, scales, torch.bfloat16), exact.to(torch.bfloat16), rtol=2**-7, atol=0)


@kinds
def test_what_was_rounded_once_stays_as_it_is(kind):
    numbers, scales = quantize(torch.randn(2, 3, 50, 64) * 3, kind)
    again = quantize(dequantize(numbers, scales, torch.float32), kind)
    assert torch.equal(numbers.view(torch.int8), again[0].view(torch.int8)) and torch.equal(scales, again[1])


@kinds
def test_zeros_outliers_and_extremes(kind):
    states = torch.zeros(1, 1, 4, 64)
    states[0, 0, 1, 3] = 40
    states[0, 0, 1, 5] = -1
    states[0, 0, 2] = 3e8
    states[0, 0, 3] = 1e-12
    numbers, scales = quantize(states, kind)
    got = dequantize(numbers, scales, torch.float32)[0, 0]
    assert not got[0].any() and scales.isfinite().all()
    assert abs(got[1, 3] - 40) <= 40 / LARGEST[NUMBERS[kind]] / 16, "the float16 scale hardly moves the largest number"
    assert got[2].isfinite().all() and (got[2] > 1e6).all()
    assert got[3].abs().max() <= 2.0**-17


@kinds
def test_bytes(kind):
    plain, small = LayerCache(), LayerCache(kv_dtype=kind)
    states = torch.randn(1, 3, 100, 64, dtype=torch.bfloat16)
    for cache in (plain, small):
        cache.append(states, states, torch.arange(100)[None], None, 100)
    assert small.nbytes == sum(part.untyped_storage().nbytes() for part in small.stored) == 2 * 3 * 100 * (64 + 2)
    assert small.nbytes / plain.nbytes == 66 / 128 <= 0.53
    assert small.nbytes_unquantized == plain.nbytes == plain.nbytes_unquantized
    assert small.keys.dtype == small.values.dtype == torch.bfloat16


# ---------------------------------------------------------------- one layer's cache


def append(choose, caches, seen):
    count = choose(st.integers(1, 4))
    states = torch.randn(2, caches[0].positions.shape[0], GROUPS, count, DIM)
    columns = torch.arange(seen, seen + count).expand(states.shape[1], -1)
    for cache in caches:
        cache.append(*states, columns, None, count)


def extend(choose, caches, seen):
    count = choose(st.integers(1, 4))
    states = torch.randn(2, caches[0].positions.shape[0], GROUPS, count, DIM)
    columns = torch.arange(seen, seen + count).expand(states.shape[1], -1)
    for cache in caches:
        keys, values = cache.extend(columns, None, count)
        keys[:, :, -count:], values[:, :, -count:] = states
        cache.commit(keys, values, count)


def retain(choose, caches, seen):
    wanted = torch.rand(caches[0].positions.shape) < choose(st.floats(0.3, 1))
    for cache in caches:
        cache.retain(wanted)


def crop(choose, caches, seen):
    count = choose(st.integers(0, seen))
    for cache in caches:
        cache.crop(count)


def select_rows(choose, caches, seen):
    rows = torch.tensor(choose(st.lists(st.integers(0, caches[0].positions.shape[0] - 1), min_size=1, max_size=3)))
    for cache in caches:
        cache.select_rows(rows)


def replace_rows(choose, caches, seen):
    rows = choose(st.sets(st.integers(0, caches[0].positions.shape[0] - 1), min_size=1))
    count = choose(st.integers(1, 5))
    states = torch.randn(2, len(rows), GROUPS, count, DIM)
    for cache in caches:
        other = LayerCache(kv_dtype=cache.kv_dtype)
        other.append(*states, torch.arange(count).expand(len(rows), -1), None, count)
        cache.replace_rows(list(rows), other)


@kinds
@given(data=st.data(), slack=st.sampled_from([0, 3]), seed=st.integers(0, 99))
def test_every_operation_and_then_quantising_is_quantising_and_then_the_operation(kind, data, slack, seed):
    torch.manual_seed(seed)
    caches = plain, small = LayerCache(slack), LayerCache(slack, kind)
    states = torch.randn(2, BATCH, GROUPS, 6, DIM)
    valid = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    for cache in caches:
        cache.append(*states, torch.arange(6).expand(BATCH, -1), valid, 6)
    operations = [append, extend, retain, crop, select_rows, replace_rows]
    for operation in data.draw(st.lists(st.sampled_from(operations), max_size=6)):
        operation(data.draw, caches, plain.seen)
        assert plain.seen == small.seen and torch.equal(plain.positions, small.positions)
        assert (plain.valid is None) == (small.valid is None)
        assert plain.valid is None or torch.equal(plain.valid, small.valid)
        assert small.keys.shape == plain.keys.shape
        if plain.keys.shape[2] == 0:
            continue
        keys, values = quantize(plain.keys, kind), quantize(plain.values, kind)
        real = torch.ones_like(plain.positions, dtype=torch.bool) if plain.valid is None else plain.valid
        real = (real[:, None] if real.dim() == 2 else real)[..., None]
        for want, got in zip((keys[0], values[0], keys[1], values[1]), small.stored, strict=True):
            assert torch.equal(want.float() * real, got.float() * real)
        assert torch.equal(small.keys, dequantize(small.stored[0], small.stored[2], torch.float32))


# ---------------------------------------------------------------- models


def rounded(cache, kind):
    """What a cache of the model's dtype would be, had it been kept in eight bits."""
    for layer in cache.layers:
        for states in layer.stored:
            states.copy_(dequantize(*quantize(states, kind), states.dtype))


def read_and_go_on(model, batch, after_each, turns=((1,) * 6)):
    """Logits of a prompt's last token and of turns of so many tokens, and the cache."""
    mask = batch["attention_mask"]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**batch, position_ids=position_ids, use_cache=True)
    logits, cache = [out.logits[:, -1]], out.past_key_values
    after_each(cache)
    for turn, count in enumerate(turns):
        ids = torch.stack(prompts(*[count] * len(mask), seed=20 + turn))
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        position_ids = mask.cumsum(1)[:, -count:] - 1
        out = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
        logits.append(out.logits[:, -1])
        after_each(cache)
    return torch.stack(logits), cache


@kinds
@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_answers_as_one_whose_cache_is_rounded_after_each_pass(family, pruning, kind):
    model, batch = tiny(family, torch.float64), left_padded(prompts(67, 50))
    with flexasl.patch(model, PRUNING[pruning]):
        full, _ = read_and_go_on(model, batch, lambda cache: None)
        want, plain = read_and_go_on(model, batch, lambda cache: rounded(cache, kind))
    with flexasl.patch(model, PRUNING[pruning].replace(kv_dtype=kind)) as patch:
        got, cache = read_and_go_on(model, batch, lambda cache: None)
    assert torch.equal(got[0], full[0]), "the prompt is read in full precision"
    assert not torch.allclose(got[1:], full[1:], **EXACT)
    assert_close(got, want, **EXACT)
    assert patch.report.config["kv_dtype"] == kind
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.stored[0].dtype == NUMBERS[kind] and torch.equal(layer.positions, other.positions)
        assert_close(layer.keys, other.keys, **EXACT)
        assert_close(layer.values, other.values, **EXACT)


@kinds
@pytest.mark.parametrize("later_turns", ["keep", "prune"])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt_oss", "deepseek_v3"])
def test_later_turns(family, later_turns, kind):
    model, batch, turns = tiny(family, torch.float64), left_padded(prompts(67, 50)), (40, 1, 1)
    config = SMALL.replace(later_turns=later_turns, kv_budget=20)
    with flexasl.patch(model, config):
        want, _ = read_and_go_on(model, batch, lambda cache: rounded(cache, kind), turns)
    with flexasl.patch(model, config.replace(kv_dtype=kind)) as patch:
        got, _ = read_and_go_on(model, batch, lambda cache: None, turns)
    assert_close(got, want, **EXACT)
    assert patch.report.rows[0].prompt_tokens == (40 if later_turns == "prune" else 67)


@kinds
@pytest.mark.parametrize("policy", ["asl_two_pass", "gemfilter", "pyramid_kv", "streaming"])
def test_a_row_is_alone(policy, kind):
    model, rows = tiny("llama", torch.float64), prompts(90, 61, 9, 33, seed=1)
    config = SMALL.replace(min_layer=None, max_layer=None, kv_dtype=kind)
    config = counting(policy, config.replace(kv_budget=16) if policy == "pyramid_kv" else config)
    with flexasl.patch(model, config, policy):
        out = model.generate(**left_padded(rows), max_new_tokens=6, output_logits=True, **GREEDY)
        for index, row in enumerate(rows):
            solo = model.generate(row[None], max_new_tokens=6, output_logits=True, **GREEDY)
            assert_close(torch.stack(out.logits, 1)[index], torch.stack(solo.logits, 1)[0], **EXACT)
            assert torch.equal(out.sequences[index, -6:], solo.sequences[0, -6:])


@kinds
def test_beams_and_crops(kind):
    """Beams against the same beams in a batch, and a cropped cache against one that never went further."""
    model, ids = tiny("llama", torch.float64), prompts(60)[0][None]
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind)):
        many = model.generate(ids.repeat(2, 1), max_new_tokens=6, num_beams=3, **GREEDY)
        one = model.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY)
        assert torch.equal(many.sequences, one.sequences.repeat(2, 1))
        assert many.past_key_values.layers[0].stored[0].shape[0] == 6
        scored = model.generate(ids, max_new_tokens=6, num_beams=1, output_logits=True, **GREEDY)
        cache = scored.past_key_values
        cache.crop(-3)
        again = model(scored.sequences[:, -4:-3], past_key_values=cache).logits[:, -1]
        assert_close(again.float(), scored.logits[-3], **EXACT)


@kinds
def test_report_and_memory(kind):
    model, ids = tiny("llama", torch.bfloat16), prompts(80)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        model(ids)
        plain = patch.report
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind)) as patch:
        cache = model(ids).past_key_values
        report = patch.report
    assert report.rows == plain.rows, "the decision is the same"
    assert report.kv_bytes == sum(layer.nbytes for layer in cache.layers)
    assert report.kv_bytes_full == plain.kv_bytes_full
    assert report.kv_bytes / plain.kv_bytes == (16 + 2) / 32
    assert f"of full), kept in {kind}" in str(report) and "kept in" not in str(plain)
    for layer in cache.layers:
        assert [states.untyped_storage().nbytes() for states in layer.stored] == [part.nbytes for part in layer.stored]


@kinds
def test_compiled_layers(kind):
    model, config = copy.deepcopy(tiny()), SMALL.replace(kv_dtype=kind)
    with flexasl.patch(tiny(), config):
        want = [tiny().generate(prompts(n)[0][None], max_new_tokens=9, **GREEDY).sequences for n in (70, 80)]
    with flexasl.patch(model, config, compile=True):
        assert torch.equal(model.generate(prompts(70)[0][None], max_new_tokens=9, **GREEDY).sequences, want[0])
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        out = model.generate(prompts(80)[0][None], max_new_tokens=9, **GREEDY)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert torch.equal(out.sequences, want[1])
    assert out.past_key_values.layers[0].stored[0].dtype == NUMBERS[kind]


@kinds
def test_a_masked_prompt(kind):
    model, batch = tiny("llama", torch.float64), left_padded(prompts(67, 50))
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind)):
        want, _ = read_and_go_on(model, batch, lambda cache: None)
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind, propagate="mask")):
        got, _ = read_and_go_on(model, batch, lambda cache: None)
    assert_close(got, want, **EXACT)


@kinds
def test_quantised_weights_and_a_quantised_cache(kind):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    before, after, ids = copy.deepcopy(tiny()), copy.deepcopy(tiny()), prompts(60)[0][None]
    quantize_(before, Int8WeightOnlyConfig())
    with flexasl.patch(before, SMALL.replace(kv_dtype=kind)):
        want = before.generate(ids, max_new_tokens=8, output_logits=True, **GREEDY)
    with flexasl.patch(after, SMALL.replace(kv_dtype=kind)):
        quantize_(after, Int8WeightOnlyConfig())
        got = after.generate(ids, max_new_tokens=8, output_logits=True, **GREEDY)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert {layer.stored[0].dtype for layer in got.past_key_values.layers} == {NUMBERS[kind]}


@kinds
def test_a_cache_of_the_users_own_and_one_that_is_used_again(kind):
    model, ids = tiny(), prompts(60)[0][None]
    cache = DynamicCache()
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind)):
        model(ids, past_key_values=cache)
        assert {layer.kv_dtype for layer in cache.layers} == {kind}
    with flexasl.patch(model, SMALL):
        model(ids[:, :1], past_key_values=cache)
        assert {layer.stored[0].dtype for layer in cache.layers} == {NUMBERS[kind]}, "it goes on as it began"
        cache.reset()
        model(ids, past_key_values=cache)
        assert {layer.stored[0].dtype for layer in cache.layers} == {torch.float32}, "a new prompt has its own"


# ---------------------------------------------------------------- files


@kinds
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_a_loaded_cache_answers_as_the_one_that_was_saved(family, kind, tmp_path):
    model, path = tiny(family), tmp_path / "prompt.safetensors"
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind, kv_budget=16)):
        cache = model(**left_padded(prompts(64, 50)), use_cache=True).past_key_values
        cache.save(path)
    with flexasl.patch(model, SMALL):
        loaded = flexasl.load_cache(path, model)
        for mine, theirs in zip(cache.layers, loaded.layers, strict=True):
            assert (mine.kv_dtype, mine.nbytes) == (theirs.kv_dtype, theirs.nbytes) == (kind, mine.nbytes)
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(mine.stored, theirs.stored, strict=True))
        more = torch.stack(prompts(7, 7, seed=9))
        want, got = (model(more, past_key_values=one).logits for one in (copy.deepcopy(cache), loaded))
        assert torch.equal(want, got)
        assert {layer.stored[0].dtype for layer in loaded.layers} == {NUMBERS[kind]}


ASK = """
import sys, torch, flexasl
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with flexasl.patch(model):
    cache = flexasl.load_cache(sys.argv[2], model)
    ids = torch.cat([cache.token_ids, torch.tensor([[5, 6, 7]])], 1)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
print(*out[0, ids.shape[1]:].tolist())
"""


@kinds
def test_another_process_answers_as_the_first_one_does(kind, tmp_path):
    folder, path = save_tiny_model(tmp_path / "model"), tmp_path / "prompt.safetensors"
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind)):
        cache = model(torch.randint(3, 999, (1, 300)), use_cache=True).past_key_values
        cache.save(path)
        ids = torch.cat([cache.token_ids, torch.tensor([[5, 6, 7]])], 1)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder), str(path)], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.split() == [str(token) for token in out[0, ids.shape[1] :].tolist()]


BROKEN = {
    "scales that are missing": (
        lambda h: h.update({"layers.2.others": h.pop("layers.2.key_scales")}),
        "layer 2 is not complete",
    ),
    "scales of another type": (
        lambda h: h["layers.2.value_scales"].update(dtype="BF16"),
        "layers.2.value_scales are torch.bfloat16",
    ),
    "scales of another shape": (
        lambda h: h["layers.2.value_scales"]["shape"].reverse(),
        r"layers.2.value_scales are torch.float16 \[1, 60, 2, 1\], which fits neither",
    ),
    "another kind of numbers in one layer": (
        lambda h: h["layers.1.keys"].update(dtype="U8"),
        "layers.1.keys are torch.uint8",
    ),
    "the version of files without scales": (
        lambda h: h["__metadata__"].update(version="1"),
        "it calls itself version 1 and is of version 2",
    ),
    "numbers that are floats": (
        lambda h: [h[name].update(dtype="F8_E5M2") for name in h if name.endswith(("keys", "values"))],
        "tokens in torch.float8_e5m2",
    ),
}


@kinds
@pytest.mark.parametrize("name", BROKEN)
def test_files_whose_scales_are_not_right_are_refused(name, kind, tmp_path):
    change, words = BROKEN[name]
    model, path = tiny(), tmp_path / "prompt.safetensors"
    with flexasl.patch(model, SMALL.replace(kv_dtype=kind)):
        model(prompts(60)[0][None], use_cache=True).past_key_values.save(path)
        header, data = opened(path.read_bytes())
        assert header["__metadata__"]["version"] == "2"
        change(header)
        path.write_bytes(sealed(header, data))
        with pytest.raises(FlexASLError, match=words):
            flexasl.load_cache(path, model)


# ---------------------------------------------------------------- torchao


def test_the_import_is_quiet():
    code = "from flexasl.quantizing import primitives; primitives('int8')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert (done.stdout, done.stderr) == ("", "")


@kinds
def test_the_command_line(kind, tmp_path, monkeypatch, capsys):
    from flexasl.tools.cli import main

    folder = save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("word " * 200)
    monkeypatch.chdir(tmp_path)
    given = ["--file", "text.txt", "--model", str(folder), "--select-tokens", "64", "--kv-dtype", kind]
    for words in (
        ["ask", *given, "-q", "Why?", "--json", "--max-new-tokens", "3"],
        ["prefill", *given, "--out", "a.safetensors", "--json"],
        ["ask", "--cache", "a.safetensors", "--model", str(folder), "-q", "Why?", "--json", "--max-new-tokens", "3"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        out = capsys.readouterr()
        assert ended.value.code == 0, out.err
        assert f'"kv_dtype": "{kind}"' in out.out
    with pytest.raises(SystemExit) as ended:
        main(["ask", "--cache", "a.safetensors", "-q", "Why?", "--kv-dtype", kind])
    assert ended.value.code == 2 and "--kv-dtype has no effect with --cache" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "a.safetensors"])
    assert "intact, format 2" in capsys.readouterr().out


def test_a_quantised_cache_is_refused_where_torchao_is_missing(monkeypatch, tmp_path):
    from flexasl import quantizing

    model, path = tiny(), tmp_path / "prompt.safetensors"
    with flexasl.patch(model, SMALL.replace(kv_dtype="int8")):
        model(prompts(60)[0][None], use_cache=True).past_key_values.save(path)
    quantizing._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.quantization.quant_primitives", None)
    with (
        flexasl.patch(model, SMALL),
        pytest.raises(UnsupportedError, match=r"kv_dtype='int8' needs torchao .*pip install 'flexasl\[quant\]'"),
    ):
        flexasl.load_cache(path, model)


@pytest.mark.slow
def test_a_real_model_finds_as_many_sentences():
    model, tokenizer = embedded.load()
    found = {kind: 0 for kind in (None, *NUMBERS)}
    for seed in range(3):
        fact = magic_number(seed)
        text = needle_prompt(tokenizer, 1000, (seed + 0.5) / 3, fact.needle, fact.question, seed)
        ids = prompt_ids(tokenizer, text, fact.answer_prefix)
        for kind in found:
            config = flexasl.ASLConfig(select_tokens=256, kv_dtype=kind)
            said = run.answer(model, tokenizer, ids, max_new_tokens=12, config=config, policy="asl")
            found[kind] += fact.answer in said.text
    assert found[None] >= 2
    assert all(found[kind] >= found[None] - 1 for kind in NUMBERS), found
