"""How often the host and a GPU wait for each other: counted on a device that is not there."""

import copy
import functools
import pathlib
import re

import pretend_gpu
import pytest
import test_varlen
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, LAYERS, SHAPE, SMALL, STAGED, counting, left_padded, prompts
from pretend_gpu import AWAY, Away, away, counted, here, move
from test_example import plain
from transformers import AutoConfig, AutoModelForCausalLM

import flexasl
from flexasl import Visibility, clock, kernels, rows_attention
from flexasl.kernels import varlen
from flexasl.numbers import FEW, SharedReads, on_device, read_together
from flexasl.policies import choose
from flexasl.policies.contract import resolved
from flexasl.prefill import Prefill
from flexasl.prompt_pass import PromptPass

pytestmark = pytest.mark.places

ENDS = 4
"""Reads once the layers have run, at most: what masks dropped, old entries, what the rule saw, what was kept."""
UPLOADS = 2
"""Tensors that a prefill uploads at most, whatever the depth: the thresholds of stages, and what each stage keeps."""
DEPTHS = (6, 12, 24)
SETTINGS = {
    "variance": SMALL,
    "stages": STAGED,
    "kv_budget": SMALL.replace(kv_budget=16),
    "stages and kv_budget": STAGED.replace(kv_budget=16),
    "kv_top_p": SMALL.replace(kv_top_p=0.7),
    "all kept": SMALL.replace(select_tokens=1.0),
    "mask": SMALL.replace(propagate="mask"),
    "mask and stages": STAGED.replace(propagate="mask"),
}
ROWS = {1: (90,), 3: (90, 61, 33), 12: tuple(range(40, 100, 5))}


@functools.cache
def model_of(depth=LAYERS, family="llama", dtype=torch.float32):
    torch.manual_seed(3)
    extra = dict(FAMILIES[family])
    if "layer_types" in extra:
        extra["layer_types"] = extra["layer_types"][:2] * (depth // 2)
    settings = SHAPE | extra | {"num_hidden_layers": depth}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type", family), **settings))
    return model.to(dtype).eval().requires_grad_(False)


class Run:
    """A patched model on the device that is not there, or, without settings, an unpatched one."""

    def __init__(self, config=None, policy="asl", depth=LAYERS, family="llama", dtype=torch.float32, **how):
        self.model = copy.deepcopy(model_of(depth, family, dtype))
        self.patch = None if config is None else flexasl.patch(self.model, config, policy, **how)
        move(self.model)
        self.cache, self.triton = None, True

    @torch.no_grad()
    def read(self, ids, mask=None):
        """Logits and waits of the next tokens."""
        given = {} if mask is None else {"attention_mask": away(mask)}
        ids = away(ids)
        with counted(self.triton) as waits:
            out = self.model(ids, past_key_values=self.cache, use_cache=True, **given)
        self.cache = out.past_key_values
        return here(out.logits), waits

    def prompt(self, lengths):
        batch = left_padded(prompts(*lengths))
        self.mask = batch["attention_mask"] if len(set(lengths)) > 1 else None
        return self.read(batch["input_ids"], self.mask)

    def turn(self, lengths):
        """A later turn of a padded batch, of unlike lengths."""
        batch = left_padded(prompts(*lengths, seed=5))
        self.mask = torch.cat([self.mask, batch["attention_mask"]], 1)
        return self.read(batch["input_ids"], self.mask)

    def more(self, rows, count=1):
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones(rows, count, dtype=torch.int64)], 1)
        return self.read(torch.stack(prompts(*[count] * rows, seed=5)), self.mask)


@functools.cache
def unpatched(rows, count=1):
    """Waits of an unpatched prompt, and of new tokens."""
    run = Run()
    prompt = run.prompt(ROWS[rows])[1]
    return prompt, run.more(rows, count)[1]


