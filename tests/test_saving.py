"""A prompt saved in one process and asked about in another; files that are not what they were."""

import copy
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import GREEDY, SMALL, STAGED, counting, left_padded, prompts, tiny
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import flexasl
from flexasl import FlexASLError, UnsupportedError, saving
from flexasl.integrations.transformers import PrunedCache
from flexasl.integrations.transformers.fingerprint import fingerprint
from flexasl.policies import POLICIES

PRUNING = {
    "tokens": SMALL,
    "tokens and cache": SMALL.replace(kv_budget=16),
    "stages": STAGED,
    "stages and cache": STAGED.replace(kv_budget=16),
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "prompt.safetensors")


@pytest.fixture
def patched():
    with flexasl.patch(tiny(), PRUNING["tokens and cache"]):
        yield tiny()


def read_prompt(model, *lengths, seed=0):
    batch = left_padded(prompts(*lengths, seed=seed))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**batch, position_ids=positions, use_cache=True).past_key_values


def go_on(model, cache, seed=9, count=5, **settings):
    """Logits and tokens of an answer to a question of 7 tokens, from a copy of the cache."""
    cache = copy.deepcopy(cache)
    more = torch.stack(prompts(*[7] * len(cache.token_ids), seed=seed))
    ids, mask = torch.cat([cache.token_ids, more], 1), torch.cat([cache.attention_mask, torch.ones_like(more)], 1)
    settings = GREEDY | {"output_logits": True} | settings
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, **settings)
    return torch.stack(out.logits), out.sequences


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def refused(path, model=None):
    with pytest.raises(FlexASLError) as caught:
        saving.read(path) if model is None else flexasl.load_cache(path, model)
    message = str(caught.value)
    assert message.startswith(path) and "\n" not in message and len(message) < 500
    return message


# ---------------------------------------------------------------- what is saved comes back


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "deepseek_v3", "gpt2"])
def test_a_loaded_cache_answers_as_the_one_that_was_saved(family, pruning, path):
    model = tiny(family)
    with flexasl.patch(model, PRUNING[pruning]) as patch:
        cache = read_prompt(model, 64, 50)
        report = patch.report
        cache.save(path)
        loaded = flexasl.load_cache(path, model)
        assert patch.report is report, "loading leaves no trace"
        assert loaded.reports == cache.reports == (report,)
        assert torch.equal(loaded.token_ids, cache.token_ids)
        assert torch.equal(loaded.attention_mask, cache.attention_mask) and not loaded.attention_mask.all()
        for mine, theirs in zip(cache.layers, loaded.layers, strict=True):
            assert (mine.seen, mine.uncroppable, mine.nbytes) == (theirs.seen, theirs.uncroppable, theirs.nbytes)
            for part in ("keys", "values", "positions", "valid"):
                one, other = getattr(mine, part), getattr(theirs, part)
                assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
        for seed in (9, 10):
            assert same(go_on(model, cache, seed), go_on(model, loaded, seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, path):
    model = tiny("llama", dtype)
    with flexasl.patch(model, SMALL):
        cache = read_prompt(model, 60)
        cache.save(path)
        loaded = flexasl.load_cache(path, model)
    assert loaded.layers[0].keys.dtype == dtype
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, loaded.layers, strict=True))


ASK = """
import sys, torch, flexasl
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with flexasl.patch(model):
    for question in ([5, 6, 7], [9, 8]):
        cache = flexasl.load_cache(sys.argv[2], model)
        ids = torch.cat([cache.token_ids, torch.tensor([question])], 1)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
        print(*out[0, ids.shape[1]:].tolist())
"""


def test_another_process_answers_two_questions_as_the_first_one_does(tmp_path, path):
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    with flexasl.patch(model, PRUNING["tokens and cache"]):
        cache = model(torch.randint(3, 999, (1, 300)), use_cache=True).past_key_values
        cache.save(path)
        want = []
        for question in ([5, 6, 7], [9, 8]):
            ids = torch.cat([cache.token_ids, torch.tensor([question])], 1)
            kept = copy.deepcopy(cache)
            out = model.generate(ids, past_key_values=kept, max_new_tokens=12, do_sample=False, eos_token_id=None)
            want.append(out[0, ids.shape[1] :].tolist())
    done = subprocess.run([sys.executable, "-c", ASK, str(folder), path], capture_output=True, text=True, check=True)
    assert [list(map(int, line.split())) for line in done.stdout.splitlines()] == want


