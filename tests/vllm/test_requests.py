"""What a request may ask for, what it is told, and what a server refuses before it starts."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import LAYERS, LEAN, STAGED, engine, folder, params, prompts, pruning, run, want
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.registry import ModelRegistry

import flexasl
from flexasl import ConfigError, FlexASLError, UnsupportedError
from flexasl.calibrated import CalibratedFor
from flexasl.integrations import vllm as plugin
from flexasl.integrations.vllm.admission import name_of
from flexasl.integrations.vllm.methods import Methods, Settings, asked_for
from flexasl.integrations.vllm.startup import methods_of
from flexasl.stages import Stage


@pytest.fixture(scope="module")
def llm():
    with engine("llama", STAGED) as made:
        yield made


@pytest.fixture(scope="module")
def lean():
    with engine("llama", LEAN, max_new_tokens=20) as made:
        yield made


def test_settings_of_a_request(llm):
    given = prompts(150, 150, 150, 150, 150, 20)
    asks = [
        {},
        {"flexasl_select_tokens": 60},
        {"flexasl_select_tokens": "0.5", "flexasl_kv_budget": 40},
        {"flexasl_policy": "fixed_layer:layer=2"},
        {"flexasl_policy": "full"},
        {},
    ]
    plain = [
        (STAGED, "asl"),
        (STAGED.replace(select_tokens=60), "asl"),
        (STAGED.replace(select_tokens=0.5, kv_budget=40), "asl"),
        (flexasl.ASLConfig(select_tokens=24, window=8), "fixed_layer:layer=2"),
        (flexasl.ASLConfig(), "full"),
        (STAGED, "asl"),
    ]
    found, reports = run(llm, given, [params(**ask) for ask in asks])
    for ids, tokens, report, (config, policy) in zip(given, found, reports, plain):
        (wanted,), (theirs,) = want("llama", [ids], config, policy)
        assert tokens == wanted
        assert report.rows[0].kept_positions == theirs.rows[0].kept_positions
        assert report.kv_tokens == theirs.kv_tokens


def test_question_as_a_span(llm):
    (ids,) = prompts(150, seed=3)
    for given in ([130, 140], [(130, 140)]):
        (tokens,), (report,) = run(llm, [ids], [params(flexasl_question=given)])
        (wanted,), (theirs,) = want("llama", [ids], STAGED, question=(130, 140))
        assert report.rows[0].ranked_by == theirs.rows[0].ranked_by == "tokens 130 to 139"
        assert report.rows[0].kept_positions == theirs.rows[0].kept_positions
        assert tokens == wanted


def test_a_question_that_the_prompt_does_not_have(llm):
    (ids,) = prompts(100, seed=3)
    _, (report,) = run(llm, [ids], [params(flexasl_question=[100, 110])])
    assert report.rows[0].ranked_by.startswith("the last 8 tokens; question: start=100")


BAD = {
    "unknown": ({"flexasl_budget": 3}, "flexasl_budget=3 is not known; a request may set flexasl_select_tokens"),
    "too_few": ({"flexasl_select_tokens": 3}, "select_tokens=3 does not exceed window=8"),
    "no_amount": ({"flexasl_select_tokens": "many"}, "flexasl_select_tokens='many' is not an amount"),
    "no_policy": ({"flexasl_policy": "best"}, "policy='best' is not known"),
    "second_pass": ({"flexasl_policy": "asl_two_pass"}, "policy='asl_two_pass' reads tokens twice"),
    "beyond": ({"flexasl_policy": "fixed_layer:layer=9"}, "9 is beyond the model|layer=9"),
    "no_question": ({"flexasl_question": 3.5}, "flexasl_question=3.5 is not a question"),
    "idle_question": ({"flexasl_policy": "full", "flexasl_question": [1, 2]}, "would have no effect"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_one_request(llm, name):
    asks, error = BAD[name]
    with pytest.raises(VLLMValidationError, match=error):
        run(llm, prompts(100), [params(**asks)])
    given = prompts(90)
    assert run(llm, given, [params()])[0] == want("llama", given, STAGED)[0]


def test_logprobs_of_dropped_tokens_are_refused(llm):
    sampling = params()
    sampling.prompt_logprobs = 1
    with pytest.raises(VLLMValidationError, match="prompt_logprobs=1 is not available under policy 'asl'"):
        run(llm, prompts(100), sampling)
    sampling = params(flexasl_policy="full")
    sampling.prompt_logprobs = 1
    run(llm, prompts(100), sampling)


@pytest.mark.parametrize(
    ("asks", "error"),
    [
        ({"flexasl_kv_budget": 25}, "kv_budget=25 would need more memory than this server holds"),
        ({"flexasl_kv_budget": 0.9}, "kv_budget=0.9 would need more memory"),
        ({"flexasl_policy": "full"}, "policy='full' would need more memory"),
        ({"flexasl_policy": "pyramid_kv"}, "would need more memory"),
    ],
)
def test_more_memory_than_is_held_for_a_prompt(lean, asks, error):
    with pytest.raises(VLLMValidationError, match=error):
        run(lean, prompts(100), [params(**asks)])


def test_less_memory_than_is_held_for_a_prompt(lean):
    given = prompts(100, 150)
    asks = [{"flexasl_kv_budget": 16, "flexasl_select_tokens": 60}, {"flexasl_policy": "snapkv"}]
    found, reports = run(lean, given, [params(**ask) for ask in asks])
    plain = [
        (LEAN.replace(kv_budget=16, select_tokens=60), "asl"),
        (flexasl.ASLConfig(kv_budget=24, window=8), "snapkv"),
    ]
    for ids, tokens, report, (config, policy) in zip(given, found, reports, plain):
        (wanted,), (theirs,) = want("llama", [ids], config, policy)
        assert (tokens, report.kv_tokens) == (wanted, theirs.kv_tokens)


def test_longer_answers_than_there_is_memory_for(lean):
    with pytest.raises(VLLMValidationError, match="max_tokens=21 is more than this server's max_new_tokens=20"):
        run(lean, prompts(100), params(21))


def test_reports_by_collective_rpc(llm):
    out = llm.generate([{"prompt_token_ids": prompts(150)[0]}], params(), use_tqdm=False)
    (reports,) = llm.collective_rpc("flexasl_reports")
    (name,) = [name for name in reports if name.split("-")[0] == out[0].request_id]
    report = flexasl.Report.from_dict(reports[name])
    assert report == pruning(llm).reports[name]
    assert report.rows[0].pruned and "24 kept" in str(report)


def arguments(**how):
    made = plugin.server_arguments(folder("llama"), "asl", STAGED, rank_by_question=False)
    return EngineArgs(**(made | {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True} | how))


REFUSED = {
    "--no-enable-chunked-prefill": {"enable_chunked_prefill": True},
    "--no-enable-prefix-caching": {"enable_prefix_caching": True},
    "--pipeline-parallel-size 1": {"pipeline_parallel_size": 2},
    "--enable-lora": {"enable_lora": True},
    "--speculative-config": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "--worker-cls": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
    "--kv-transfer-config": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_at_start(flag):
    with pytest.raises(Exception, match=flag) as caught:
        arguments(**REFUSED[flag]).create_engine_config()
    assert "is not available with FlexASLLlamaForCausalLM" in str(caught.value)


def test_graphs_that_leave_out_preparation(monkeypatch):
    monkeypatch.setattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", True, raising=False)
    with pytest.raises(Exception, match=r"VLLM_USE_BREAKABLE_CUDAGRAPH is not available.*set it to 0"):
        arguments().create_engine_config()


@pytest.mark.parametrize(
    ("config", "policy", "error"),
    [
        (flexasl.ASLConfig(kv_top_p=0.5), "asl", "kv_top_p=0.5 keeps another number of entries"),
        (flexasl.ASLConfig(kv_dtype="int8"), "asl", "kv_dtype='int8' is vLLM's to say"),
        (flexasl.ASLConfig(propagate="mask"), "asl", "propagate='mask'"),
        (flexasl.ASLConfig(later_turns="prune"), "asl", "later_turns='prune' would have no effect"),
        (None, "asl_two_pass", "policy='asl_two_pass' reads tokens twice"),
    ],
)
def test_settings_that_vllm_cannot_honour(config, policy, error):
    with pytest.raises(ConfigError, match=error):
        Settings(policy, config)


def test_models_that_were_not_tested():
    place = Path(folder("llama")).parent / "other"
    place.mkdir(exist_ok=True)
    told = json.loads((Path(folder("llama")) / "config.json").read_text()) | {"architectures": ["OtherForCausalLM"]}
    (place / "config.json").write_text(json.dumps(told))
    with pytest.raises(UnsupportedError, match="is a OtherForCausalLM, which was not tested inside vLLM"):
        plugin.server_arguments(str(place))


def test_stock_models_stay_as_they_are():
    from vllm.model_executor.models.llama import LlamaForCausalLM

    assert ModelRegistry.models["LlamaForCausalLM"].load_model_cls() is LlamaForCausalLM
    assert not hasattr(LlamaForCausalLM, "flexasl")
    made = EngineArgs(model=folder("llama"), dtype="float32", skip_tokenizer_init=True).create_engine_config()
    assert "flexasl" not in str(made.parallel_config.worker_cls) and not made.model_config.logits_processors


def test_settings_reach_every_process():
    config = STAGED.replace(kv_budget=0.5, stages=(Stage(tokens=0.5, min_layer=1),))
    settings = Settings("asl", config, rank_by_question=False, reports="x", max_new_tokens=3)
    assert Settings.from_dict(settings.to_dict()) == settings
    made = arguments().create_engine_config()
    methods = methods_of(made)
    assert type(methods).from_dict(methods.to_dict()) == methods
    assert made.model_config.logits_processors == [name_of(methods, False)]
    assert methods.own.num_layers == LAYERS
    with pytest.raises(ConfigError, match="give a dict with some of"):
        Settings.from_dict({"polcy": "asl"})


def test_profiles_by_name_and_shape():
    known = CalibratedFor(
        model="SmolLM2-135M-Instruct", model_type="llama", num_layers=30, hidden_size=576, dtype="float32"
    )
    config = flexasl.ASLConfig(select_tokens=512)
    found = Methods(Settings("asl", config), known, 4096).own
    assert found.profile == "SmolLM2-135M-Instruct (comes with flexasl)"
    plain = Methods(Settings("asl", config, profile=False), known, 4096).own
    assert plain.profile is None and plain.config != found.config
    other = dataclasses.replace(known, model="mine")
    assert Methods(Settings("asl", config), other, 4096).own.config == plain.config


def test_what_the_newer_runner_calls(monkeypatch):
    """Its parts that need no GPU: it takes the checks of requests, and tells the names of a step's requests."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.logits_processor.loader import build_custom_logits_processors_params_validator

    from flexasl.integrations.vllm.model_state import PrunedModelState
    from flexasl.integrations.vllm.models import derived

    name = name_of(methods_of(arguments().create_engine_config()), True)
    check = build_custom_logits_processors_params_validator([name])
    check(params())
    with pytest.raises(VLLMValidationError, match="flexasl_budget=3 is not known"):
        check(params(flexasl_budget=3))
    assert derived("LlamaForCausalLM").get_model_state_cls(None) is PrunedModelState
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda self, batch, **kwargs: {"batch": batch, **kwargs})
    state, batch = PrunedModelState.__new__(PrunedModelState), SimpleNamespace(req_ids=["b", "a"])
    assert state.prepare_attn(batch, for_capture=False) == {"batch": batch, "for_capture": False}
    assert state.names == ("b", "a")


def test_what_requests_say():
    assert asked_for(None) == asked_for({"other": 1}) == {}
    assert asked_for({"flexasl_select_tokens": "4k"}) == {"select_tokens": 4096}
    assert asked_for({"flexasl_question": "Why?"}) == {"question": ["Why?"]}
    assert asked_for({"flexasl_question": [1, 2, 5, 6]}) == {"question": [(1, 2), (5, 6)]}
    for bad in ([1, 2, 3], [], "", {"a": 1}, True, ["a", 1]):
        with pytest.raises(FlexASLError, match="is not a question"):
            asked_for({"flexasl_question": bad})
