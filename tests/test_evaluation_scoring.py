"""Scores, as the benchmarks define them."""

import pytest

from flexasl.tools.evaluation import scoring
from flexasl.tools.evaluation.tables import Estimate, Results, bootstrap, score_tables


@pytest.mark.parametrize(
    ("score", "answer", "references", "expected"),
    [
        ("match_all", "It is 12, then ABC.", ["12", "abc"], 1),
        ("match_all", "It is 12.", ["12", "abc", "13", "14"], 0.25),
        ("match_part", "in PARIS, I think", ["paris", "rome"], 1),
        ("match_part", "in Bonn", ["paris", "rome"], 0),
        ("first_number", "is 12345.", ["12345"], 1),
        ("first_number", "1 2345", ["12345"], 0),
        ("first_number", "123456", ["12345"], 0),
        ("first_number", "none", ["12345"], 0),
        ("one_word", 'it is "a-1".', ["a-1"], 1),
        ("one_word", "it is a-12", ["a-1"], 0),
        ("one_name", "Joey!", ["JOEY", "ROSS"], 1),
        ("one_name", "Ross", ["JOEY", "ROSS"], 0),
        ("last_integer", "the value: -7.", ["-7"], 1),
        ("last_integer", "7 or so", ["7"], 0),
        ("last_integer", "", ["7"], 0),
        ("first_value", "about 3.50", ["3.5"], 1),
        ("first_value", "12 and 13", ["13"], 0),
        ("leading_share", "[3, 5, 6]", ["3", "5", "7", "8"], 0.5),
        ("leading_share", "5, 3", ["3", "5"], 0),
        ("chosen_letter", "B. blue", ["blue", "B"], 1),
        ("chosen_letter", "A", ["blue", "B"], 0),
        ("chosen_letter", "the answer is: B, not A", ["blue", "B"], 1),
        ("chosen_letter", "the answer is blue", ["blue", "B"], 1),
        ("chosen_letter", "surely D", ["blue", "B"], 0),
        ("chosen_letter", "", ["blue", "B"], 0),
        ("chosen_function", "B", ["run", "B"], 1),
        ("chosen_function", "A or B.", ["run", "B"], 1),
        ("chosen_function", "B or A.", ["run", "B"], 0),
        ("chosen_function", "the answer is: `run`", ["run", "B"], 1),
        ("chosen_function", "run", ["run", "B"], 0),
        ("word_f1", "The big dog!", ["a dog", "cat"], 2 / 3),
        ("word_f1", "bird", ["a dog", "cat"], 0),
        ("character_f1", "红 楼。", ["红楼梦"], 0.8),
        ("rouge_l_sum", "the cat sat", ["the cat sat"], 1),
        ("rouge_l_sum", "a b\nc d", ["c d\na b"], 1),
        ("rouge_l_sum", "running", ["run"], 0),
    ],
)
def test_score(score: str, answer: str, references: list[str], expected: float) -> None:
    assert getattr(scoring, score)(answer, references) == pytest.approx(expected)


def test_bootstrap_is_a_confidence_interval() -> None:
    assert bootstrap([[1.0] * 5]) == Estimate(1, 1, 1)
    few, many = bootstrap([[0.0, 1.0] * 5]), bootstrap([[0.0, 1.0] * 500])
    assert few == bootstrap([[0.0, 1.0] * 5]) and few.mean == many.mean == 0.5
    assert many.low > 0.45 and many.high < 0.55
    assert few.low == pytest.approx(0.5 - 1.96 * (0.25 / 10) ** 0.5, abs=0.06)
    assert few.high == pytest.approx(0.5 + 1.96 * (0.25 / 10) ** 0.5, abs=0.06)


def test_bootstrap_weighs_tasks_alike() -> None:
    estimate = bootstrap([[1.0] * 30, [0.0] * 3])
    assert estimate == Estimate(0.5, 0.5, 0.5), "samples are drawn within a task, so nothing varies here"


def answered(task: str, setting: str, *scores: float, length: int = 1024) -> list[dict]:
    """Records of so many prompts."""
    about = {"policy": setting, "budget": None, "prompt_tokens": length, "selected_layer": None, "kv_share": 1.0}
    return [
        {"task": task, "length": length, "index": index, "setting": setting, "score": score, "counted_prefill": 1.0}
        | {"first_token_seconds": None, "selections": [], "lookup": [], "variance_ratio": [], "ranked_by": ""}
        | {"eval_layers": [], "tau": None}
        | about
        for index, score in enumerate(scores)
    ]


def test_what_is_beyond_the_model_is_left_out_of_means() -> None:
    passkey = answered("passkey", "full", 1.0, 0.0) + answered("passkey", "asl", 1.0, 1.0)
    lost = answered("vt", "full", 0.0, 0.5) + answered("vt", "asl", 0.0, 0.0)
    within, both, alone = Results(passkey), Results(passkey + lost), Results(lost)
    assert within.beyond() == {} and within.within_reach() is within
    assert both.beyond() == {("vt", 1024): 0.25}
    assert both.within_reach().records == within.records
    assert "Beyond" not in score_tables(within)
    table = score_tables(both)
    assert "`vt` at 1,024 tokens (0.25); left out of means" in table
    assert "| asl | 1.00 [1.00, 1.00] | 1.00 | 1.00 |" in table
    assert "| setting | vt, 1,024 tokens | passkey, 1,024 tokens |" in table
    assert "| full | 0.25 [0.00, 0.50] of 2 | 0.50 [0.00, 1.00] of 2 |" in table
    assert alone.within_reach() is alone and "(0.25); with nothing else to average" in score_tables(alone)


def test_a_length_is_beyond_the_model_by_itself() -> None:
    results = Results(answered("passkey", "full", 1.0) + answered("passkey", "full", 0.0, length=2048))
    assert results.beyond() == {("passkey", 2048): 0.0}
    assert results.within_reach().lengths == [1024]