def test_a_turn_later_it_can_be_saved_again(patched, path):
    read_prompt(patched, 64).save(path, notes={"title": "first"})
    cache = flexasl.load_cache(path, patched)
    assert cache.notes == {"title": "first"}
    ids = torch.cat([cache.token_ids, prompts(7)[0][None]], 1)
    out = patched.generate(ids, past_key_values=cache, max_new_tokens=4, **GREEDY)
    cache.save(path)
    again = flexasl.load_cache(path, patched)
    assert torch.equal(again.token_ids, out.sequences[:, :-1])
    assert again.notes == {"title": "first"} and again.reports == cache.reports
    assert same(go_on(patched, cache), go_on(patched, again))


def test_pruned_later_turns_have_reports_of_their_own(path):
    model = tiny()
    with flexasl.patch(model, SMALL.replace(later_turns="prune")):
        cache = read_prompt(model, 64)
        model(prompts(40, seed=3)[0][None], past_key_values=cache)
        cache.save(path)
        assert [row.prompt_tokens for report in flexasl.load_cache(path, model).reports for row in report.rows] == [
            64,
            40,
        ]


@pytest.mark.slow
def test_compiled_decode_goes_on_from_a_loaded_cache(path):
    model = copy.deepcopy(tiny())
    with flexasl.patch(model, SMALL):
        read_prompt(model, 64).save(path)
        want = go_on(model, flexasl.load_cache(path, model))
    with flexasl.patch(model, SMALL, compile=True):
        got = go_on(model, flexasl.load_cache(path, model))
    assert torch.equal(want[1], got[1])
    torch.testing.assert_close(want[0], got[0], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- token ids follow the cache


def test_ids_and_mask_follow_what_is_done_to_the_cache(patched):
    cache = read_prompt(patched, 64, 50)
    batch = left_padded(prompts(64, 50))
    assert torch.equal(cache.token_ids, batch["input_ids"])
    cache.crop(-5)
    assert torch.equal(cache.token_ids, batch["input_ids"][:, :-5])
    more = prompts(3, seed=5)[0].expand(2, -1)
    patched(more, past_key_values=cache)
    assert torch.equal(cache.token_ids, torch.cat([batch["input_ids"][:, :-5], more], 1))
    assert torch.equal(cache.attention_mask[:, :59], batch["attention_mask"][:, :59])
    assert cache.attention_mask.shape == (2, 62) and cache.attention_mask[:, 59:].all()
    ids, mask = cache.token_ids, cache.attention_mask
    for act, rows in [
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda: cache.batch_repeat_interleave(2), [1, 1, 0, 0]),
        (lambda: cache.batch_select_indices(torch.tensor([3])), [0]),
    ]:
        act()
        assert torch.equal(cache.token_ids, ids[rows]) and torch.equal(cache.attention_mask, mask[rows])
    cache.reset()
    assert (cache.token_ids, cache.attention_mask, cache.reports) == (None, None, ())


def test_beams_can_be_saved(patched, path):
    out = patched.generate(**left_padded(prompts(60)), num_beams=3, max_new_tokens=6, **GREEDY)
    out.past_key_values.save(path)
    loaded = flexasl.load_cache(path, patched)
    assert loaded.token_ids.shape == (3, 65)
    assert torch.equal(loaded.token_ids[0], out.past_key_values.token_ids[0])
    assert out.sequences[0, :-1].tolist() in loaded.token_ids.tolist()


def test_embeddings_have_no_ids_and_can_be_saved_all_the_same(patched, path):
    ids = prompts(64)[0][None]
    cache = patched(inputs_embeds=patched.get_input_embeddings()(ids), use_cache=True).past_key_values
    assert cache.token_ids is None
    cache.save(path)
    loaded = flexasl.load_cache(path, patched)
    assert loaded.token_ids is None and loaded.get_seq_length() == 64
    more, anything = prompts(7, seed=9)[0][None], torch.zeros(1, 64, dtype=torch.long)
    given = {"attention_mask": torch.ones(1, 71), "past_key_values": copy.deepcopy(loaded)}
    out = patched.generate(torch.cat([anything, more], 1), max_new_tokens=5, **given, **GREEDY)
    want = go_on(patched, read_prompt(patched, 64))[1]
    assert torch.equal(out.sequences[:, 64:], want[:, 64:])
    loaded = patched(more, past_key_values=loaded).past_key_values
    assert loaded.token_ids is None, "the first ones stay unknown"


