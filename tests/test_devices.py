"""Patched models on the device of the tests, a GPU where there is one: against unpatched ones, against the CPU and
against a recomputation without pruning."""

import copy
import warnings

import pytest
import torch
from models import FAMILIES, GREEDY, SMALL, STAGED, counting, held_columns, left_padded, prompts, recompute, tiny
from on_device import EXPERTS, FEATURED, batch_on, decided, generate, model_on, needs_gpu
from test_example import plain
from torch._dynamo.utils import counters

import flexasl

pytestmark = pytest.mark.places

CLOSE = {"rtol": 0, "atol": 5e-4}
KEEP_ALL = SMALL.replace(select_tokens=1.0)
PRUNING = {
    "tokens": SMALL,
    "tokens_and_cache": SMALL.replace(kv_budget=16),
    "tokens_and_top_p": SMALL.replace(kv_top_p=0.7),
}
ROWS = prompts(90, 61, 9, 33, seed=1)

families = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", [*FEATURED, "deepseek_v3", "mixtral"])
featured = pytest.mark.parametrize("family", FEATURED)


@pytest.fixture
def gpu(device):
    """The device, where it is another than the CPU, to compare with."""
    if device.type == "cpu":
        pytest.skip("needs a GPU beside the CPU")
    return device


@pytest.fixture(autouse=True)
def _graphs_of_this_test_alone():
    torch._dynamo.reset()


# ---------------------------------------------------------------- what must always hold


@families
def test_keep_all_is_identity(family, device):
    model, rows = model_on(device, family), prompts(70, 41)
    batch = batch_on(device, rows)
    want, answer = model(**batch).logits, generate(model, rows, 12)[0].sequences
    real = batch["attention_mask"].bool()
    with flexasl.patch(model, KEEP_ALL) as patch:
        torch.testing.assert_close(model(**batch).logits[real], want[real], **CLOSE)
        assert torch.equal(generate(model, rows, 12)[0].sequences, answer)
    assert [row.kept_tokens for row in patch.report.rows] == [70, 41]
    assert patch.report.kv_bytes == patch.report.kv_bytes_full


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in FAMILIES), *((family, torch.float16) for family in FEATURED)],
)
def test_keep_all_in_half_precision_is_as_near_to_float64_as_the_unpatched_model(family, dtype, device):
    """Experts are chosen by rounding, now and then: there, for three tokens of four."""
    model, rows = model_on(device, family, dtype), prompts(70, 41)
    exact = copy.deepcopy(tiny(family, torch.float64))
    exact.load_state_dict(model.state_dict())
    batch = batch_on(device, rows)
    want = torch.cat([exact(row[None]).logits[0] for row in rows])

    def wrong():
        logits = model(**batch).logits[batch["attention_mask"].bool()]
        errors = (logits.cpu().double() - want).abs().amax(-1)
        return errors.quantile(0.75 if family in EXPERTS else 1.0).item()

    plain = wrong()
    with flexasl.patch(model, KEEP_ALL):
        assert wrong() <= 2 * plain
        (ids,) = generate(model, rows[:1], 8)[0].sequences.cpu()
    logits = exact(ids[None]).logits[0, 69:-1]
    behind = logits.amax(-1) - logits.gather(1, ids[70:, None])[:, 0]
    assert behind.quantile(0.75 if family in EXPERTS else 1.0) <= 4 * plain, "each token is the best one up to rounding"


@some_families
@pytest.mark.parametrize("pruning", PRUNING)
def test_pruned_decode_equals_recompute(family, pruning, device):
    model, ids = model_on(device, family), prompts(67)[0]
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        out, logits = generate(model, [ids], 17)
    row = patch.report.rows[0]
    assert row.kept_tokens < row.prompt_tokens
    held = [held_columns(layer).cpu() for layer in out.past_key_values.layers]
    kept = torch.tensor(row.kept_positions)
    full = recompute(tiny(family), out.sequences.cpu()[:, :-1], 67, held, row.selected_layer, kept)
    torch.testing.assert_close(logits, full[:, 66:], **CLOSE)


