"""Models some of whose layers keep states in place of keys and values, or beside them."""

import copy
import dataclasses

import answers
import pytest
import torch
from answers import FIXED, KEEP_ALL, STAGES, check_rows_alone, say
from hybrids import HYBRIDS, INEXACT, NEW_STATES, OWN_ARGUMENTS, hybrid, recompute_on_kept
from models import GREEDY, SHAPE, counting, left_padded, prefills, prompts, selected
from tiny_chat import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import flexasl
from flexasl import ConfigError, FlexASLError, UnsupportedError, evaluation, saving
from flexasl.integrations.transformers.states import PassiveLayer, StateLayer
from flexasl.tools.evaluation import runner
from flexasl.tools.evaluation.records import ANSWERS
from flexasl.tools.evaluation.storage import read_all


def close(got, want, family):
    answers.close(got, want, INEXACT.get(family, 2e-4))


@pytest.mark.parametrize("family", HYBRIDS)
def test_keep_all_is_identity_through_a_hundred_tokens(family):
    model = hybrid(family)
    batch = left_padded(prompts(70, 41))
    sequences, logits, _ = say(model, 100, **batch)
    with flexasl.patch(model, KEEP_ALL) as patch:
        mine, got, cache = say(model, 100, **batch)
    close(got, logits, family)
    assert torch.equal(mine, sequences)
    report = patch.report
    assert report.kv_bytes == report.kv_bytes_full and cache.get_seq_length() == 70 + 99
    states = [one.state_bytes for one in cache.layers]
    assert report.state_bytes == sum(states) > 0 and "states of layers without keys" in str(report)
    kinds = model.get_decoder().config.layer_types if family not in OWN_ARGUMENTS else ()
    assert [bool(count) for count in report.kv_tokens] == [
        not isinstance(one, (StateLayer, PassiveLayer)) for one in cache.layers
    ]
    assert len(kinds) in (0, len(cache.layers))


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("family", HYBRIDS)
def test_pruned_decode_equals_a_run_on_the_kept_tokens(family, stages):
    model, ids = hybrid(family), prompts(67)[0][None]
    config = STAGES if stages else FIXED
    with flexasl.patch(model, config, policy="asl" if stages else "fixed_layer:layer=1") as patch, prefills() as read:
        sequences, logits, _ = say(model, 17, input_ids=ids)
    made = selected(read[0], 0)
    assert patch.report.rows[0].kept_tokens == 24
    assert len(made) == 1 + (stages and family != "lfm3"), "lfm3 has one layer that ranks"
    full = recompute_on_kept(model, sequences[:, :-1], 67, made)
    close(logits, full[:, -17:], family)


@pytest.mark.parametrize("family", [one for one in HYBRIDS if one not in OWN_ARGUMENTS])
def test_a_kv_budget_trims_layers_with_keys_alone(family):
    model, ids = hybrid(family), prompts(67)[0][None]
    with flexasl.patch(model, FIXED.replace(kv_budget=16), policy="fixed_layer:layer=1") as patch, prefills() as read:
        sequences, logits, cache = say(model, 13, input_ids=ids)
    columns = [getattr(layer, "positions", None) for layer in cache.layers]
    assert max(patch.report.kv_tokens) == 16
    full = recompute_on_kept(model, sequences[:, :-1], 67, selected(read[0], 0), columns)
    close(logits, full[:, -13:], family)


@pytest.mark.parametrize("policy", ["asl", "fixed_layer:layer=1", "gemfilter:layer=1", "snapkv"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_row_is_alone(family, policy):
    kept = check_rows_alone(hybrid(family), counting(policy, STAGES), policy, INEXACT.get(family, 2e-4))
    assert kept[1] == 12 and (policy == "snapkv" or kept[0] < 70)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 16, 17, 33])