def test_a_pass_that_failed_midway_leaves_nothing_to_save(patched, path):
    cache = read_prompt(patched, 64)

    def fail(*args):
        raise RuntimeError("broken layer")

    handle = patched.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        patched(prompts(3)[0][None], past_key_values=cache)
    handle.remove()
    assert cache.token_ids is None
    with pytest.raises(FlexASLError, match="the cache is half filled"):
        cache.save(path)


def test_generation_refuses_another_beginning(patched):
    cache = read_prompt(patched, 64)
    ids = torch.cat([cache.token_ids, prompts(7)[0][None]], 1)
    ids[0, 17] += 1
    with pytest.raises(UnsupportedError, match=r"begin with the 64 tokens .* row 0 differs at token 17"):
        patched.generate(ids, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 64


def test_generation_refuses_ids_that_do_not_go_beyond_what_was_read(patched):
    cache, question = read_prompt(patched, 64), prompts(7)[0][None]
    known = cache.token_ids
    fresh = copy.deepcopy(cache)
    patched.generate(torch.cat([known, question], 1), past_key_values=cache, max_new_tokens=8, **GREEDY)
    again = torch.cat([known, question + 1], 1)
    for held, seen, ids in (
        (cache, 78, again),  # another question, as long as the first
        (cache, 78, cache.token_ids),
        (cache, 78, question),
        (fresh, 64, known),
        (fresh, 64, known[:, :20]),
        (fresh, 64, question),
    ):
        refused = f"have {ids.shape[1]} tokens, which do not go beyond the {seen} that past_key_values has read"
        for given in ((), (ids,)):
            named = {} if given else {"input_ids": ids}
            for name in ("past_key_values", "cache"):
                with pytest.raises(UnsupportedError, match=refused):
                    patched.generate(*given, **named, **{name: held})
        assert held.get_seq_length() == seen
    patched.generate(again, past_key_values=fresh, max_new_tokens=2, **GREEDY)


def test_nothing_to_read_is_refused(patched):
    cache, empty = read_prompt(patched, 64), torch.zeros(1, 0, dtype=torch.long)
    for given in ({}, {"past_key_values": cache}):
        with pytest.raises(UnsupportedError, match=r"input_ids are \[1, 0\]; give at least one token"):
            patched.generate(empty, **given)
        with pytest.raises(UnsupportedError, match="the batch has rows without a token; give at least one prompt"):
            patched(empty, **given)
    assert cache.get_seq_length() == 64


def test_a_copy_leaves_the_graph_of_gradients_behind(patched):
    ids, more = (row[None] for row in prompts(64, 7))
    with torch.no_grad():
        want = patched(more, past_key_values=patched(ids).past_key_values).logits
    with torch.enable_grad():
        embeds = patched.get_input_embeddings()(ids).requires_grad_()
        cache = patched(inputs_embeds=embeds).past_key_values
    assert cache.layers[0].keys.requires_grad
    for held in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in held.layers)
        torch.testing.assert_close(patched(more, past_key_values=held).logits, want)
    assert cache.layers[0].keys.requires_grad


@pytest.mark.parametrize("slack", [0, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_read_under_inference_mode_and_gone_on_from_outside(family, slack):
    model, (ids, more) = tiny(family), [row[None] for row in prompts(64, 4)]
    said = []
    with flexasl.patch(model, SMALL) as patch:
        patch.slack = slack
        for first in (torch.no_grad(), torch.inference_mode()):
            with first:
                cache = model(ids).past_key_values
                model(more, past_key_values=cache)
                model(more[:, :1], past_key_values=cache)
            for token in more[0]:
                out = model(token.view(1, 1), past_key_values=cache)
            cache.crop(-2)
            with torch.inference_mode():
                model(more[:, :1], past_key_values=cache)
            said.append(model(more[:, 1:2], past_key_values=cache).logits + out.logits)
    torch.testing.assert_close(said[1], said[0])


def test_a_new_dynamic_cache_becomes_one_that_can_be_saved(patched, path):
    mine = DynamicCache(config=patched.config)
    patched(prompts(64)[0][None], past_key_values=mine)
    assert isinstance(mine, PrunedCache)
    mine.save(path)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(mine)))
    assert torch.equal(copied.token_ids, mine.token_ids)
    with pytest.raises(FlexASLError, match="outlived the model"):
        copied.save(path)