@some_families
def test_a_row_is_alone(family, device):
    model = model_on(device, family)
    with flexasl.patch(model, SMALL.replace(kv_budget=20)) as patch:
        out, logits = generate(model, ROWS)
        together = decided(patch.report)
        for index, row in enumerate(ROWS):
            solo, alone = generate(model, [row])
            assert decided(patch.report) == together[index : index + 1]
            torch.testing.assert_close(logits[index], alone[0], **CLOSE)
            assert torch.equal(out.sequences[index, -6:], solo.sequences[0, -6:])


@some_families
def test_gather_equals_mask(family, device):
    model, found = model_on(device, family), []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, SMALL.replace(propagate=propagate)) as patch:
            out, logits = generate(model, ROWS)
        found.append((decided(patch.report), patch.report.kv_tokens, out.sequences, logits))
    (*gathered, sequences, logits), (*masked, same, others) = found
    assert gathered == masked and torch.equal(sequences, same)
    torch.testing.assert_close(logits, others, **CLOSE)


@families
def test_decides_as_on_the_cpu(family, gpu):
    """Where other tests have recomputed it."""
    found = []
    for device in ("cpu", gpu):
        model = model_on(device, family)
        with flexasl.patch(model, SMALL.replace(kv_budget=20)) as patch:
            out, logits = generate(model, ROWS)
        held = [held_columns(layer).tolist() for layer in out.past_key_values.layers]
        found.append((decided(patch.report), held, patch.report.kv_bytes, out.sequences.cpu(), logits))
    (*want, tokens, logits), (*got, same, others) = found
    assert got == want and torch.equal(tokens, same)
    torch.testing.assert_close(others, logits, **CLOSE)


@pytest.mark.parametrize("policy", flexasl.policies.POLICIES)
def test_every_policy_keeps_what_it_keeps_on_the_cpu(policy, gpu):
    found = []
    for device in ("cpu", gpu):
        model = model_on(device)
        with flexasl.patch(model, counting(policy, SMALL.replace(kv_budget=16)), policy) as patch:
            out, logits = generate(model, prompts(90, 61, 70))
        found.append((decided(patch.report), patch.report.kv_tokens, out.sequences.tolist(), logits))
    (*want, logits), (*got, others) = found
    assert got == want
    torch.testing.assert_close(others, logits, **CLOSE)


# ---------------------------------------------------------------- kernels and graphs


@needs_gpu
@featured
def test_flex_answers_as_the_other_kernels(family, device):
    model, found = model_on(device, family), []
    for kernel in ("eager", "flex"):
        with flexasl.patch(model, SMALL.replace(kv_budget=20), kernel=kernel) as patch:
            out, logits = generate(model, ROWS)
        found.append((decided(patch.report), out.sequences.tolist(), logits))
    (*want, logits), (*got, others) = found
    assert got == want
    torch.testing.assert_close(others, logits, **CLOSE)


@needs_gpu
def test_models_of_all_kinds_run_on_flex_in_one_process(device):
    """Each kind of mask is another graph of flex_attention, of which torch makes few for one function."""
    for dtype in (torch.float32, torch.bfloat16):
        for family in FEATURED:
            for kernel in ("auto", "flex"):
                with flexasl.patch(
                    model_on(device, family, dtype), SMALL.replace(kv_budget=20), kernel=kernel
                ) as patch:
                    generate(model_on(device, family, dtype), ROWS, 3)
                    generate(model_on(device, family, dtype), ROWS[:1], 3)
                assert patch.report.rows[0].kept_tokens == 24