@pytest.mark.parametrize("family", HYBRIDS)
def test_lengths_around_kernels_and_chunks(family, length):
    model, ids = hybrid(family), prompts(length)[0][None]
    sequences, logits, _ = say(model, 6, input_ids=ids)
    with flexasl.patch(model, KEEP_ALL):
        _, got, _ = say(model, 6, input_ids=ids)
    close(got, logits, family)
    tight = FIXED.replace(select_tokens=max(2, length // 2), window=1)
    with flexasl.patch(model, tight, policy="fixed_layer:layer=1"), prefills() as read:
        sequences, logits, _ = say(model, 6, input_ids=ids)
    full = recompute_on_kept(model, sequences[:, :-1], length, selected(read[0], 0))
    close(logits, full[:, -6:], family)


@pytest.mark.parametrize("later", ["keep", "prune"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_second_turn(family, later):
    """Of a turn that is kept whole, a run on the kept tokens of the first and all of the second; of one that is pruned,
    each row as alone."""
    model, (first, second) = hybrid(family), (torch.stack(prompts(60, 60)), torch.stack(prompts(40, 40, seed=1)))
    config = FIXED.replace(later_turns=later)
    with flexasl.patch(model, config, policy="fixed_layer:layer=1"), prefills() as read:
        answers = []
        for row in range(2):
            cache = model(first[row : row + 1], use_cache=True).past_key_values
            turn = torch.cat([first[row : row + 1], second[row : row + 1]], 1)
            answers.append(say(model, 8, input_ids=turn, past_key_values=cache))
        cache = model(first, use_cache=True).past_key_values
        _, logits, _ = say(model, 8, input_ids=torch.cat([first, second], 1), past_key_values=cache)
        for row in range(2):
            close(logits[row], answers[row][1][0], family)
    if later == "keep" and family not in NEW_STATES:
        sequences, logits, _ = answers[0]
        full = recompute_on_kept(model, sequences[:, :-1], 60, selected(read[0], 0))
        close(logits, full[:, -8:], family)


@pytest.mark.parametrize("family", HYBRIDS)
def test_caches_are_saved_copied_and_chosen_from(family, tmp_path):
    model, rows = hybrid(family), torch.stack(prompts(60, 60))
    after = torch.tensor([[7], [9]])
    with flexasl.patch(model, FIXED.replace(kv_budget=20), policy="fixed_layer:layer=1") as patch:
        cache = model(rows, use_cache=True).past_key_values
        cache.save(tmp_path / "a")
        report = patch.report
        copied, loaded = copy.deepcopy(cache), flexasl.load_cache(tmp_path / "a", model)
        assert loaded.reports == (report,) and patch.report == report
        turned = copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 0, 1]))
        want = model(after, past_key_values=cache).logits
        for other in (copied, loaded):
            assert torch.equal(model(after, past_key_values=other).logits, want)
        got = model(after[[1, 0, 1]], past_key_values=turned).logits
        close(got, want[[1, 0, 1]], family)
        beams = model.generate(rows, max_new_tokens=5, num_beams=3, **GREEDY).sequences
        alone = torch.cat(
            [model.generate(row[None], max_new_tokens=5, num_beams=3, **GREEDY).sequences for row in rows]
        )
        assert torch.equal(beams, alone)
        cache.reset()
        again = model(rows, past_key_values=cache, use_cache=True).past_key_values
        assert torch.equal(model(after, past_key_values=again).logits, want)


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
def test_crop_is_refused_before_anything_is_lost(family):
    model, ids = hybrid(family), prompts(60)[0][None]
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=1"):
        cache = model(ids, use_cache=True).past_key_values
        same = copy.deepcopy(cache)
        with pytest.raises(FlexASLError, match="layers of this model keep states, which cannot go back"):
            cache.crop(-3)
        after = torch.tensor([[7]])
        assert torch.equal(model(after, past_key_values=cache).logits, model(after, past_key_values=same).logits)
        cache.crop(-1000)
        assert cache.get_seq_length() == 0


def test_a_convolution_that_records_goes_back():
    model, ids = hybrid("lfm2"), prompts(60)[0][None]
    more = prompts(5, seed=2)[0][None]
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=1"):
        cache = model(ids, use_cache=True).past_key_values
        cache.activate_past_recording()
        model(more, past_key_values=cache)
        cache.crop(-3)
        got = model(torch.tensor([[7]]), past_key_values=cache).logits
        cache = model(ids, use_cache=True).past_key_values
        model(more[:, :2], past_key_values=cache)
        want = model(torch.tensor([[7]]), past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_what_states_cannot_honour_is_refused():
    model = hybrid("qwen3_next")
    for settings, message in (
        (
            {"config": FIXED.replace(propagate="mask")},
            "propagate='mask' does not go with a model whose layers keep states",
        ),
        ({"compile": True}, "compile=True cannot take Qwen3NextForCausalLM, whose layers keep states"),
        ({"policy": "fixed_layer:layer=2"}, "layer=2 does not attend to the whole prompt, .*; give one of 1, 4"),
        ({"policy": "pyramid_infer"}, "ranks tokens at every layer, but only layers 1, 4 attend to the whole prompt"),
    ):
        with pytest.raises((ConfigError, UnsupportedError), match=message):
            flexasl.patch(model, **settings)
        assert not hasattr(model, "flexasl_patch")
    first, second = left_padded(prompts(30, 20)), left_padded(prompts(9, 5, seed=1))
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=1"):
        cache = model(**first, use_cache=True).past_key_values
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        with pytest.raises(UnsupportedError, match="pads a later turn of a model with states, which would read"):
            model(second["input_ids"], attention_mask=mask, past_key_values=cache)


def test_calibration_and_evaluation_know_layers_without_scores(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = SHAPE | HYBRIDS["lfm2"] | {"vocab_size": 1000, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **shape)).eval().requires_grad_(False)
    config = flexasl.ASLConfig(select_tokens=64, window=16)
    few = {"tasks": ["needle"], "unseen": None, "samples": 2, "length": 300}
    made = flexasl.calibrate(model, tokenizer, config, **few)
    assert made.config.min_layer in (1, 4) and {one.layers[-1] for one in made.chosen.outcomes} <= {1, 4}
    plan = evaluation.plan(tasks=["needle"], lengths=[300], samples=1, policies=["asl", "snapkv"], budgets=[64])
    for together in (False, True):
        folder = tmp_path / str(together)
        assert runner.evaluate(plan, model, tokenizer, folder, together=together)
    said = [
        {one["setting"]: one["answer"] for one in read_all(tmp_path / str(together), ANSWERS, runner.answer_key)}
        for together in (False, True)
    ]
    assert said[0] == said[1]


def test_recorded_states_of_a_hybrid_are_replayed():
    states = torch.randn(6, 1, 4, 60, 8, generator=torch.Generator().manual_seed(0))
    states[[0, 2, 3, 5]] = 0
    (told,) = flexasl.replay(states, states, FIXED, "fixed_layer", ranking_layers=[1, 4])
    assert told.selected_layer == 1 and len(told.selected) == 24
    with pytest.raises(ConfigError, match="layer=2 does not attend to the whole prompt"):
        flexasl.replay(states, states, FIXED, "fixed_layer:layer=2", ranking_layers=[1, 4])


def test_a_file_with_other_states_is_refused(tmp_path):
    model = hybrid("lfm2")
    with flexasl.patch(model, KEEP_ALL):
        model(prompts(30)[0][None], use_cache=True).past_key_values.save(tmp_path / "a")
        saved = saving.read(tmp_path / "a")
        assert saved.version == "3"
        first, *rest = saved.layers
        (name, states), *_ = first.states.items()
        for wrong, message in (
            ({}, "has other states at layer 0 than the model makes: {} where they should be"),
            ({name: states[..., 1:]}, "has other states at layer 0 than the model makes"),
            ({name: states.double()}, "has other states at layer 0 than the model makes"),
            ({name: states, "recurrent.0": states}, "has other states at layer 0 than the model makes"),
        ):
            changed = dataclasses.replace(saved, layers=(dataclasses.replace(first, states=wrong), *rest))
            saving.write(tmp_path / "b", changed)
            with pytest.raises(FlexASLError, match=message):
                flexasl.load_cache(tmp_path / "b", model)
        two_rows = dataclasses.replace(first, states={name: states.repeat(2, 1, 1)})
        with pytest.raises(FlexASLError, match=r"layers\.0\.state\.conv\.0 are .*, where 1 rows in"):
            saving.write(tmp_path / "c", dataclasses.replace(saved, layers=(two_rows, *rest)))


@pytest.mark.parametrize("family", HYBRIDS)
def test_half_precision_in_a_batch_of_five(family):
    model, rows = hybrid(family, torch.bfloat16), prompts(70, 41, 30, 9, 55)
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=1") as patch:
        cache = say(model, 6, **left_padded(rows))[2]
        assert [row.kept_tokens for row in patch.report.rows] == [24, 24, 24, 9, 24]
        assert all(states.shape[0] == 5 for layer in cache.layers for states in getattr(layer, "states", {}).values())


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "falcon_h1"])
def test_gradients_flow_through_states_and_not_into_copies(family):
    model = hybrid(family)
    embeds = model.get_input_embeddings()(prompts(60)[0][None]).detach().requires_grad_(True)
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=1"), torch.enable_grad():
        out = model(inputs_embeds=embeds, use_cache=True)
        out.logits[:, -1].sum().backward()
        copied = copy.deepcopy(out.past_key_values)
    assert embeds.grad.abs().sum() > 0
    states = [one for layer in copied.layers for one in getattr(layer, "states", {}).values()]
    assert not any(one.requires_grad for one in states)