# ---------------------------------------------------------------- mapped, and never written to


def mapped_files(tensor):
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= at < end:
            return line.split()[-1]
    return None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_tensors_are_mapped_and_the_file_stays_as_it_is(patched, path):
    read_prompt(patched, 64, 50).save(path)
    before = Path(path).read_bytes()
    cache = flexasl.load_cache(path, patched)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.positions)]
    copies = [tensor.clone() for tensor in held]
    assert {mapped_files(tensor) for tensor in held} == {path}
    cache.batch_repeat_interleave(2)
    cache.crop(-3)
    patched(prompts(4)[0].expand(4, -1), past_key_values=cache)
    patched(prompts(1)[0].expand(4, -1), past_key_values=cache)
    assert all(torch.equal(*pair) for pair in zip(held, copies, strict=True))
    assert Path(path).read_bytes() == before
    assert all(mapped_files(layer.keys) is None or mapped_files(layer.keys) != path for layer in cache.layers)


def test_room_for_new_tokens_is_never_made_in_the_file(patched, path):
    patched.flexasl_patch.slack = 8
    read_prompt(patched, 64).save(path)
    before = Path(path).read_bytes()
    cache = flexasl.load_cache(path, patched)
    want = go_on(patched, cache, count=12)
    for token in prompts(3)[0]:
        patched(token.view(1, 1), past_key_values=cache)
    keys = cache.layers[0].keys
    assert keys.untyped_storage().nbytes() > keys.nbytes, "with room, new entries go in place"
    assert Path(path).read_bytes() == before
    assert same(go_on(patched, flexasl.load_cache(path, patched), count=12), want)


def test_saving_over_the_file_that_is_in_use(patched, path):
    read_prompt(patched, 64).save(path)
    cache = flexasl.load_cache(path, patched)
    want = go_on(patched, cache)
    read_prompt(patched, 50, seed=1).save(path)
    assert same(go_on(patched, cache), want)
    cache.save(path)
    assert same(go_on(patched, flexasl.load_cache(path, patched)), want)


# ---------------------------------------------------------------- written whole or not at all


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_error_while_writing_leaves_the_old_file(patched, path, monkeypatch, failing):
    read_prompt(patched, 64).save(path)
    old = Path(path).read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(FlexASLError, match=f"^{path} cannot be written: No space left on device$"):
        read_prompt(patched, 50).save(path)
    assert Path(path).read_bytes() == old
    assert [file.name for file in Path(path).parent.iterdir()] == [Path(path).name]


def test_where_it_cannot_be_saved(patched, tmp_path):
    cache = read_prompt(patched, 64)
    with pytest.raises(FlexASLError, match=r"lies in a folder that does not exist; make .*none first"):
        cache.save(tmp_path / "none" / "prompt.safetensors")
    with pytest.raises(FlexASLError, match="is a folder; give the name of a file"):
        cache.save(tmp_path)
    cache.reset()
    with pytest.raises(FlexASLError, match="the cache is empty; save it after a prefill"):
        cache.save(tmp_path / "prompt.safetensors")


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"pages": 3}, "notes.pages is 3, where a text is needed"),
        ({"pages": None}, "notes.pages is null, where a text is needed"),
        ({"pages": ["1"]}, "notes.pages is a list"),
        ({3: "pages"}, "a name in notes is 3, where a text is needed"),
        ({"title": "half: \ud800"}, "it is not UTF-8"),
        ([("title", "a contract")], "notes is a list, where an object is needed"),
        ("a contract", "notes is 'a contract', where an object is needed"),
    ],
)
def test_notes_that_could_not_be_read_again_are_refused(patched, path, notes, words):
    cache = read_prompt(patched, 64)
    cache.save(path, notes={"title": "old"})
    old = Path(path).read_bytes()
    with pytest.raises(FlexASLError) as caught:
        cache.save(path, notes=notes)
    assert f"{path} could not be read again, so nothing is written: " in str(caught.value) and words in str(
        caught.value
    )
    assert Path(path).read_bytes() == old


