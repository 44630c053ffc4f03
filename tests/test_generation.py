"""Every common way to generate on a patched model: right, or refused before work starts."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from models import FAMILIES, GREEDY, RULES, SMALL, left_padded, prefills, prompts, recompute, selected, tiny
from tiny_chat import save_tiny_model
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import flexasl
from flexasl import ASLConfig, ConfigError, UnsupportedError

SLIDE = [family for family in FAMILIES if "sliding_window" in FAMILIES[family] and FAMILIES[family]["sliding_window"]]
PRUNE = SMALL.replace(later_turns="prune")


@pytest.fixture
def patched():
    with flexasl.patch(tiny(), SMALL) as patch:
        yield tiny(), patch


def one_prompt(count=60, seed=0):
    return prompts(count, seed=seed)[0][None]


def new_tokens(model, ids, count=6, **settings):
    return model.generate(ids, max_new_tokens=count, **(GREEDY | settings)).sequences[:, ids.shape[1] :]


# ---------------------------------------------------------------- sampling, beams, processors


def test_sampled_sequences_of_one_prompt_differ_and_repeat_with_the_seed(patched):
    model, patch = patched
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "pad_token_id": 0}
    torch.manual_seed(1)
    first = model.generate(**left_padded(prompts(60, 45)), eos_token_id=None, **settings)
    torch.manual_seed(1)
    again = model.generate(**left_padded(prompts(60, 45)), eos_token_id=None, **settings)
    assert first.shape == (6, 68) and torch.equal(first, again)
    assert len({tuple(row.tolist()) for row in first}) == 6
    assert [row.prompt_tokens for row in patch.report.rows] == [60, 60, 60, 45, 45, 45]


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_beam_search_finds_what_a_search_without_cache_finds(family):
    """Beams move rows of the cache about. With every token kept the unpatched model says what is right."""
    model, ids = tiny(family), one_prompt()
    settings = {"num_beams": 4, "num_return_sequences": 2}
    want = new_tokens(model, ids, **settings)
    with flexasl.patch(model, SMALL.replace(select_tokens=1.0)):
        assert torch.equal(new_tokens(model, ids, **settings), want)
    with flexasl.patch(model, SMALL.replace(kv_budget=16)):
        out = model.generate(ids, max_new_tokens=6, output_scores=True, **(GREEDY | settings))
        # A beam's score is the sum of its tokens' log-probabilities, so its own greedy path must score no better.
        cache = model(ids, use_cache=True)
        for beam, score in zip(out.sequences, out.sequences_scores, strict=True):
            steps, held, logits = 0.0, copy.deepcopy(cache.past_key_values), cache.logits[:, -1]
            for token in beam[60:]:
                steps += logits.log_softmax(-1)[0, token].item()
                logits = model(token.view(1, 1), past_key_values=held).logits[:, -1]
            assert steps / 6 == pytest.approx(score.item(), abs=1e-4)


def test_stopping_criteria_and_logits_processors(patched):
    model, _ = patched

    class Only(LogitsProcessor):
        def __call__(self, ids, scores):
            assert not scores.isnan().any()
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, float("-inf"))

    class AtLength(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((ids.shape[0],), ids.shape[1] >= 65)

    out = new_tokens(
        model,
        one_prompt(),
        20,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=StoppingCriteriaList([AtLength()]),
        repetition_penalty=1.3,
    )
    assert out.shape == (1, 5) and bool((out % 2 == 1).all())


def test_guidance_prunes_both_prompts(patched):
    model, _ = patched
    ids, negative = one_prompt(), one_prompt(50, seed=3)
    got = new_tokens(model, ids, 5, guidance_scale=1.5, negative_prompt_ids=negative)
    one, other = (model(part, use_cache=True) for part in (ids, negative))
    logits, held = [one.logits[:, -1], other.logits[:, -1]], [one.past_key_values, other.past_key_values]
    for token in got[0]:
        with_prompt, without = (part.log_softmax(-1) for part in logits)
        assert (without + 1.5 * (with_prompt - without)).argmax() == token
        logits = [model(token.view(1, 1), past_key_values=cache).logits[:, -1] for cache in held]


def test_without_a_cache_every_step_reads_and_prunes_anew(patched):
    model, patch = patched
    ids = one_prompt()
    want = ids
    for _ in range(5):
        step = model(want, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        want = torch.cat([want, step], 1)
    assert torch.equal(new_tokens(model, ids, 5, use_cache=False), want[:, 60:])
    assert patch.report.rows[0].prompt_tokens == 64 and patch.report.kv_tokens == ()


def test_only_the_logits_that_are_asked_for(patched):
    model, _ = patched
    ids = one_prompt()
    whole = model(ids).logits
    for keep in (1, 5, torch.tensor([3, 59])):
        want = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, want, equal_nan=True)


# ---------------------------------------------------------------- turns and caches


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SLIDE])
@pytest.mark.parametrize("rule", RULES)
def test_a_pruned_later_turn_equals_recompute(family, rule):
    """Without sliding windows: the oracle masks by what the cache holds in the end, and cannot know what slid out."""
    model, (first, second) = tiny(family), prompts(67, 50, seed=4)
    with flexasl.patch(model, RULES[rule].replace(later_turns="prune")) as patch, prefills() as read:
        cache = model(first[None], use_cache=True).past_key_values
        out = model(second[None], past_key_values=cache)
        turn = patch.report
        whole = sum(117 * layer.nbytes // layer.keys.shape[2] for layer in cache.layers)
        step = model(out.logits[:, -1:].argmax(-1), past_key_values=cache).logits
    assert (turn.rows[0].prompt_tokens, turn.rows[0].kept_tokens) == (50, 24)
    columns = [layer.positions for layer in cache.layers]
    *before, (last, kept) = selected(read[0], 0)
    ids = torch.cat([first, second, out.logits[0, -1:].argmax(-1)])[None]
    full = recompute(model, ids, 67, columns, last, kept, before)
    torch.testing.assert_close(out.logits[0, -1], full[0, -2], rtol=0, atol=1e-4)
    torch.testing.assert_close(step[0, -1], full[0, -1], rtol=0, atol=1e-4)
    assert turn.kv_bytes_full == whole


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("cache", [{}, {"kv_budget": 16}, {"kv_top_p": 0.7}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_pruned_later_turns_of_a_batch_equal_those_of_its_rows(family, rule, cache):
    model, config = tiny(family, torch.float64), RULES[rule].replace(later_turns="prune", **cache)
    firsts, seconds = prompts(67, 40, seed=4), prompts(50, 50 if family in SLIDE or family == "gpt_oss" else 31, seed=5)

    def turns(rows, more):
        first, second = left_padded(rows), left_padded(more)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        at = (mask.cumsum(1) - 1).clamp(min=0)
        width = first["input_ids"].shape[1]
        cache = model(**first, position_ids=at[:, :width], use_cache=True).past_key_values
        out = model(second["input_ids"], attention_mask=mask, position_ids=at[:, width:], past_key_values=cache)
        return out.logits[:, -1]

    with flexasl.patch(model, config) as patch:
        together = turns(firsts, seconds)
        rows = patch.report.rows
        for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            alone = turns([first], [second])
            assert patch.report.rows[0].kept_positions == rows[index].kept_positions
            torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gpt_oss"])
def test_a_later_turn_within_its_budget_is_the_same_kept_or_pruned(family):
    model, (first, second) = tiny(family), prompts(67, 20, seed=4)
    logits = []
    for config in (SMALL, PRUNE):
        with flexasl.patch(model, config):
            cache = model(first[None], use_cache=True).past_key_values
            logits.append(model(second[None], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_padding_within_a_later_turn_is_refused_where_windows_slide():
    model, batch = tiny("mistral_sliding"), left_padded(prompts(60, 60))
    mask = torch.cat([batch["attention_mask"], torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])], 1)
    with flexasl.patch(model, SMALL):
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="attention_mask pads a later turn of a model with sliding windows"):
            model(torch.ones(2, 5, dtype=torch.long), attention_mask=mask, past_key_values=cache)


def test_rows_of_a_cache_can_be_selected_and_repeated(patched):
    model, _ = patched
    batch = left_padded(prompts(60, 45, 52))
    cache = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0)).past_key_values
    token = torch.tensor([[5], [5], [5]])
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    at = mask.sum(1, keepdim=True) - 1
    want = model(token, attention_mask=mask, position_ids=at, past_key_values=copy.deepcopy(cache)).logits
    some = copy.deepcopy(cache)
    some.batch_select_indices(torch.tensor([2, 0]))
    got = model(token[:2], attention_mask=mask[[2, 0]], position_ids=at[[2, 0]], past_key_values=some).logits
    torch.testing.assert_close(got, want[[2, 0]])
    cache.batch_repeat_interleave(2)
    rows = torch.arange(3).repeat_interleave(2)
    got = model(token[rows], attention_mask=mask[rows], position_ids=at[rows], past_key_values=cache).logits
    torch.testing.assert_close(got, want[rows])


# ---------------------------------------------------------------- several models, threads, copies


def test_a_patched_model_as_the_assistant_of_another_one(patched):
    assistant, _ = patched
    model, ids = tiny("qwen2"), one_prompt()
    want = new_tokens(model, ids, 16)
    assert torch.equal(new_tokens(model, ids, 16, assistant_model=assistant), want)
    # With itself as assistant every candidate is right, so that the assistant's cache is continued, not only cropped.
    with flexasl.patch(copy.deepcopy(tiny("qwen2")), SMALL.replace(select_tokens=1.0)) as same:
        assert torch.equal(new_tokens(model, ids, 16, assistant_model=same._model), want)


def test_threads_that_share_a_model_get_their_own_answers(patched):
    model, _ = patched
    rows = prompts(60, 70, 80, 50)
    want = [new_tokens(model, row[None], 8) for row in rows]
    for _ in range(3):
        got = [None] * len(rows)

        def work(index, got=got):
            got[index] = new_tokens(model, rows[index][None], 8)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_a_copy_of_a_patched_model_is_patched_for_itself(patched):
    model, patch = patched
    ids = one_prompt()
    want, report = new_tokens(model, ids), patch.report
    other = copy.deepcopy(model)
    assert torch.equal(new_tokens(other, ids), want)
    assert patch.report is report and other.flexasl_patch is not patch
    other.flexasl_patch.remove()
    assert other.config._attn_implementation == "sdpa" and not hasattr(other, "flexasl_patch")
    assert torch.equal(new_tokens(model, ids), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(patched, dtype):
    model, patch = patched
    ids = one_prompt()
    want = model(ids).logits[:, -1]
    with torch.autocast("cpu", dtype=dtype):
        out = model.generate(ids, max_new_tokens=4, output_logits=True, **GREEDY)
    assert patch.report.rows[0].kept_tokens == 24
    torch.testing.assert_close(out.logits[0], want, rtol=0, atol=0.3)


def test_a_pipeline_with_a_chat_template(tmp_path):
    speak = transformers.pipeline("text-generation", model=str(save_tiny_model(tmp_path)))
    with flexasl.patch(speak.model, SMALL) as patch:
        said = speak([{"role": "user", "content": "one two three " * 30}], max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"][-1]["role"] == "assistant"
    assert patch.report.rows[0].pruned


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is not available .* candidates would be read"),
        ({"assistant_model": "qwen2"}, "assistant_model is not available .* can be the assistant of another"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size=16 is not available .* give prefill_chunk_size=None"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not available"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' is not available"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' is not available"),
        ({"output_hidden_states": True}, "output_hidden_states is not available"),
        ({"output_attentions": True}, "output_attentions is not available"),
    ],
)
def test_refuses_before_work_starts(patched, settings, message):
    model, _ = patched
    settings = {name: tiny(value) if name == "assistant_model" else value for name, value in settings.items()}
    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(UnsupportedError, match=message):
            new_tokens(model, one_prompt(), **settings)
    finally:
        handle.remove()
    assert not ran
    assert new_tokens(model, one_prompt()).shape == (1, 6)


def test_refuses_the_same_in_a_generation_config(patched):
    model, _ = patched
    config = copy.deepcopy(model.generation_config)
    config.prefill_chunk_size = 16
    for arguments, settings in (((one_prompt(),), {"generation_config": config}), ((one_prompt(), config), {})):
        with pytest.raises(UnsupportedError, match="prefill_chunk_size=16 is not available"):
            model.generate(*arguments, **settings)


ASKED = {
    "prefill_chunk_size": 16,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "dola_layers": "high",
    "penalty_alpha": 0.6,
    "output_hidden_states": True,
    "output_attentions": True,
}


@pytest.mark.parametrize("name", ASKED)
def test_refuses_what_the_models_own_configuration_asks_for(name, monkeypatch):
    """Also beside an explicit one, which leaves it open; a value that is given to `generate` goes before both."""
    model, ids = tiny(), one_prompt()
    explicit = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, top_k=50)
    monkeypatch.setattr(model.generation_config, name, ASKED[name])
    with flexasl.patch(model, SMALL) as patch:
        for settings in ({}, {"generation_config": explicit}):
            with pytest.raises(UnsupportedError, match=f"{name}(=.*)? is not available on a patched model"):
                model.generate(ids, **settings)
        assert patch.report is None
        if not name.startswith("output"):  # which transformers leaves to the model's, where None is given
            model.generate(ids, max_new_tokens=2, **{name: None})
            assert patch.report.rows[0].prompt_tokens == 60


def test_ways_to_generate_that_are_not_known_are_refused_by_their_setting(patched):
    model, _ = patched
    for settings, name in (
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "constraints or force_words_ids"),
    ):
        with pytest.raises(UnsupportedError, match=f"{name} is not available .* give a way to generate among greedy"):
            new_tokens(model, one_prompt(), **settings)


def test_a_cache_called_hybrid_is_the_usual_one(monkeypatch):
    """The files of Gemma 2 and 3 ask for it, and transformers takes a dynamic one."""
    model = tiny("gemma2")
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
    want = new_tokens(model, one_prompt())
    with flexasl.patch(model, SMALL.replace(select_tokens=1.0)):
        assert torch.equal(new_tokens(model, one_prompt()), want)


def test_a_pad_token_within_a_prompt_without_a_mask(patched):
    model, patch = patched
    ids = one_prompt()
    ids[0, 30] = 0
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(
        UnsupportedError, match=r"pad_token_id=0 behind .* \(row 0, token 30\), and generate masks it out"
    ):
        model.generate(ids, eos_token_id=5, **settings)
    for more in ({"attention_mask": torch.ones_like(ids)}, {"eos_token_id": 0}):
        model.generate(ids, **settings | more)
        assert patch.report.rows[0].prompt_tokens == 60
    model.generate(torch.cat([torch.zeros(1, 7, dtype=torch.long), one_prompt()], 1), eos_token_id=5, **settings)
    assert patch.report.rows[0].prompt_tokens == 60


def test_refuses_continuous_batching(patched):
    model, _ = patched
    for call in (lambda: model.generate_batch([[3, 4, 5]]), model.init_continuous_batching):
        with pytest.raises(UnsupportedError, match=r"continuous batching has its own paged cache"):
            call()


def test_another_model_that_shares_the_configuration_runs_on():
    model, ids = tiny(), one_prompt()
    other = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    assert other.config is model.config
    config, want = model.config, other(ids).logits
    plain = new_tokens(model, ids)
    with flexasl.patch(model, SMALL.replace(select_tokens=1.0)) as patch:
        assert torch.equal(other(ids).logits, want)
        assert other.config is model.config is config and config._attn_implementation == "sdpa"
        fresh = transformers.AutoModelForCausalLM.from_config(model.config).eval()  # made meanwhile
        assert fresh(ids).logits.isfinite().all()
        with flexasl.patch(other, SMALL) as second:
            assert torch.equal(new_tokens(model, ids), plain)
            other(ids)
            assert second.report.rows[0].kept_tokens == 24 and patch.report.rows[0].kept_tokens == 60
        assert torch.equal(other(ids).logits, want)
    holders = [module for module in model.modules() if hasattr(module, "config")]
    assert len(holders) > 6 and all(module.config is config for module in holders)
    assert torch.equal(new_tokens(model, ids), plain)


def test_settings_of_the_model_that_change_while_it_is_patched():
    model, ids = copy.deepcopy(tiny()), one_prompt()
    with flexasl.patch(model, SMALL) as patch:
        model.config.use_cache = False
        assert model(ids).past_key_values is None and patch.report.kv_tokens == ()
        model.config.use_cache = True
        assert model(ids).past_key_values.get_seq_length() == 60
        model.config.output_hidden_states = True
        with pytest.raises(UnsupportedError, match="output_hidden_states is not available"):
            model(ids)
        model.set_attn_implementation("flexasl")
    assert model.config.output_hidden_states and model.config._attn_implementation == "sdpa"
    assert model.model.config is model.config


@pytest.mark.parametrize("way", ["pickle", "save_pretrained"])
def test_a_patched_model_is_stored_as_it_is_without_the_patch(way, tmp_path):
    model, ids = copy.deepcopy(tiny()), one_prompt()
    want = model(ids).logits
    with flexasl.patch(model, SMALL):
        if way == "pickle":
            other = pickle.loads(pickle.dumps(model))
            other.flexasl_patch.remove()
        else:
            model.save_pretrained(tmp_path)
            other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(other(ids).logits, want)
    assert other.config is other.model.config is other.model.layers[0].self_attn.config


def test_refuses_hidden_states_that_the_model_is_configured_to_give():
    model = copy.deepcopy(tiny())
    model.config.output_hidden_states = True
    with (
        flexasl.patch(model, SMALL),
        pytest.raises(UnsupportedError, match="output_hidden_states is not available"),
    ):
        model(one_prompt())


def test_refuses_another_attention_while_patched(patched):
    model, patch = patched
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match=r"was set to 'eager'; call model.set_attn_implementation\('flexasl'\)"):
        model(one_prompt())
    model.set_attn_implementation("flexasl")
    model(one_prompt())
    patch.remove()
    assert model.config._attn_implementation == "sdpa" and "set_attn_implementation" not in vars(model)


def test_refuses_masking_and_pruning_later_turns_together():
    with pytest.raises(ConfigError, match="propagate='mask' and later_turns='prune' exclude each other"):
        ASLConfig(propagate="mask", later_turns="prune")


def test_everything_is_as_before_after_remove():
    model = copy.deepcopy(tiny())  # transformers leaves hooks where outputs were asked for
    names = ("generate", "generate_batch", "init_continuous_batching")
    flexasl.patch(model, SMALL).remove()
    assert not set(names) & set(vars(model))
    new_tokens(model, one_prompt(), prompt_lookup_num_tokens=3)
    model(one_prompt(), output_hidden_states=True, past_key_values=DynamicCache(config=model.config))
