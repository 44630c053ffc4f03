"""Any mixture of prompts, settings and answers, in an engine with few seats and little memory."""

import pytest
from engines import LEAN, STAGED, engine, params, prompts, run, want
from hypothesis import given, settings
from hypothesis import strategies as st

ENTRY = 6 * 2 * 2 * 32 * 4
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 250),  # tokens
        st.integers(1, 40),  # of the answer
        st.sampled_from([None, 12, 40, 0.5]),  # select_tokens
        st.booleans(),  # a question
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module", params=["tokens", "tokens_and_cache"])
def small(request):
    """An engine with three seats, and memory for one request of the greatest length and a little more."""
    config, blocks = (LEAN, 7) if request.param == "tokens_and_cache" else (STAGED, 13)
    how = {"max_model_len": 320, "max_num_batched_tokens": 320, "max_num_seqs": 3, "max_new_tokens": 40}
    with engine("qwen3", config, kv_cache_memory_bytes=blocks * 32 * ENTRY, **how) as llm:
        yield llm, config


@settings(max_examples=12)
@given(REQUESTS, st.integers(0, 99))
def test_each_request_as_if_it_were_alone(small, requests, seed):
    llm, config = small
    read = prompts(*(tokens for tokens, *_ in requests), seed=seed)
    sampling, wanted = [], []
    for ids, (tokens, count, budget, asks) in zip(read, requests):
        extra = {} if budget is None else {"flexasl_select_tokens": budget}
        question = (max(0, tokens - 12), max(1, tokens - 4)) if asks else None
        extra |= {"flexasl_question": question} if question else {}
        sampling.append(params(count, **extra))
        own = config if budget is None else config.replace(select_tokens=budget)
        (answer,), (report,) = want("qwen3", [ids], own, count=count, **({"question": question} if question else {}))
        wanted.append((answer, report.rows[0].selections, report.rows[0].kept_positions, report.kv_tokens))
    tokens, reports = run(llm, read, sampling)
    for answer, report, expected in zip(tokens, reports, wanted):
        (row,) = report.rows
        assert (answer, row.selections, row.kept_positions, report.kv_tokens) == expected