@featured
def test_compiled_layers_answer_as_uncompiled_ones_and_compile_nothing_more(family, device):
    model = copy.deepcopy(model_on(device, family))
    config = SMALL.replace(kv_budget=20)
    work = [prompts(64), prompts(101), prompts(90, 71), prompts(61, 33, 80), prompts(50, 50, 50, 50)]
    with torch.no_grad():
        with flexasl.patch(model, config) as patch:
            want = [(*generate(model, rows, 4), decided(patch.report)) for rows in work]
        with flexasl.patch(model, config, compile=True) as patch:
            for rows in (prompts(70), prompts(81), prompts(75, 60), prompts(52, 52)):
                generate(model, rows, 4)
            before = counters["stats"]["unique_graphs"]
            got = [(*generate(model, rows, 4), decided(patch.report)) for rows in work]
            assert counters["stats"]["unique_graphs"] == before
    for (out, logits, told), (other, others, same) in zip(want, got, strict=True):
        assert told == same and torch.equal(out.sequences, other.sequences)
        torch.testing.assert_close(others, logits, **CLOSE)


def test_a_long_compiled_decode_writes_into_its_cache_in_place(device):
    model, ids = copy.deepcopy(model_on(device)), prompts(90)
    with torch.no_grad():
        with flexasl.patch(model, SMALL):
            want = generate(model, ids, 65)[1]
        with flexasl.patch(model, SMALL, compile=True):
            out, logits = generate(model, ids, 65)
            layer = out.past_key_values.layers[0]
            storage = layer.keys.data_ptr()
            model(out.sequences[:, -1:], past_key_values=out.past_key_values)
            assert layer.keys.data_ptr() == storage
    torch.testing.assert_close(logits, want, **CLOSE)


@needs_gpu
@pytest.mark.parametrize("config", [SMALL, STAGED], ids=["variance", "lookup"])
def test_a_masked_prefill_is_one_cuda_graph(config):
    torch.manual_seed(0)
    decoder = plain.Decoder(layers=5).eval().cuda()
    first, other = (torch.randint(257, (2, 90), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    mask, config = torch.ones(2, 90, dtype=torch.int64), config.replace(propagate="mask")

    def begin():
        caches = [flexasl.LayerCache() for _ in decoder.blocks]
        return flexasl.ForwardPass.begin(caches, mask.cuda(), config)

    with torch.no_grad():
        tokens, passing = first.cuda(), begin()
        decoder(tokens, begin())  # kernels that are made on first use
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = decoder(tokens, passing)
        tokens.copy_(other)
        graph.replay()
        told = passing.close()
        eager = begin()
        want = decoder(other.cuda(), eager)
    assert decided(told) == decided(eager.close())
    torch.testing.assert_close(logits, want, **CLOSE, equal_nan=True)


@needs_gpu
@featured
@pytest.mark.parametrize("name", ["kv_budget", "lookup", "mask"])
def test_waits_are_those_that_are_counted_without_a_gpu(family, name):
    """See `test_waits.py`."""
    config = {"kv_budget": SMALL.replace(kv_budget=20), "lookup": STAGED, "mask": SMALL.replace(propagate="mask")}[name]
    model = model_on(torch.device("cuda"), family)
    with torch.no_grad(), flexasl.patch(model, config) as patch:
        batch = batch_on("cuda", ROWS)
        model(**batch)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(**batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(one.message) for one in caught)
    # Mask and position ids before the layers; what masks dropped, old entries, what the rule saw and kept behind them.
    assert waits <= 3 + 4 + (name != "mask") * len(patch.report.rows[0].scored_layers)


# ---------------------------------------------------------------- caches, turns, the process


@featured
@pytest.mark.parametrize("turns", ["keep", "prune"])
def test_a_later_turn_and_beams_are_those_of_the_cpu(family, turns, gpu):
    found, more = [], torch.stack(prompts(40, 40, seed=4))
    for device in ("cpu", gpu):
        model, batch = model_on(device, family), batch_on(device, prompts(67, 67))
        with flexasl.patch(model, SMALL.replace(later_turns=turns)) as patch:
            cache = model(**batch, use_cache=True).past_key_values
            out = model(more.to(device), past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0], device=device))
            last = model(more[:, :1].to(device), past_key_values=cache).logits
            beams = model.generate(batch["input_ids"][:1], num_beams=3, max_new_tokens=5, **GREEDY).sequences
        found.append((decided(patch.report), beams.tolist(), out.logits[:, -1].cpu(), last.cpu()))
    (*want, logits, last), (*got, others, its) = found
    assert got == want
    torch.testing.assert_close((others, its), (logits, last), **CLOSE)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_caches_in_eight_bits(kind, device):
    pytest.importorskip("torchao")
    model, found = model_on(device, "llama", torch.bfloat16), []
    for kv_dtype in (None, kind):
        with flexasl.patch(model, SMALL.replace(kv_budget=20, kv_dtype=kv_dtype)) as patch:
            _, logits = generate(model, ROWS, 4)
        found.append((decided(patch.report), patch.report.kv_bytes, logits.double()))
    (plain, whole, want), (told, few, got) = found
    assert told == plain and few / whole == pytest.approx((16 + 2) / 32)
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=0, atol=0, msg="a prompt is read as ever")
    # One rounding of each key and value, of 127 or 8 steps.
    assert (got[:, 1] - want[:, 1]).abs().max() < (0.1 if kind == "int8" else 0.4) * want.abs().max()