@pytest.mark.parametrize(("part", "words"), [("columns", "columns do not ascend"), ("values", "values are")])
def test_what_is_written_has_passed_the_readers_own_check(patched, path, part, words):
    cache = read_prompt(patched, 64)
    layer = saving.SavedLayer(**_broken(cache.layers[2], part))
    whole = {"seen": 64, "token_ids": cache.token_ids, "attention_mask": None, "model": {}, "reports": cache.reports}
    with pytest.raises(FlexASLError, match=f"could not be read again, so nothing is written: layers.0.{words}"):
        saving.write(path, saving.SavedCache(layers=(layer,), **whole))
    assert not Path(path).exists()


def _broken(layer, part):
    whole = {"stored": tuple(layer.stored), "positions": layer.positions, "valid": layer.valid}
    if part == "columns":
        return whole | {"positions": layer.positions.flip(-1)}
    return whole | {"stored": (layer.stored[0], layer.stored[1].double())}


@pytest.mark.parametrize("content", [b"The lease ends in May. " * 20, struct.pack("<Q", 100) + b"{" * 200])
def test_files_of_others_are_never_written_over(patched, path, content):
    _written(path, content)
    with pytest.raises(FlexASLError, match=f"^{path} was not written by flexasl; give another name, or remove"):
        read_prompt(patched, 64).save(path)
    assert Path(path).read_bytes() == content
    _written(path, b"")
    read_prompt(patched, 64).save(path)
    assert flexasl.load_cache(path, patched).get_seq_length() == 64


def test_the_file_has_the_rights_of_any_other_file(patched, path, tmp_path):
    read_prompt(patched, 64).save(path)
    (tmp_path / "other").touch()
    assert Path(path).stat().st_mode == (tmp_path / "other").stat().st_mode


# ---------------------------------------------------------------- another model


def other_model(**changes):
    torch.manual_seed(3)
    config = AutoConfig.for_model(**(tiny().config.to_dict() | changes))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def nudged(name):
    model = copy.deepcopy(tiny())
    model.get_parameter(name).mul_(1.001)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny("qwen2"), "its architecture is 'LlamaForCausalLM', and this model's is 'Qwen2ForCausalLM'"),
        (lambda: tiny("llama", torch.bfloat16), "its dtype is 'float32', and this model's is 'bfloat16'"),
        (lambda: other_model(num_hidden_layers=5), "its num_hidden_layers is 6, and this model's is 5"),
        (lambda: other_model(intermediate_size=80), "its intermediate_size is 96"),
        (lambda: other_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "its rope_parameters is"),
        (lambda: other_model(rms_norm_eps=1e-5), "its rms_norm_eps is 1e-06"),
        (lambda: nudged("model.embed_tokens.weight"), "its digest of weights is"),
        (lambda: nudged("model.norm.weight"), "its digest of weights is"),
        (lambda: nudged("model.layers.2.mlp.up_proj.weight"), "its digest of weights is"),
    ],
)
def test_another_model_is_refused(content, path, make, words):
    _written(path, content)
    other = make()
    with flexasl.patch(other, SMALL):
        message = refused(path, other)
    assert words in message and message.endswith("load it with the model that read the prompt")


def test_the_same_weights_loaded_anew_are_the_same_model(content, path):
    _written(path, content)
    again = copy.deepcopy(tiny())
    again.config.use_cache = not again.config.use_cache
    again.config._name_or_path = "elsewhere"
    with flexasl.patch(again, policy="full"):
        assert flexasl.load_cache(path, again).get_seq_length() == 64