def check_prefill(waits, patch, rows=1, layers=0):
    """layers: how many layers a later turn has run that no prompt had."""
    scored, reads = patch.report.rows[0].scored_layers, waits.by_layer("read")
    within = {layer: count for layer, count in reads.items() if layer is not None}
    assert set(within) <= set(scored) and all(count == 1 for count in within.values()), waits.told()
    if patch.config.propagate == "mask":
        assert not within, waits.told()
    assert reads[None] <= unpatched(rows)[0].count("read") + ENDS, waits.told()
    assert waits.count("upload") <= UPLOADS + (rows > FEW) * 10, waits.told()


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_prefill_reads_once_an_observed_layer_and_uploads_as_much_whatever_the_depth(name, rows):
    uploads = []
    for depth in DEPTHS if rows < 12 else DEPTHS[:2]:
        run = Run(SETTINGS[name], depth=depth)
        waits = run.prompt(ROWS[rows])[1]
        check_prefill(waits, run.patch, rows)
        uploads.append(waits.count("upload"))
        pruned = [row.kept_tokens < row.prompt_tokens for row in run.patch.report.rows]
        assert all(pruned) == (name != "all kept")
    if rows <= FEW:
        assert len(set(uploads)) == 1


@pytest.mark.parametrize("policy", sorted({*flexasl.policies.POLICIES} - {"full"}))
def test_of_every_policy(policy):
    run = Run(counting(policy, SMALL.replace(kv_budget=16)), policy, depth=12)
    waits = run.prompt((90, 61, 70))[1]
    check_prefill(waits, run.patch, 3)
    assert run.patch.report.kv_share < 1


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", ["variance", "stages", "kv_budget", "mask"])
def test_of_sliding_windows(family, name):
    """Where the host does not know how many entries a window still sees, it reads that with all others in the end."""
    run = Run(SETTINGS[name], family=family, depth=12)
    check_prefill(run.prompt(ROWS[3])[1], run.patch, 3)
    waits = run.more(3)[1]
    assert waits.count("read") <= unpatched(3)[1].count("read") and not waits.count("upload"), waits.told()


@pytest.mark.parametrize("question", [(30, 41), [[(3, 5), (9, 10), (30, 31), (70, 75)]] * 3], ids=str)
@pytest.mark.parametrize("name", ["stages", "stages and kv_budget", "mask and stages", "variance"])
def test_of_questions(name, question):
    run = Run(SETTINGS[name], depth=12, question=question)
    waits = run.prompt((90, 85, 80))[1]
    check_prefill(waits, run.patch, 3)
    assert all("tokens" in row.ranked_by for row in run.patch.report.rows)


