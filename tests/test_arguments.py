"""What public functions say of arguments that they cannot take: one sentence, before work begins."""

import re

import numpy as np
import pytest
import torch
from models import SMALL, STAGED, tiny
from tiny_chat import tiny_tokenizer

import flexasl
from flexasl import ASLConfig, LayerSelector, StagedSelector, evaluation, run
from flexasl.attention import Scoring
from flexasl.prefill import Prefill
from flexasl.replaying import replay_scores

pytestmark = pytest.mark.cpu("tells what is refused, before anything runs")

QUERY, KEY = torch.randn(6, 2, 4, 80, 8), torch.randn(6, 2, 2, 80, 8)
MASK = torch.ones(2, 80)


def lone(name, **given):
    """A call of a function of the evaluation or the calibration with one argument, and all others right."""
    model, tokenizer = tiny(), tiny_tokenizer()
    if name == "plan":
        return lambda: evaluation.plan(**given)
    if name == "build":
        return lambda: evaluation.build(**({"task": "needle", "tokenizer": tokenizer, "length": 300} | given))
    if name == "calibrate":
        return lambda: flexasl.calibrate(**({"model": model, "tokenizer": tokenizer} | given))
    right = {"plan": evaluation.plan(samples=1), "model": model, "tokenizer": tokenizer, "out": "nowhere"}
    return lambda: evaluation.evaluate(**(right | given))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: flexasl.replay(QUERY, KEY, SMALL, attention_mask=MASK[:, :79]),
            "attention_mask is [2, 79]; give [batch,",
        ),
        (
            lambda: flexasl.replay(QUERY, KEY, SMALL, attention_mask=MASK[:1]),
            "attention_mask is [1, 80]; give [batch, t",
        ),
        (
            lambda: flexasl.replay(QUERY, KEY, SMALL, attention_mask=[[1] * 80] * 2),
            "is a list; give a tensor [batch, token]",
        ),
        (
            lambda: flexasl.replay(QUERY, KEY[:, :, :1].expand(-1, -1, 3, -1, -1), SMALL),
            "query has 4 heads and key has 3",
        ),
        (lambda: flexasl.replay(QUERY, KEY.double(), SMALL), "query is torch.float32 on cpu, key torch.float64 on cpu"),
        (lambda: flexasl.replay(QUERY.long(), KEY, SMALL), "query is of torch.int64; give a tensor of floats"),
        (lambda: flexasl.replay(QUERY[:, :0], KEY[:, :0], SMALL), "are empty; give states of some tokens"),
        (lambda: flexasl.replay(QUERY[0], KEY[0], SMALL), "do not match; give query [layer, batch, head, token, dim]"),
        (lambda: flexasl.replay(QUERY, [1], SMALL), "key is a list; give a tensor of floats"),
        (lambda: flexasl.replay(QUERY, KEY, {"select_tokens": 40}), "is a dict; give an ASLConfig or None"),
        (lambda: flexasl.replay(QUERY, KEY, policy="best"), "policy='best' is not known"),
        (lambda: flexasl.replay(QUERY, KEY, attention=0.5), "attention is a float; give a FlexASLAttention"),
        (lambda: flexasl.replay(QUERY, KEY, attention=[flexasl.FlexASLAttention()]), "attention holds 1 things"),
        (lambda: flexasl.replay(QUERY, KEY, sinks=torch.zeros(3)), "sinks is [3]; give [layer, head]"),
        (lambda: replay_scores(torch.randn(3)), "scores is [3] of torch.float32; give floats [layer, token]"),
        (lambda: replay_scores(torch.randn(6, 0)), "scores is [6, 0] of torch.float32; give floats [layer, token]"),
        (
            lambda: replay_scores(torch.randn(6, 80), STAGED, question=[90, 3]),
            "question: position=90 is too large; give from 0 to 87",
        ),
        (
            lambda: replay_scores(torch.randn(6, 80), STAGED, question=torch.tensor([9, 3])),
            "question: positions do not ascend; give each once, in order",
        ),
        (lambda: StagedSelector(STAGED.resolve(6), [90], rows=[1]), "rows: row=1 is too large; give from 0 to 0"),
        (lambda: LayerSelector(SMALL.resolve(6), [90, 9], rows=[1, 0]), "rows: rows do not ascend; give each once, in"),
        (lambda: STAGED.resolve(6, []), "ranking_layers is empty; give at least one layer, or None for all"),
        (lambda: SMALL.resolve(6, [1, 7]), "ranking_layers: layer=7 is too large; give from 0 to 5"),
        (lambda: STAGED.resolve(6, [3, 1]), "ranking_layers: layers do not ascend; give each once, in order"),
        (
            lambda: LayerSelector(ASLConfig(settled_by="variance"), [9]),
            "config has tau=None; give those of policy.resolve(config, num_layers)",
        ),
        (
            lambda: StagedSelector(ASLConfig(), [9]),
            "config has tau=None; give those of policy.resolve(config, num_layers)",
        ),
        (
            lambda: LayerSelector(SMALL.resolve(6), [9], ranking_layers=[0, 2]),
            "min_layer=1 does not attend to the whole prompt",
        ),
        (lambda: LayerSelector(SMALL.resolve(6), [9.5]), "lengths=9.5 is not a whole number"),
        (lambda: LayerSelector(SMALL.resolve(6), [9], tokens=8), "tokens=8 is too small; give at least 9"),
        (lambda: LayerSelector({}, [9]), "config={} is a dict; give an ASLConfig"),
        (lambda: flexasl.FlexASLAttention(scale=float("nan")), "scale=nan is out of range"),
        (lambda: flexasl.FlexASLAttention(softcap="x"), "softcap='x' is out of range; give a positive number or None"),
        (lambda: flexasl.FlexASLAttention(sliding_window=2.5), "sliding_window=2.5 is not a whole number"),
        (lambda: flexasl.FlexASLAttention(kernel=["sdpa"]), "kernel=['sdpa'] is not known"),
        (lambda: Scoring(window=0), "window=0 is not a number of queries; give an int of at least 1"),
        (lambda: Scoring(kernel_size=4), "kernel_size=4 is not an odd number of tokens"),
        (lambda: Scoring(pooling="mean"), "pooling='mean' is not known"),
        (lambda: flexasl.patch(tiny(), 512), "config=512 is an int; give an ASLConfig or None"),
        (
            lambda: flexasl.patch(tiny(), policy=flexasl.policies.ASL),
            "is a type; give a name such as 'asl', or an instance",
        ),
        (lambda: flexasl.patch(tiny(), compile="yes"), "compile='yes' is a str; give True or False"),
        (lambda: flexasl.load_cache(3, tiny()), "path=3 is an int; give a path"),
        (
            lambda: ASLConfig(select_token=5),
            "'select_token' is not a setting of ASLConfig; the settings are select_tokens",
        ),
        (lambda: ASLConfig().replace(layers=5), "'layers' is not a setting of ASLConfig"),
        (lambda: ASLConfig.load(None), "path is None; give a path"),
        (lambda: ASLConfig.load(True), "path=True is a bool; give a path"),
        (lambda: ASLConfig().resolve("6"), "num_layers='6' is not a whole number; give an int of at least 1"),
        (lambda: ASLConfig().resolve(0), "num_layers=0 is too small; give at least 1"),
        (lambda: run.load_model(3), "name=3 is an int; give a path"),
        (
            lambda: run.load_model("tiny", []),
            "dtype=[] is a list; give the name of a number format",
        ),
        (lambda: run.load_model("tiny", "nn"), "dtype='nn' is not known; give the name of a number format"),
        (lone("evaluate", together="yes"), "together='yes' is a str; give True or False"),
        (lambda: ASLConfig.from_dict({1: 2, "b": 3}), "1 is not a setting of ASLConfig"),
        (lambda: ASLConfig(select_on=["last"]), "select_on=['last'] is not known; give 'last' or 'max' or 'recent'"),
        (lambda: ASLConfig(tau="x" * 500), "tau='xxx"),
        (lambda: ASLConfig(select_tokens=np.bool_(True)), "is not an amount"),
        (lone("plan", policies="asl"), "policies='asl' is a str; give a list of policies such as 'asl'"),
        (lone("plan", policies=[3]), "policies holds 3, an int; give policies such as 'asl'"),
        (lone("plan", budgets=256), "budgets=256 is an int; give a list of counts of tokens (512) or shares (0.25)"),
        (lone("plan", budgets=[]), "budgets is empty; give counts of tokens"),
        (lone("plan", lengths="1024"), "lengths='1024' is a str; give a list of numbers of tokens"),
        (lone("plan", lengths=[True]), "length=True is not a number of tokens"),
        (lone("plan", tasks="needle"), "tasks='needle' is a str; give a list of tasks such as 'needle'"),
        (lone("plan", samples="3"), "samples='3' is not a whole number; give an int"),
        (lone("plan", samples=99999999999), "samples=99999999999 is too large; give at most 1000000"),
        (lone("plan", seed=None), "seed=None is not a whole number"),
        (lone("plan", answer_tokens=0), "answer_tokens=0 is too few"),
        (lone("plan", config={"tau": 0.3}), "config={'tau': 0.3} is a dict; give an ASLConfig or None"),
        (lone("plan", sources="file"), "sources='file' is a str; give a flexasl.evaluation.Sources or None"),
        (lone("plan", suite=["quick"]), "suite=['quick'] is not known; give one of ruler"),
        (lone("plan", policies=["snapkv:tau=0.3"]), "tau=0.3 would have no effect under policy 'snapkv'"),
        (lone("plan", policies=["snapkv"], config=ASLConfig(tau=0.3)), "config has no effect: of the policies, 'asl'"),
        (
            lone("plan", policies=["snapkv:kv_budget=48"], budgets=[64, 96]),
            "has a budget of its own, the same at each of",
        ),
        (
            lone("plan", policies=["asl", "asl_two_pass"], config=ASLConfig(if_never="keep")),
            "if_never='keep' does not go with policy 'asl_two_pass', which selects in any case",
        ),
        (
            lambda: evaluation.Sources(qa_files="squad.json"),
            "qa_files='squad.json' is a str; give a list of paths of files",
        ),
        (lambda: evaluation.Sources(haystack=3), "haystack=3 is an int; give a path"),
        (lambda: evaluation.Sources(infinitebench="none"), "infinitebench=none is not a folder"),
        (lambda: evaluation.Sources(depths=0.5), "depths=0.5 is a float; give a list of numbers in [0, 1]"),
        (lambda: evaluation.Sources(depths=["a"]), "depths holds 'a', a str; give numbers in [0, 1]"),
        (lambda: Prefill("asl", SMALL.resolve(6), 6, [80]), "policy='asl' is a str; give an instance of a policy"),
        (
            lambda: Prefill(flexasl.policies.ASL(), ASLConfig(), 6, [80]),
            "config has tau=None; give those of policy.res",
        ),
        (lambda: Prefill(flexasl.policies.ASL(), SMALL.resolve(6), 6, []), "lengths is empty"),
        (lone("build", tokenizer=None), "tokenizer is None; give the model's tokenizer"),
        (lone("build", length="300"), "length='300' is not a whole number"),
        (lone("build", index=-1), "index=-1 is too small; give at least 0"),
        (lone("build", task=None), "task=None is not known; give one of needle"),
        (lone("evaluate", plan="quick"), "plan='quick' is a str; give what flexasl.evaluation.plan returns"),
        (lone("evaluate", model="tiny"), "model is a str; give a transformers causal language model"),
        (lone("evaluate", tokenizer="tiny"), "tokenizer='tiny' is a str; give the model's tokenizer"),
        (lone("evaluate", rank=1), "rank=1 is too large; give from 0 to 0"),
        (lone("evaluate", out=None), "out is None; give a path"),
        (lambda: evaluation.report(3), "out=3 is an int; give a path"),
        (lone("calibrate", tokenizer=None), "tokenizer is None; give the model's tokenizer"),
        (lone("calibrate", tasks="needle"), "tasks='needle' is a str; give a list of tasks"),
        (lone("calibrate", samples=2.5), "samples=2.5 is not a whole number"),
        (lone("calibrate", length="long"), "length='long' is not a whole number"),
        (lone("calibrate", config={"select_tokens": 9}), "config={'select_tokens': 9} is a dict; give an ASLConfig"),
    ],
)
def test_one_sentence(call, words) -> None:
    with pytest.raises(flexasl.FlexASLError, match=re.escape(words)) as caught:
        call()
    assert len(str(caught.value)) < 700
    assert not hasattr(tiny(), "flexasl_patch")