class Sealed(torch.Tensor):
    """Weights in eight bits with a scale, as quantising libraries have them, that nothing can look into."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} dispatch: no kernel for {func}")


class Packed(Sealed):
    """The same, and it says what it is made of."""

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Packed(parts["numbers"], parts["scale"])


def packed(scale=0.5, kind=Packed):
    model = torch.nn.Linear(8, 8, bias=False)
    model.config, model.dtype = tiny().config, torch.float32
    numbers = torch.arange(64, dtype=torch.int8).view(8, 8)
    model.weight = torch.nn.Parameter(kind(numbers, torch.tensor([scale])), requires_grad=False)
    return model


def test_quantised_weights_are_known_by_what_is_stored():
    one, same, other = (fingerprint(packed(scale)) for scale in (0.5, 0.5, 0.25))
    assert one == same and one["shapes"] == other["shapes"] and one["weights"] != other["weights"]


def test_weights_that_cannot_be_looked_into_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"Linear has weights that no fingerprint can be taken of \(.*no kernel"):
        fingerprint(packed(kind=Sealed))


def test_an_unpatched_model_is_refused(path):
    with flexasl.patch(tiny(), SMALL):
        read_prompt(tiny(), 64).save(path)
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM is not patched.*call flexasl.patch\(model\) first"):
        flexasl.load_cache(path, tiny())
    with pytest.raises(UnsupportedError, match="model is a Linear; saved caches are for transformers"):
        flexasl.load_cache(path, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "asl"])
def test_every_policy(policy, path):
    model = tiny()
    with flexasl.patch(model, counting(policy, SMALL.replace(min_layer=None, max_layer=None)), policy):
        cache = read_prompt(model, 64, 50)
        cache.save(path)
        assert same(go_on(model, cache), go_on(model, flexasl.load_cache(path, model)))


# ---------------------------------------------------------------- files that are not what they were


def sealed(header, data):
    """A file with its right digest: what somebody makes who means harm."""
    header["__metadata__"] = {"digest": "0" * 64} | {
        name: text for name, text in header["__metadata__"].items() if name != "digest"
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + data
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[: saving.PLACE] + digest + content[saving.PLACE + 64 :]


def opened(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def described(change):
    """A change of the description inside the header."""

    def act(header, data):
        description = json.loads(header["__metadata__"]["cache"])
        header["__metadata__"]["cache"] = json.dumps(change(description) or description)
        return data

    return act


def tensor_changed(name, change):
    """A change of one tensor's bytes."""

    def act(header, data):
        start, end = header[name]["data_offsets"]
        return data[:start] + change(data[start:end]) + data[end:]

    return act


def entry_changed(name, **changes):
    return lambda header, data: header[name].update(changes) or data


