"""Two ranks with half of the heads each, in processes of their own, where the plug-in is found by its entry point."""

import pytest
from engines import LEAN, VARIANCE, engine, params, prompts, want

import flexasl


@pytest.mark.parametrize("config", [LEAN, VARIANCE], ids=["highest", "sums"])
def test_as_one_rank(config):
    given = prompts(150, 90, 30, seed=9)
    tokens, wanted = want("llama", given, config)
    with engine("llama", config, tensor_parallel_size=2) as llm:
        out = llm.generate([{"prompt_token_ids": ids} for ids in given], params(), use_tqdm=False)
        ranks = llm.collective_rpc("flexasl_reports")
    assert [list(one.outputs[0].token_ids) for one in out] == tokens
    assert len(ranks) == 2
    for reports in ranks:
        by_length = {told["rows"][0]["prompt_tokens"]: flexasl.Report.from_dict(told) for told in reports.values()}
        for ids, theirs in zip(given, wanted):
            assert by_length[len(ids)].rows[0].kept_positions == theirs.rows[0].kept_positions
            assert by_length[len(ids)].kv_tokens == theirs.kv_tokens