def test_numbers_of_numpy_are_numbers() -> None:
    config = ASLConfig(
        select_tokens=np.int64(40),
        window=np.uint8(8),
        kv_budget=np.float32(0.5),
        tau=np.float64(0.3),
        min_layer=np.int8(2),
    )
    assert config == ASLConfig(select_tokens=40, window=8, kv_budget=0.5, tau=0.3, min_layer=2)
    assert [type(config.to_dict()[name]) for name in ("select_tokens", "kv_budget", "tau")] == [int, float, float]
    assert (
        flexasl.policies.FixedLayer(np.int64(2)).layer == 2 and flexasl.policies.Streaming(np.int64(2)).keep_first == 2
    )
    assert evaluation.plan(budgets=[np.int64(64)], lengths=np.array([300])).settings[1].config.select_tokens == 64


def test_one_config_is_replayed_under_several_policies() -> None:
    config = SMALL.replace(variance_reference="initial")
    layers = [
        flexasl.replay(QUERY, KEY, config, policy)[0].selected_layer for policy in ("asl", "fixed_layer", "snapkv")
    ]
    assert layers[1:] == [2, None]
    named = flexasl.replay(QUERY, KEY, SMALL, "fixed_layer:layer=4")[0]
    assert named.selected_layer == 4


def test_old_names_work_with_a_warning():
    rule = SMALL.resolve(6)
    cases = (
        ("voters", "ranking_layers", lambda: LayerSelector(rule, [90], voters=range(6)).needs(1)),
        ("voters", "ranking_layers", lambda: SMALL.resolve(6, voters=range(6)) == rule),
        ("voters", "ranking_layers", lambda: flexasl.policies.ASL().resolve(SMALL, 6, voters=range(6)) == rule),
        ("sinks", "keep_first", lambda: flexasl.policies.Streaming(sinks=3).keep_first == 3),
        ("sinks", "keep_first", lambda: flexasl.policies.choose("streaming:sinks=3")[0].keep_first == 3),
        ("Selection.slots", "Selection.indices", lambda: flexasl.Selection(0, 1, torch.ones(3) > 0, 3).slots[2] == 2),
        ("LayerCache.columns", "LayerCache.positions", lambda: flexasl.LayerCache().columns is None),
    )
    for old, new, used in cases:
        with pytest.warns(DeprecationWarning, match=f"^{old} is deprecated; use {new}$"):
            assert used()
