"""Engines of vLLM that prune, against the transformers adapter: tokens, selections, kept positions, cache entries."""

import contextlib
import functools

import pytest
import torch
from engines import FAMILIES, LEAN, STAGED, VARIANCE, engine, model_of, params, prompts, pruning, run, want

import flexasl
from flexasl.integrations.vllm.requests import Requests

LENGTHS = (150, 40, 90, 10, 24, 25)
BUDGETS = flexasl.ASLConfig(select_tokens=64)
POLICIES = {
    "variance": ("asl", VARIANCE),
    "paper": ("paper", flexasl.ASLConfig(select_tokens=40, observe_layers=2, min_layer=1, tau=0.95)),
    "one_layer": ("fixed_layer:layer=2", BUDGETS),
    "each_layer": ("pyramid_infer", BUDGETS),
    "share": ("asl", STAGED.replace(select_tokens=0.3)),
    "entries": ("asl", STAGED.replace(kv_budget=40)),
    "cache_alone": ("snapkv", BUDGETS.replace(kv_budget=48)),
    "by_depth": ("pyramid_kv", BUDGETS.replace(kv_budget=48)),
    "first_and_last": ("streaming", BUDGETS.replace(kv_budget=48)),
    "whole": ("full", flexasl.ASLConfig()),
}


def same(reports, wanted):
    """Whether vLLM decided what transformers did."""
    for report, other in zip(reports, wanted, strict=True):
        mine, theirs = report.rows[0], other.rows[0]
        assert mine.selections == theirs.selections
        assert mine.kept_positions == theirs.kept_positions
        assert mine.layer_tokens == theirs.layer_tokens
        assert report.kv_tokens == other.kv_tokens


@functools.cache
def wanted_of(family):
    """Under both settings, before an engine of the family runs: vLLM's transformers back end, which runs OLMo 2,
    changes the class of the model for the whole process."""
    return [want(family, prompts(*LENGTHS), config) for config in (STAGED, LEAN)]