@pytest.mark.parametrize("turns", ["keep", "prune"])
@pytest.mark.parametrize("name", ["variance", "stages", "kv_budget", "kv_top_p"])
def test_of_a_later_turn(name, turns):
    run = Run(SETTINGS[name].replace(later_turns=turns), depth=12)
    run.prompt((90, 90, 90))
    waits = run.more(3, 70)[1]
    if turns == "keep":
        assert not waits.count("read") and not waits.count("upload"), waits.told()
    else:
        check_prefill(waits, run.patch, 3)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_device_that_is_not_there_computes_what_the_cpu_does(name, rows):
    run, batch = Run(SETTINGS[name]), left_padded(prompts(*ROWS[rows]))
    logits, after = run.prompt(ROWS[rows])[0], run.more(rows)[0]
    told = run.patch.report
    mask = torch.cat([batch["attention_mask"], torch.ones(rows, 1, dtype=torch.int64)], 1)
    with torch.no_grad(), flexasl.patch(copy.deepcopy(model_of()), SETTINGS[name]) as patch:
        out = patch._model(**batch, use_cache=True)
        step = patch._model(torch.stack(prompts(*[1] * rows, seed=5)), attention_mask=mask, past_key_values=out[1])
    assert (
        told.rows[0].kept_positions == patch.report.rows[0].kept_positions and told.kv_tokens == patch.report.kv_tokens
    )
    torch.testing.assert_close(logits, out.logits, rtol=0, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(after, step.logits, rtol=0, atol=1e-4)


UNEVEN = (90, 20, 61, 21, 33, 22, 47, 90, 23, 44, 41, 24, 52, 19, 66, 18, 58, 17, 77, 16, 49, 15, 36)
"""Lengths of which every other one is within the budget."""


@pytest.mark.parametrize("lengths", [*ROWS.values(), UNEVEN], ids=len)
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", ["mask", "mask and stages"])
@torch.no_grad()
def test_between_begin_and_close_a_masked_prefill_can_be_captured_whole(name, asked, lengths):
    """A CUDA graph takes neither reads nor uploads; what the numbers are, the host learns at the end."""
    torch.manual_seed(0)
    decoder = move(plain.Decoder(layers=6).eval())
    batch = left_padded(prompts(*lengths))
    caches, tokens = [flexasl.LayerCache() for _ in decoder.blocks], away(batch["input_ids"])
    policy = choose("asl")[0]
    config = resolved(policy, SETTINGS[name], 6)
    width, at = max(lengths), (1, 3, 4, 6, 7, 10, 12, 14)
    asks = [torch.tensor([width - 1 - back for back in reversed(at) if back < length]) for length in lengths]
    with counted():
        if asked:
            where = {"tokens": width, "device": AWAY, "question": asks}
            prefill = Prefill(policy, config, 6, lengths, **where)
            passing = PromptPass(caches, prefill, torch.arange(width, device=AWAY).expand(len(lengths), -1))
        else:
            passing = flexasl.ForwardPass.begin(caches, away(batch["attention_mask"]), SETTINGS[name])
    with counted() as waits:
        decoder(tokens, passing)
    assert not waits, waits.told()
    with counted() as waits:
        report = passing.close()
    assert 0 < waits.count("read") <= ENDS
    assert all(row.kept_tokens == min(24, row.prompt_tokens) for row in report.rows)


# ---------------------------------------------------------------- new tokens


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_new_token_waits_no_more_than_unpatched(name, rows):
    run = Run(SETTINGS[name])
    run.prompt(ROWS[rows])
    for _ in range(3):
        waits = run.more(rows)[1]
        for kind in ("read", "upload"):
            assert waits.count(kind) <= unpatched(rows)[1].count(kind), waits.told()


def test_new_tokens_write_in_place_without_a_wait():
    run = Run(SETTINGS["kv_budget"])
    run.prompt(ROWS[3])
    for cache in run.cache.layers:
        cache.slack = 3
    assert sum(run.more(3)[1].count(kind) for _ in range(6) for kind in ("upload",)) == 0


# ---------------------------------------------------------------- batches


@pytest.fixture
def calls(monkeypatch):
    """Calls of attention: of flex_attention, of any kernel beside `varlen_attn`, and block masks that were made."""
    made = {"flex": 0, "attend": 0, "blocks": 0, "varlen": 0}

    def count(holder, name, key):
        function = getattr(holder, name)
        monkeypatch.setattr(
            holder, name, lambda *args, **also: (made.update({key: made[key] + 1}), function(*args, **also))[1]
        )

    count(pretend_gpu, "_flex", "flex")
    count(kernels, "attend", "attend")
    count(Visibility, "_make_blocks", "blocks")
    count(Visibility, "_make_row_ends", "blocks")
    count(rows_attention, "varlen_attention", "varlen")
    return made


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_prompts_of_different_lengths_are_one_call_a_layer_with_masks_made_once(family, calls):
    """In float32, which `varlen_attn` does not take."""
    run = Run(SMALL.replace(max_layer=4, tau=0.01), family=family)
    run.prompt(ROWS[3])
    (layer,) = {row.selected_layer for row in run.patch.report.rows}
    assert calls["attend"] == LAYERS and calls["flex"] >= layer + 1
    kinds = 1 if family == "llama" else 2  # with a sliding window and without
    assert calls["blocks"] <= 2 * kinds, "for the prompts, and for what is left of them"
    calls.update(attend=0, flex=0)
    run.more(3)
    assert calls["attend"] == LAYERS


def test_prompts_of_different_lengths_are_one_call_of_varlen_attn_where_it_can(calls, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", test_varlen.as_loop)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    run = Run(SMALL.replace(max_layer=4, tau=0.01), dtype=torch.bfloat16)
    run.prompt(ROWS[3])
    assert (calls["varlen"], calls["flex"], calls["attend"]) == (5, 0, 1), "what is left is of one length"
    run = Run(SMALL.replace(propagate="mask"), dtype=torch.bfloat16)
    run.prompt(ROWS[3])
    assert calls["varlen"] == 5 + 2 and calls["flex"] == LAYERS - 2, "from layer 2 on tokens may be masked out"


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("name", ["variance", "stages", "kv_budget", "kv_top_p"])
@torch.no_grad()
def test_rows_of_a_later_turn_are_one_call_a_layer_and_what_each_call_gave(name, family, calls):
    """Behind caches of unequal lengths, by KV head where a budget keeps entries."""
    config, turn = SETTINGS[name].replace(later_turns="prune"), (70, 41, 55)
    run = Run(config, family=family)
    run.prompt(ROWS[3])
    alike = sum(cache.is_aligned(cache.positions.shape[-1]) for cache in run.cache.layers)
    calls.update(flex=0, attend=0, blocks=0)
    logits, waits = run.turn(turn)
    check_prefill(waits, run.patch, 3)
    assert calls["attend"] == LAYERS
    # Masks are made once for the layers whose caches hold the same, and once more where tokens were dropped.
    cuts = {one.layer for row in run.patch.report.rows for one in row.selections if one.layer < alike}
    assert 0 < calls["blocks"] <= LAYERS - alike + 1 + len(cuts)
    assert alike > 2 or "kv" in name
    model, batches = copy.deepcopy(model_of(family=family)), [ROWS[3], turn]
    batches = [left_padded(prompts(*lengths, seed=seed)) for lengths, seed in zip(batches, (0, 5))]
    with flexasl.patch(model, config) as patch:
        cache = model(**batches[0], use_cache=True).past_key_values
        calls.update(attend=0)
        mask = torch.cat([one["attention_mask"] for one in batches], 1)
        want = model(batches[1]["input_ids"], attention_mask=mask, past_key_values=cache).logits
        assert calls["attend"] > LAYERS, "on a CPU row by row"
    assert [row.kept_positions for row in run.patch.report.rows] == [row.kept_positions for row in patch.report.rows]
    assert run.patch.report.kv_tokens == patch.report.kv_tokens
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_triton_rows_go_one_by_one_as_on_a_cpu(family, calls):
    found = []
    for triton in (True, False):
        run = Run(SETTINGS["kv_budget"], family=family)
        run.triton = triton
        calls.update(flex=0, attend=0)
        logits = run.prompt(ROWS[3])[0], run.more(3)[0]
        assert bool(calls["flex"]) == triton and (calls["attend"] == 2 * LAYERS) == triton
        found.append((run.patch.report.rows, *logits))
    (rows, *logits), (same, *others) = found
    assert [row.kept_positions for row in rows] == [row.kept_positions for row in same]
    torch.testing.assert_close(others, logits, rtol=0, atol=1e-4, equal_nan=True)
    with pytest.raises(flexasl.UnsupportedError, match="kernel='flex' needs Triton on meta, and a GPU"):
        run = Run(SETTINGS["variance"], kernel="sdpa")
        states, run.triton = away(torch.randn(1, 2, 9, 16)), False
        with counted(triton=False):
            flexasl.FlexASLAttention(kernel="flex")(states, states, states)


@pytest.mark.parametrize("name", ["variance", "kv_budget", "kv_top_p"])
def test_a_new_token_of_unequal_rows_is_one_call_of_flex_a_layer(name, calls):
    run = Run(SETTINGS[name].replace(kv_budget=None) if name == "variance" else SETTINGS[name])
    run.prompt(ROWS[3])
    calls.update(flex=0, attend=0)
    run.more(3)
    unequal = sum(cache.valid is not None for cache in run.cache.layers)
    assert unequal > 0 and (calls["flex"], calls["attend"]) == (unequal, unequal)


# ---------------------------------------------------------------- what is counted, is counted


def waits_in_a_layer(query):
    query.sum().item()


def uploads_in_a_layer(query):
    return query + torch.tensor([1.0], device=query.device)


def looks_which(query):
    return query[query > 0]


def reads_a_list(query):
    query.flatten()[:3].tolist()


def says_bool(query):
    return bool((query > 0).any())


def indexes_by_a_list(query):
    return query[:, [0, 1]]


def copies_to_the_host(query):
    return query.cpu()


BAD = [
    waits_in_a_layer,
    uploads_in_a_layer,
    looks_which,
    reads_a_list,
    says_bool,
    indexes_by_a_list,
    copies_to_the_host,
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["variance", "mask"])
def test_a_wait_in_a_layer_is_caught(bad, name, monkeypatch):
    attend = rows_attention.attend

    def waiting(rows, attention, query, *args):
        bad(query)
        return attend(rows, attention, query, *args)

    monkeypatch.setattr("flexasl.layer_step.attend", waiting)
    run = Run(SETTINGS[name])
    waits = run.prompt(ROWS[1])[1]
    with pytest.raises(AssertionError, match=r"layer 5: (read|upload) by \w+ at "):
        check_prefill(waits, run.patch)
    assert {one.layer for one in waits} >= set(range(LAYERS))


def test_other_waits_are_told_from_what_waits_for_nothing():
    states, index = away(torch.arange(12.0).view(3, 4)), away(torch.tensor([0, 2]))
    with counted() as waits:
        states[index], states[:, 1:], states.masked_fill_(states > 3, 0.0), states.index_select(0, index)
        index.repeat_interleave(index, output_size=2)
        torch.full((), 3.0, device=AWAY) + torch.arange(3, device=AWAY)
        torch.where(states > 0, states, 0.0)
    assert not waits
    with counted() as waits:
        index.repeat_interleave(index)
        torch.equal(states, states)
        (states > 3).nonzero()
        states[torch.tensor([0, 1])]
        torch.ones(3).to(AWAY)
        states.new_tensor([1.0])
        states[torch.zeros(3, dtype=torch.bool, device=AWAY)]
    assert [one.kind for one in waits] == ["read", "read", "read", "upload", "upload", "upload", "read"]
    with pytest.raises(RuntimeError, match="on the host and on the device"), counted():
        states + torch.ones(3, 4)


# ---------------------------------------------------------------- numbers


def counted_numbers(values, dtype):
    with counted() as waits:
        made = on_device(values, AWAY, dtype)
    assert made.device == AWAY and isinstance(made, Away)
    return here(made), waits.count("upload")


@given(st.lists(st.integers(-9, 2**40), max_size=30) | st.lists(st.integers(0, 4), max_size=30))
def test_whole_numbers_are_filled_in_or_uploaded(values):
    made, uploads = counted_numbers(values, torch.int64)
    assert torch.equal(made, torch.tensor(values, dtype=torch.int64)) and uploads <= (len(values) > FEW)


@given(st.lists(st.booleans(), max_size=30))
def test_bools_are(values):
    made, uploads = counted_numbers(values, torch.bool)
    assert torch.equal(made, torch.tensor(values, dtype=torch.bool)) and uploads <= (len(values) > FEW)


@given(st.lists(st.floats(-9, 9, width=32) | st.integers(0, 3).map(float), max_size=30))
def test_floats_are(values):
    made, uploads = counted_numbers(values, torch.float32)
    assert torch.equal(made, torch.tensor(values, dtype=torch.float32)) and uploads <= (len(values) > FEW)


def test_a_range_and_equal_numbers_are_no_upload():
    for values in (range(5000), [7] * 5000, [*range(600), *[4] * 600, *range(9, 700)]):
        assert counted_numbers(list(values), torch.int64)[1] == 0
    assert counted_numbers([1, 5, 2, 9, 4, 8, 3, 7, 0], torch.int64)[1] == 1


@given(st.lists(st.lists(st.integers(-5, 5), max_size=4), max_size=4))
def test_several_tensors_are_one_read(parts):
    with counted() as waits:
        assert read_together([away(torch.tensor(part, dtype=torch.int64)) for part in parts]) == parts
    assert waits.count("read") == bool(parts)


def test_a_read_takes_along_what_is_wanted():
    reads, some, others = SharedReads(), away(torch.tensor([True, False])), away(torch.tensor([5, 3]))
    with counted() as waits:
        assert reads.now(some) == [1, 0]
        reads.want(others)
        assert reads.now(some) == [1, 0] and reads.wanted() == [5, 3]
        reads.want(others)
        assert reads.wanted() == [5, 3] and reads.now(some) == [1, 0]
    assert waits.count("read") == 4


# ---------------------------------------------------------------- time


class Event:
    """An event of a GPU."""

    waited = 0
    now = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self, stream):
        self.at, Event.now = Event.now, Event.now + 250.0

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_prefill_is_timed_where_its_time_is_asked_for(monkeypatch):
    import pickle

    from flexasl.report import also

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "waited", 0)
    run = Run(SMALL)
    run.prompt(ROWS[1])
    took = clock.Clock(torch.device("cuda")).stop()
    report = also(run.patch.report, prefill_seconds=took)
    assert also(report, profile="one").rows == report.rows and Event.waited == 0
    assert report.prefill_seconds == report.prefill_seconds == 0.25 and Event.waited == 1
    assert pickle.loads(pickle.dumps(also(report, prefill_seconds=took))) == report
    assert report.to_dict()["prefill_seconds"] == 0.25


def test_the_library_synchronises_nowhere_else():
    for path in pathlib.Path(flexasl.__file__).parent.rglob("*.py"):
        found = re.findall(r"\w+\.synchronize\(\)|cuda\.synchronize", path.read_text())
        assert found == (["end.synchronize()"] if path.name == "clock.py" else []), path
