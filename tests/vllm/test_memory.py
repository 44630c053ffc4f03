"""Blocks that requests hold, and prompts that would not fit whole."""

import pytest
from engines import LEAN, STAGED, engine, params, prompts, run, want

from flexasl.integrations.vllm.memory import PrunedManager, PrunedSpec

BLOCK = 32
ENTRY = 6 * 2 * 2 * 32 * 4


def managers(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers


def test_blocks_as_computed():
    given = prompts(150, 90, 10, seed=1)
    with engine("llama", LEAN) as llm:
        core, (manager,) = llm.llm_engine, managers(llm)
        assert isinstance(manager, PrunedManager) and isinstance(manager.kv_cache_spec, PrunedSpec)
        for name, ids in enumerate(given):
            core.add_request(str(name), {"prompt_token_ids": ids}, params(60))
        for step in range(1, 50):
            core.step()
            held = {name.split("-")[0]: len(blocks) for name, blocks in manager.req_to_blocks.items()}
            # The last token has no entry yet.
            assert held == {str(at): -(-(min(24, len(ids)) + step - 1) // BLOCK) for at, ids in enumerate(given)}
        core.abort_request(["0", "1", "2"])
        core.step()
        assert not manager.req_to_blocks and not manager._prompts


def test_without_a_limit_to_entries_memory_stays():
    with engine("llama", STAGED) as llm:
        core, (manager,) = llm.llm_engine, managers(llm)
        assert not isinstance(manager, PrunedManager)
        core.add_request("0", {"prompt_token_ids": prompts(150)[0]}, params(4))
        core.step()
        assert [len(blocks) for blocks in manager.req_to_blocks.values()] == [5]
        core.abort_request(["0"])
        core.step()


def test_a_prompt_that_would_not_fit_whole():
    given = prompts(600, 900, seed=2)
    tokens, reports = want("llama", given, LEAN, count=16)
    # Block 0 is vLLM's own; two requests of 24 + 16 entries take two blocks each.
    with engine("llama", LEAN, kv_cache_memory_bytes=5 * BLOCK * ENTRY, max_new_tokens=16) as llm:
        found, mine = run(llm, given, params(16))
    assert found == tokens
    assert [report.kv_tokens for report in mine] == [report.kv_tokens for report in reports]


def test_without_a_limit_to_answers_a_whole_request_must_fit():
    with pytest.raises(ValueError, match="max seq len"), engine("llama", LEAN, kv_cache_memory_bytes=5 * BLOCK * ENTRY):
        pass