@featured
def test_a_saved_cache_answers_on_another_device(family, tmp_path, gpu):
    path, question = tmp_path / "prompt.safetensors", torch.stack(prompts(7, 7, seed=9))
    for source, target in (("cpu", gpu), (gpu, "cpu"), (gpu, gpu)):
        one, other = model_on(source, family), model_on(target, family)
        config = SMALL.replace(kv_budget=16)
        with flexasl.patch(one, config):
            cache = one(**batch_on(source, prompts(64, 50)), use_cache=True).past_key_values
            cache.save(path)
            want = one(question.to(source), past_key_values=cache).logits
        with flexasl.patch(other, config):
            loaded = flexasl.load_cache(path, other)
            assert {layer.keys.device.type for layer in loaded.layers} == {torch.device(target).type}
            got = other(question.to(target), past_key_values=loaded).logits
        torch.testing.assert_close(got.cpu(), want.cpu(), **CLOSE)


DEFAULTS = {
    "later turns": SMALL.replace(kv_budget=20, later_turns="prune"),
    "mask": SMALL.replace(propagate="mask"),
    "attention": SMALL.replace(kv_top_p=0.7),
    "stages": STAGED,
    "masked stages": STAGED.replace(propagate="mask"),
}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", DEFAULTS)
@featured
def test_the_default_device_changes_nothing(family, name, asked, device):
    """A model on the device in a process whose default is the CPU, and the other way round."""
    cpu = torch.device("cpu")
    turn = prompts(40, seed=4)[0][None]
    for own, default in ((device, "cpu"), (device, device), (cpu, device)):
        model, batch, found = model_on(own, family), batch_on(own, prompts(90, 61)), []
        for place in ("cpu" if own == cpu else "meta", default):
            question = (25, 36) if asked else None
            with torch.device(place), flexasl.patch(model, DEFAULTS[name], question=question) as patch:
                out = model(**batch, use_cache=True)
                step = model(batch["input_ids"][:, :1], past_key_values=out.past_key_values)
                one = model(batch["input_ids"][:1], use_cache=True)
                later = model(turn.to(own), past_key_values=one.past_key_values)
                found.append((decided(patch.report), [out.logits, step.logits, later.logits]))
        (want, logits), (got, others) = found
        assert got == want
        torch.testing.assert_close(others, logits, **CLOSE, equal_nan=True)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    model, ids = model_on(device), prompts(60)
    with flexasl.patch(model, SMALL) as patch:
        want = generate(model, ids, 4)[1]
        with torch.autocast("cuda", dtype=dtype):
            got = generate(model, ids, 4)[1]
    assert patch.report.rows[0].kept_tokens == 24
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=0, atol=0.3)


def test_a_mask_may_be_left_out_and_inputs_may_be_embeddings(device):
    model, rows = model_on(device), prompts(80, 80)
    ids = torch.stack(rows).to(device)
    with flexasl.patch(model, SMALL):
        want = model(**batch_on(device, rows)).logits
        for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            torch.testing.assert_close(model(**given).logits, want, **CLOSE, equal_nan=True)
        assert left_padded(rows)["attention_mask"].all()