@pytest.mark.parametrize("config", [STAGED, LEAN], ids=["tokens", "tokens_and_cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_under_transformers(family, config):
    given = prompts(*LENGTHS)
    tokens, reports = wanted_of(family)[config is LEAN]
    assert len({row.selections for report in reports for row in report.rows}) > 1
    with engine(family, config) as llm:
        found, mine = run(llm, given, params())
    same(mine, reports)
    assert found == tokens


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_as_under_transformers(name):
    policy, config = POLICIES[name]
    given = prompts(150, 90, 70, 30, seed=1)
    tokens, reports = want("llama", given, config, policy)
    with engine("llama", config, policy) as llm:
        found, mine = run(llm, given, params())
    same(mine, reports)
    assert found == tokens


@pytest.mark.parametrize("config", [STAGED, LEAN], ids=["tokens", "tokens_and_cache"])
def test_prompts_join_decodes(config):
    given, counts = prompts(150, 90, 15, 120, 60, 200, 30, seed=2), [3, 9, 6, 2, 8, 5, 4]
    tokens, reports = want("llama", given, config, count=max(counts))
    with engine("llama", config, max_num_seqs=3) as llm:
        found, mine = run(llm, given, [params(count) for count in counts])
    same(mine, reports)
    assert found == [own[:count] for own, count in zip(tokens, counts)]


@pytest.mark.parametrize("config", [STAGED, LEAN], ids=["tokens", "tokens_and_cache"])
def test_long_answers(config):
    given = prompts(150, 60, seed=5)
    tokens, _ = want("qwen3", given, config, count=80)
    with engine("qwen3", config) as llm:
        assert run(llm, given, params(80))[0] == tokens


def preempting(config, tokens):
    """An engine with memory for so many tokens, and who reads prompts there."""
    stack = contextlib.ExitStack()
    layers, entry = 6, 2 * 2 * 32 * 4
    llm = stack.enter_context(
        engine(
            "llama",
            config,
            kv_cache_memory_bytes=tokens * layers * entry,
            max_new_tokens=150,
            max_model_len=512,
            max_num_batched_tokens=512,
        )
    )
    adapter, read = pruning(llm), []
    plain = adapter._add
    adapter._add = lambda request, report: (read.append(request.name), plain(request, report))
    return stack, llm, read


@pytest.mark.parametrize(("config", "memory"), [(LEAN, 14 * 32), (STAGED, 20 * 32)], ids=["tokens_and_cache", "tokens"])
def test_what_is_read_again_after_preemption(config, memory):
    given = prompts(150, 90, 120, 200, seed=3)
    tokens, reports = want("llama", given, config, count=100)
    stack, llm, read = preempting(config, memory)
    with stack:
        found, mine = run(llm, given, params(100))
    assert len(read) > len(set(read)), "no request was preempted"
    same(mine, reports)
    assert found == tokens


def test_a_window_at_the_end_of_what_is_read_again_would_be_seen(monkeypatch):
    """The mutation that the test above is for."""
    given = prompts(150, 90, 120, 200, seed=3)
    tokens, _ = want("llama", given, LEAN, count=100)
    stack, llm, _ = preempting(LEAN, 14 * 32)
    plain = Requests.update

    def update(self, scheduled):
        plain(self, scheduled)
        for name, count in scheduled.num_scheduled_tokens.items():
            if self._known[name].computed == 0:
                self._known[name].ids, self._known[name].tokens = None, count

    monkeypatch.setattr(Requests, "update", update)
    with stack:
        found, _ = run(llm, given, params(100))
    assert found != tokens


def test_one_entry_too_few_or_too_many_would_be_seen(monkeypatch):
    given = prompts(150, 90, seed=4)
    tokens, _ = want("llama", given, STAGED, count=20)
    plain = Requests.lost
    for change in (-1, 1):
        with monkeypatch.context() as context, engine("llama", STAGED) as llm:
            context.setattr(Requests, "lost", lambda self, some, by=change: (plain(self, some) + by).clamp(min=0))
            assert run(llm, given, params(20))[0] != tokens


def test_aborted_requests_leave_no_trace():
    given = prompts(150, 90, 120, seed=6)
    tokens, _ = want("llama", given, LEAN)
    with engine("llama", LEAN) as llm:
        core = llm.llm_engine
        for name, ids in enumerate(given):
            core.add_request(f"gone-{name}", {"prompt_token_ids": ids}, params(50))
        for _ in range(3):
            core.step()
        core.abort_request([f"gone-{name}" for name in range(3)])
        while core.has_unfinished_requests():
            core.step()
        assert run(llm, given, params())[0] == tokens
        run(llm, prompts(5), params(1))
        assert len(pruning(llm).requests._known) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    given = prompts(150, 90, 60, seed=7)
    with engine("llama", LEAN, dtype=dtype) as llm:
        found, reports = run(llm, given, params())
    with torch.no_grad():
        _, wanted = want("llama", given, LEAN)
    for mine, theirs in zip(reports, wanted):
        assert mine.kv_tokens == theirs.kv_tokens == (24,) * 6
        assert len(mine.rows[0].kept_positions) == 24
    kept = [[{*report.rows[0].kept_positions} for report in some] for some in (reports, wanted)]
    assert sum(len(mine & theirs) for mine, theirs in zip(*kept)) >= 0.8 * 24 * 3
    assert all(len(own) == 6 for own in found)


def test_compiled_decode(monkeypatch):
    """The decoder as vLLM compiles it, without the compiler's back end, which takes minutes."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    given = prompts(150, 90, 15, seed=8)
    tokens, reports = want("llama", given, LEAN)
    with engine("llama", LEAN, enforce_eager=False) as llm:
        found, mine = run(llm, given, params())
        assert not model_of(llm).model.do_not_compile
    same(mine, reports)
    assert found == tokens
