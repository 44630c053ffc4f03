"""Models whose last layers use the keys and values of earlier ones."""

import pytest
import torch
from answers import FIXED, KEEP_ALL, RULES, STAGES, check_caches, close, say
from models import SHAPE, VOCAB, counting, left_padded, prefills, prompts, recompute, selected
from placing import shared
from tiny_chat import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import flexasl
from flexasl import ConfigError, UnsupportedError, evaluation, rows
from flexasl.tools.evaluation import runner
from flexasl.tools.evaluation.records import ANSWERS
from flexasl.tools.evaluation.storage import read_all

LAYERS, LENDERS = 9, {5: 3, 6: 4, 7: 3, 8: 4}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
KINDS += ["sliding_attention", "full_attention"] * 2
BOTH = {
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": 4,
    "layer_types": KINDS,
    "sliding_window": 40,
    "head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
GEMMA4 = BOTH | {"model_type": "gemma4_text", "global_head_dim": 32}
SHARING = {
    "gemma3n_text": BOTH
    | {
        "intermediate_size": [96] * LAYERS,
        "altup_num_inputs": 3,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * (LAYERS - 2),
    },
    "gemma4_text": GEMMA4,
    "gemma4_wide": GEMMA4 | {"use_double_wide_mlp": True},
    "gemma4_experts": GEMMA4
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
}
UNSHARED = GEMMA4 | {"num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
FAMILIES = SHARING | {"gemma4_unshared": UNSHARED}


@shared
def sharing(family, dtype=torch.float32):
    settings = dict(FAMILIES[family])
    kind = settings.pop("model_type", family)
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(SHAPE | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def columns(model, cache):
    """Positions that each layer's new tokens see [1, N] or [1, G, N]."""
    lenders = LENDERS if model.config.num_kv_shared_layers else {}
    return [cache.layers[lenders.get(layer, layer)].positions for layer in range(LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_identity_through_a_hundred_tokens(family):
    model, batch = sharing(family), left_padded(prompts(70, 41))
    sequences, logits, _ = say(model, 100, **batch)
    with flexasl.patch(model, KEEP_ALL) as patch:
        mine, got, _ = say(model, 100, **batch)
    close(got, logits)
    assert torch.equal(mine, sequences)
    assert patch.report.kv_bytes == patch.report.kv_bytes_full
    held = [tokens > 0 for tokens in patch.report.kv_tokens]
    assert held == [family == "gemma4_unshared" or layer not in LENDERS for layer in range(LAYERS)]


@pytest.mark.parametrize("budget", [None, 16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_decode_equals_a_masked_run(family, rule, budget):
    model, ids = sharing(family), prompts(67)[0][None]
    config, policy = RULES[rule]
    with flexasl.patch(model, config.replace(kv_budget=budget), policy=policy) as patch, prefills() as read:
        sequences, logits, cache = say(model, 17, input_ids=ids)
    *before, (layer, kept) = selected(read[0], 0)
    assert patch.report.rows[0].kept_tokens == 24 and len(before) == (rule == "stages")
    full = recompute(model, sequences[:, :-1], 67, columns(model, cache), layer, kept, before)
    close(logits, full[:, -17:])


@pytest.mark.parametrize("propagate", ["gather", "mask"])
@pytest.mark.parametrize("policy", ["asl", "fixed_layer:layer=1", "gemfilter:layer=1", "snapkv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_alone(family, policy, propagate):
    if propagate == "mask" and policy.startswith("gemfilter"):
        pytest.skip("gemfilter reads again what it has gathered")
    model, rows = sharing(family), prompts(70, 12, 43)
    config = counting(policy, STAGES)
    config = config if policy == "snapkv" else config.replace(propagate=propagate)
    with flexasl.patch(model, config, policy=policy) as patch:
        alone = [say(model, 9, input_ids=row[None]) for row in rows]
        sequences, logits, _ = say(model, 9, **left_padded(rows))
        kept = [row.kept_tokens for row in patch.report.rows]
    assert kept[1] == 12 and (policy == "snapkv" or kept[0] < 70)
    for row, (own, own_logits, _) in enumerate(alone):
        close(logits[row], own_logits[0])
        assert torch.equal(sequences[row, -9:], own[0, -9:])


@pytest.mark.parametrize("family", FAMILIES)
def test_gathering_equals_masking(family):
    model, batch = sharing(family), left_padded(prompts(70, 12, 43))
    said = []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, STAGES.replace(propagate=propagate)):
            said.append(say(model, 12, **batch)[:2])
    (tokens, logits), (others, masked) = said
    assert torch.equal(tokens, others)
    close(logits, masked)


@pytest.mark.parametrize("later", ["keep", "prune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_in_a_batch_is_each_rows_own(family, later):
    model, (first, second) = sharing(family), (torch.stack(prompts(60, 60)), torch.stack(prompts(12, 12, seed=1)))
    turns = torch.cat([first, second], 1)
    with flexasl.patch(model, FIXED.replace(later_turns=later), policy="fixed_layer:layer=2"), prefills() as read:
        answers = []
        for row in range(2):
            cache = model(first[row : row + 1], use_cache=True).past_key_values
            answers.append(say(model, 6, input_ids=turns[row : row + 1], past_key_values=cache))
        cache = model(first, use_cache=True).past_key_values
        _, logits, _ = say(model, 6, input_ids=turns, past_key_values=cache)
    for row in range(2):
        close(logits[row], answers[row][1][0])
    if later == "keep":
        sequences, logits, cache = answers[0]
        ((layer, kept),) = selected(read[0], 0)
        full = recompute(model, sequences[:, :-1], 60, columns(model, cache), layer, kept)
        close(logits, full[:, -6:])


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_are_saved_copied_cropped_and_chosen_from(family, tmp_path):
    check_caches(sharing(family), FIXED.replace(kv_budget=20), "fixed_layer:layer=2", tmp_path)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "gemma4_unshared"])
def test_calibration_and_evaluation_know_them(family, tmp_path):
    settings, tokenizer = dict(FAMILIES[family]), tiny_tokenizer()
    kind = settings.pop("model_type", family)
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    shape = SHAPE | settings | {"vocab_size": 1000, "vocab_size_per_layer_input": 1000, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval().requires_grad_(False)
    config = flexasl.ASLConfig(select_tokens=64, window=16)
    made = flexasl.calibrate(model, tokenizer, config, tasks=["needle"], unseen=None, samples=2, length=300)
    assert made.config.min_layer in (1, 2, 4)
    plan = evaluation.plan(tasks=["needle"], lengths=[300], samples=1, policies=["asl", "snapkv"], budgets=[64])
    said = []
    for together in (False, True):
        folder = tmp_path / str(together)
        assert runner.evaluate(plan, model, tokenizer, folder, together=together)
        said.append({one["setting"]: one["answer"] for one in read_all(folder, ANSWERS, runner.answer_key)})
    assert said[0] == said[1]


def test_what_sharing_cannot_honour_is_refused():
    model = sharing("gemma4_text")
    for settings, message in (
        ({"compile": True}, "compile=True cannot take Gemma4ForCausalLM, whose layers use the keys and values of"),
        ({"policy": "fixed_layer:layer=4"}, "layer=4 .*; give one of 1, 2"),
    ):
        with pytest.raises((ConfigError, UnsupportedError), match=message):
            flexasl.patch(model, **settings)
        assert not hasattr(model, "flexasl_patch")


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_logits_that_are_asked_for(keep):
    """The unpatched model runs the layers that share on so many last tokens alone."""
    model, ids = sharing("gemma4_text"), prompts(50)[0][None]
    want = model(ids, logits_to_keep=keep).logits
    with flexasl.patch(model, KEEP_ALL):
        close(model(ids, logits_to_keep=keep).logits, want)


@pytest.mark.parametrize("family", SHARING)
def test_half_precision(family):
    model, batch = sharing(family, torch.bfloat16), left_padded(prompts(70, 41))
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=1") as patch:
        say(model, 6, **batch)
    assert [row.kept_tokens for row in patch.report.rows] == [24, 24]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_layers_run_one_group_at_a_time(family, monkeypatch):
    """On CPU a batch of many tokens goes through layers some rows at a time."""
    model, batch = sharing(family), left_padded(prompts(70, 43, 55))
    with flexasl.patch(model, FIXED, policy="fixed_layer:layer=2"):
        want = say(model, 3, **batch)[1]
        monkeypatch.setattr(rows, "GROUP", 64)
        close(say(model, 3, **batch)[1], want)