HOSTILE = {
    "a later version": lambda h, d: h["__metadata__"].update(version="3") or d,
    "the version of files with scales": lambda h, d: h["__metadata__"].update(version="2") or d,
    "another format": lambda h, d: h["__metadata__"].update(format="pt") or d,
    "more metadata": lambda h, d: h["__metadata__"].update(more="1") or d,
    "metadata of another type": lambda h, d: h["__metadata__"].update(cache=["x"]) or d,
    "no description": lambda h, d: h["__metadata__"].update(cache="") or d,
    "description nested deep": lambda h, d: h["__metadata__"].update(cache="[" * 100_000) or d,
    "description of another type": lambda h, d: h["__metadata__"].update(cache="[]") or d,
    "a huge number": lambda h, d: h["__metadata__"].update(cache='{"seen": ' + "9" * 5000 + "}") or d,
    "seen is NaN": described(lambda c: c.update(seen=float("nan"))),
    "seen is true": described(lambda c: c.update(seen=True)),
    "seen is negative": described(lambda c: c.update(seen=-1)),
    "seen is too small": described(lambda c: c.update(seen=30)),
    "seen is too large": described(lambda c: c.update(seen=2**62)),
    "uncroppable too large": described(lambda c: c["uncroppable"].__setitem__(0, 65)),
    "uncroppable of another type": described(lambda c: c.update(uncroppable=["a"] * 6)),
    "one layer fewer": described(lambda c: c["uncroppable"].pop()),
    "one layer more": described(lambda c: c["uncroppable"].append(0)),
    "no layer": described(lambda c: c.update(uncroppable=[])),
    "a model that is a list": described(lambda c: c.update(model=[])),
    "notes that are numbers": described(lambda c: c.update(notes={"a": 1})),
    "a report that is none": described(lambda c: c.update(reports=[{}])),
    "a report without rows": described(lambda c: c["reports"][0].update(rows=None)),
    "a report with wrong counts": described(lambda c: c["reports"][0].update(kv_tokens=["many"])),
    "a missing tensor": lambda h, d: h.pop("layers.3.columns") and d,
    "data beyond the tensors": lambda h, d: d + b"\0" * 8,
    "data cut short": lambda h, d: d[:-8],
    "a huge shape": entry_changed("layers.0.keys", shape=[2**40, 2**40, 2**40, 16]),
    "a negative shape": entry_changed("layers.0.keys", shape=[1, -2, -64, 16]),
    "three dimensions": entry_changed("layers.0.keys", shape=[2, 16, 16]),
    "heads and entries swapped": entry_changed("layers.1.keys", shape=[1, 16, 2, 16]),
    "another dtype": entry_changed("layers.1.keys", dtype="I32"),
    "an unknown dtype": entry_changed("layers.1.keys", dtype="F31"),
    "another layer's bytes": lambda h, d: (
        h["layers.1.keys"].update(data_offsets=h["layers.2.keys"]["data_offsets"]) or d
    ),
    "columns that are floats": entry_changed("layers.1.columns", dtype="F64"),
    "columns beyond the prompt": tensor_changed("layers.1.columns", lambda b: struct.pack("<q", 2**40) + b[8:]),
    "negative columns": tensor_changed("layers.1.columns", lambda b: struct.pack("<q", -1) + b[8:]),
    "columns that do not ascend": tensor_changed("layers.1.columns", lambda b: b[8:16] + b[:8] + b[16:]),
    "token ids beyond all numbers": tensor_changed("token_ids", lambda b: struct.pack("<q", -(2**63)) + b[8:]),
    "an unknown name": lambda h, d: h.update(pickle=h.pop("token_ids")) or d,
}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A whole file, of a model that is patched in the tests."""
    file = tmp_path_factory.mktemp("saved") / "prompt.safetensors"
    with flexasl.patch(tiny(), PRUNING["tokens and cache"]):
        read_prompt(tiny(), 64).save(file, notes={"title": "a contract"})
    return file.read_bytes()


def test_sealing_is_what_saving_does(content):
    assert sealed(*opened(content)) == content


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_although_their_digest_is_right(content, path, name):
    header, data = opened(content)
    data = HOSTILE[name](header, data)
    Path(path).write_bytes(sealed(header, data))
    message = refused(path)
    assert "changed since" not in message, "found by its own check"


def test_tensors_that_the_model_does_not_make_are_refused(content, path, patched):
    """Well formed in themselves: found by asking the model."""
    header, data = opened(content)
    for name in header:
        if name.endswith(("keys", "values")):
            header[name]["shape"] = [1, 2, 8 * header[name]["shape"][2] // 16, 32]
        elif name.endswith("columns"):
            header[name]["shape"][-1] //= 2
    halves = {name: entry for name, entry in header.items() if name.endswith("columns")}
    kept, start = b"", 0
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            last = first + (last - first) // 2 if name in halves else last
            kept += data[first:last]
            entry["data_offsets"] = [start, start + last - first]
            start += last - first
    Path(path).write_bytes(sealed(header, kept))
    saving.read(path)
    assert "has other keys and values at layer 0 than the model makes" in refused(path, patched)

    header, data = opened(content)
    data = tensor_changed("token_ids", lambda b: struct.pack("<q", 199) + b[8:])(header, data)
    Path(path).write_bytes(sealed(header, data))
    assert "has token ids beyond the model's 199" in refused(path, patched)


def test_padding_cannot_become_an_entry(path):
    with flexasl.patch(tiny(), SMALL):
        read_prompt(tiny(), 64, 50).save(path)
    header, data = opened(Path(path).read_bytes())
    name = "layers.0.valid"
    Path(path).write_bytes(sealed(header, tensor_changed(name, lambda b: b"\1" * len(b))(header, data)))
    assert "layers.0" in refused(path)


def mutations(content, count, seed=0):
    """Files that differ from the content: cut, extended, bits flipped, bytes changed, moved, and headers edited."""
    choose = random.Random(seed)
    (length,) = struct.unpack("<Q", content[:8])
    number = 0
    while number < count:
        kind = number % 10
        made = bytearray(content)
        at = choose.randrange(8 + length if kind < 4 else len(content))
        if kind in (0, 4):
            made[at] ^= 1 << choose.randrange(8)
        elif kind in (1, 5):
            made[at] = choose.randrange(256)
        elif kind == 2:
            del made[at : at + choose.randint(1, 40)]
        elif kind == 3:
            made[at:at] = choose.randbytes(choose.randint(1, 40))
        elif kind == 6:
            del made[choose.randrange(len(made)) :]
        elif kind == 7:
            made += choose.randbytes(choose.randint(1, 100))
        elif kind == 8:  # the length of the header
            made[:8] = struct.pack("<Q", choose.choice([0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1]))
        else:  # a piece of the header, twice
            start = choose.randrange(8, 8 + length)
            piece = made[start : start + choose.randint(1, 200)]
            made[start:start] = piece
            made[:8] = struct.pack("<Q", length + len(piece))
        if bytes(made) != content:
            number += 1
            yield bytes(made)


def test_a_thousand_mutated_files_are_refused(content, path, patched):
    for made in mutations(content, 1000):
        Path(path).write_bytes(made)
        refused(path, patched)
    Path(path).write_bytes(content)
    assert flexasl.load_cache(path, patched).get_seq_length() == 64


def mangled(value, choose):
    """A JSON value with something in it changed."""
    odd = [None, True, -1, 0, 2**31, 2**63, 1.5, "", "x", [], {}, [[]], [-1, 1]]
    if isinstance(value, dict) and value and choose.random() < 0.85:
        name = choose.choice(list(value))
        return value | {name: mangled(value[name], choose)}
    if isinstance(value, list) and value and choose.random() < 0.7:
        at = choose.randrange(len(value))
        return value[:at] + [mangled(value[at], choose)] + value[at + 1 :]
    return choose.choice(odd)


def test_a_thousand_forged_headers_are_refused_or_change_nothing_that_counts(content, path, patched):
    """Right digests, wrong headers: an error, or a cache with the very entries that were saved."""
    choose, accepted = random.Random(1), 0
    # Deep copies: the file is written to below, in place, which no user must do to a file that is in use.
    want = copy.deepcopy(saving.read(_written(path, content)))
    for _ in range(1000):
        header, data = opened(content)
        if choose.random() < 0.5:
            described(lambda c: mangled(c, choose))(header, data)
        else:
            strings = header.pop("__metadata__")
            changed = mangled(header, choose)
            header = {"__metadata__": strings} | (changed if isinstance(changed, dict) else {})
        _written(path, sealed(header, data))
        try:
            got = saving.read(path)
        except FlexASLError:
            continue
        accepted += 1
        assert got.seen == want.seen and torch.equal(got.token_ids, want.token_ids)
        for mine, theirs in zip(got.layers, want.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.positions, theirs.positions)
    assert accepted < 1000


def _written(path, content):
    Path(path).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (b"", "was not written by flexasl; give a file that flexasl prefill or cache.save wrote"),
        (b"The lease ends in May. " * 20, "was not written by flexasl"),
        (b"\x80\x04\x95" + b"cposix\nsystem\n" * 20, "was not written by flexasl"),
        (struct.pack("<Q", 100) + b"[" * 200, "was not written by flexasl"),
    ],
)
def test_files_of_other_kinds(path, made, words):
    assert words in refused(_written(path, made))


def test_a_name_given_twice_is_refused(content, path):
    header, data = opened(content)
    text = json.dumps(header, separators=(",", ":"))
    entry = json.dumps(header["token_ids"], separators=(",", ":"))
    text = (text[:-1] + f',"token_ids":{entry}}}').encode()
    assert "it names 'token_ids' twice" in refused(_written(path, struct.pack("<Q", len(text)) + text + data))


def test_other_safetensors_files_are_refused_and_ours_are_safetensors(content, path, tmp_path):
    other = str(tmp_path / "other.safetensors")
    save_file({"weight": torch.zeros(100)}, other)
    assert "was not written by flexasl" in refused(other)
    _written(path, content)
    assert torch.equal(load_file(path)["layers.0.keys"], saving.read(path).layers[0].keys)


def test_missing_files_and_folders(patched, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a file that cache\.save wrote"):
        flexasl.load_cache(tmp_path / "none.safetensors", patched)
    assert "is not a file" in refused(str(tmp_path))


def test_a_version_of_the_future_is_named(content, path):
    header, data = opened(content)
    header["__metadata__"]["version"] = "4"
    assert "its format version is '4', and this flexasl reads '1', '2' and '3'" in refused(
        _written(path, sealed(header, data))
    )
