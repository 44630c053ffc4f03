"""Caches of layers with a sliding window, through long answers, crops and drafts: bounded, and as the unpatched
model's."""

import copy

import pytest
import torch
from models import FAMILIES, GREEDY, SMALL, STAGED, left_padded, prompts, sliding_window, tiny
from placing import shared
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import flexasl
from flexasl import FlexASLError
from flexasl.masks import Visibility

WINDOW, LAYERS = 12, 4
WHOLE = [family for family in FAMILIES if FAMILIES[family].get("layer_types")]
SLIDING = ["mistral", "mixtral", "phi3", *WHOLE]
KEEP_ALL = SMALL.replace(select_tokens=1.0)
FLAT = STAGED.replace(max_layer=3)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@shared
def slides(family, seed=3):
    """A model of four layers, all or half of which look back `WINDOW` positions."""
    settings = tiny(family).config.to_dict() | {"sliding_window": WINDOW, "num_hidden_layers": LAYERS}
    if family in WHOLE:
        settings["layer_types"] = settings["layer_types"][:LAYERS]
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(seed)
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    return AutoModelForCausalLM.from_config(config, **attention).eval().requires_grad_(False)


def answer(model, inputs, count=3 * WINDOW, **settings):
    return model.generate(**inputs, max_new_tokens=count, output_logits=True, **(GREEDY | settings))


def check_same(got, want):
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), **CLOSE)


def check_bounded(cache, model, slack=0):
    for index, layer in enumerate(cache.layers):
        window = sliding_window(model, index)
        stored = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        assert layer.nbytes == layer.keys.nbytes + layer.values.nbytes
        capacity = stored * layer.keys.shape[2] // layer.nbytes
        if window is None:
            assert capacity <= layer.positions.shape[-1] + slack
        else:
            assert layer.positions.shape[-1] <= capacity <= 2 * window
        if slack == 0:
            assert stored == layer.nbytes


@pytest.fixture
def masks(monkeypatch):
    """The masks that calls make, in order."""
    made = []

    def note(*args):
        made.append(args)
        return Visibility(*args)

    monkeypatch.setattr("flexasl.forward_pass.Visibility", note)
    return made


@pytest.mark.parametrize("family", SLIDING)
def test_an_answer_of_three_windows(family, masks):
    model = slides(family)
    for rows in ((WINDOW - 4,), (WINDOW,), (WINDOW + 1, WINDOW - 3), (40, 21, 9)):
        inputs = left_padded(prompts(*rows))
        want = answer(model, inputs)
        for slack in (0, 128):
            masks.clear()
            with flexasl.patch(model, KEEP_ALL) as patch:
                patch.slack = slack
                got = answer(model, inputs)
            check_same(got, want)
            check_bounded(got.past_key_values, model, slack)
            assert bool(masks) == (len(rows) > 1), "one row's visible entries are the last ones"


@pytest.mark.parametrize(
    "config",
    [SMALL, SMALL.replace(kv_budget=16), SMALL.replace(propagate="mask"), FLAT, FLAT.replace(propagate="mask")],
)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_rows_with_gaps_are_alone_and_bounded_however_long_the_answer(family, config):
    model, rows = slides(family), prompts(60, 45, 50)
    with flexasl.patch(model, config) as patch:
        together = answer(model, left_padded(rows))
        check_bounded(together.past_key_values, model)
        for index, row in enumerate(rows):
            alone = answer(model, left_padded([row]))
            assert patch.report.rows[0].pruned
            assert torch.equal(together.sequences[index, 60:], alone.sequences[0, len(row) :])
            check_bounded(alone.past_key_values, model)


def test_masks_end_once_what_was_pruned_is_out_of_sight(masks):
    model = slides("mistral")
    with flexasl.patch(model, SMALL.replace(kv_budget=9, window=8)):
        cache = answer(model, left_padded(prompts(60)), count=WINDOW).past_key_values
        assert masks
        masks.clear()
        for token in prompts(WINDOW)[0]:
            model(token.view(1, 1), past_key_values=cache)
    assert not masks


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(settings):
    model, inputs = slides("gemma2"), left_padded(prompts(30))
    want = answer(model, inputs, **settings)
    with flexasl.patch(model, KEEP_ALL):
        got = answer(model, inputs, **settings)
    assert torch.equal(got.sequences, want.sequences)
    check_bounded(got.past_key_values, model)


@pytest.mark.parametrize("later_turns", ["keep", "prune"])
def test_saved_copied_and_continued_in_the_middle_of_an_answer(later_turns, tmp_path):
    model, more = slides("gemma3_text"), prompts(40, seed=5)[0][None]
    with flexasl.patch(model, SMALL.replace(later_turns=later_turns)):
        first = answer(model, left_padded(prompts(60)))
        cache = first.past_key_values
        cache.save(tmp_path / "cache")
        ids = torch.cat([first.sequences, more], 1)
        said = [
            answer(model, {"input_ids": ids}, past_key_values=held)
            for held in (copy.deepcopy(cache), flexasl.load_cache(tmp_path / "cache", model), cache)
        ]
        for other in said:
            check_same(other, said[0])
            check_bounded(other.past_key_values, model)


# ---------------------------------------------------------------- crop


def go_on(model, cache, ids):
    """Last logits [1, V] after each token, one by one."""
    return torch.stack([model(token.view(1, 1), past_key_values=cache).logits[:, -1] for token in ids])


@pytest.mark.parametrize("family", SLIDING)
def test_a_recorded_cache_is_cropped_as_the_unpatched_models(family):
    model, more = slides(family), prompts(50, seed=9)[0]

    def drafts(prompt):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(prompts(prompt)[0][None], past_key_values=cache)
        cache.crop(-3)
        said, at = [], 0
        for count, dropped in ((6, 4), (20, 17), (1, 0), (2, 2), (3, 0)):
            said.append(go_on(model, cache, more[at : at + count]))
            cache.crop(-dropped)
            at += count
        return torch.cat(said), cache

    for prompt in (WINDOW - 5, WINDOW, 40):
        want, theirs = drafts(prompt)
        with flexasl.patch(model, KEEP_ALL):
            got, mine = drafts(prompt)
        torch.testing.assert_close(got, want, **CLOSE)
        assert mine.get_seq_length() == theirs.get_seq_length() and mine.is_recording_past(0)
        check_bounded(mine, model)


def test_the_last_tokens_can_be_cropped_without_recording():
    model, ids, more = slides("mistral"), prompts(40)[0][None], prompts(30, seed=8)[0]
    with flexasl.patch(model, KEEP_ALL):
        cache = model(ids).past_key_values
        go_on(model, cache, more[:20])
        want = go_on(model, cache, more[20:25])
        for _ in range(2):
            cache.crop(-5)
            torch.testing.assert_close(go_on(model, cache, more[20:25]), want, **CLOSE)
        with pytest.raises(FlexASLError, match=r"crop by 9 tokens .* crop at most \d, or call activate_past_recording"):
            cache.crop(-9)
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


# ---------------------------------------------------------------- assistants


@pytest.mark.parametrize("config", [SMALL, KEEP_ALL], ids=["pruned", "whole"])
@pytest.mark.parametrize("family", SLIDING)
def test_a_patched_model_drafts_for_another(family, config):
    model, assistant = slides(family), copy.deepcopy(slides(family))
    generator = torch.Generator().manual_seed(0)
    for parameter in assistant.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    drafted = []
    assistant.register_forward_hook(lambda *args: drafted.append(1))
    inputs = left_padded(prompts(40))
    want = answer(model, inputs, 20)
    with flexasl.patch(assistant, config):
        got = answer(model, inputs, 20, assistant_model=assistant)
    assert torch.equal(got.sequences, want.sequences)
    assert len(drafted) > 5
