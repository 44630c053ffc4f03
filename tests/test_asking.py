"""Prompts that are ranked by the queries of their question."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    GREEDY,
    GROUPS,
    HEADS,
    SMALL,
    STAGED,
    counting,
    held_columns,
    left_padded,
    prefills,
    prompts,
    recompute,
    selected,
    tiny,
)
from models import (
    RULES as BOTH_RULES,
)
from placing import here
from tiny_chat import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import flexasl
from flexasl import ASLConfig, FlexASLAttention, FlexASLError, Report, embedded
from flexasl.asking import MOST_QUERIES, SHARE, Asked, spans
from flexasl.compiling import with_fused_rows
from flexasl.integrations.questions import asking
from flexasl.ops import reference
from flexasl.policies import ASL
from flexasl.prefill import Prefill
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids, prose

DIM, CLOSE = 8, {"rtol": 0, "atol": 1e-4}
LONG = "Give the name alone, in one short sentence. Do not add any explanation. Never invent facts."


@pytest.fixture(scope="module")
def chat():
    """A random model for the tiny tokenizer, and the tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1000, num_key_value_heads=2, max_position_embeddings=2048, **shape)
    return LlamaForCausalLM(config).eval().requires_grad_(False), tiny_tokenizer()


def chat_ids(tokenizer, *texts):
    return left_padded([torch.tensor(prompt_ids(tokenizer, text)) for text in texts])


def expected(question, length, budget, window, contrast=False):
    """Positions that must be kept: the window; then, up to the share, the question, then what stands behind it, where
    it has been seen to be no document."""
    behind = [at for at in range(length) if at > question[-1] and at not in question]
    other_behind = len(behind)
    order = [*reversed(question)]
    if contrast and question[0] > 0 and other_behind <= min(budget, length // 3):
        order += [at for at in range(4) if at not in question]
    order += [at for at in reversed(behind) if at not in order] if other_behind <= min(budget, length // 3) else []
    order = [at for at in order if at < length - window]
    return {*order[: min(int(SHARE * budget), budget - window)], *range(max(0, length - window), length)}


# ---------------------------------------------------------------- which tokens


@settings(max_examples=200)
@given(
    length=st.integers(1, 80),
    places=st.sets(st.integers(0, 79), min_size=1, max_size=30),
    window=st.integers(1, 12),
    more=st.integers(1, 60),
)
def test_the_question_and_its_tail_are_kept_up_to_their_share(length, places, window, more):
    question, budget = sorted({place % length for place in places}), window + more
    asked = Asked(question, length, budget, window)
    kept = asked.kept(budget)
    assert {*kept, *range(max(0, length - window), length)} == expected(question, length, budget, window)
    assert len(kept) <= SHARE * budget and len(kept) + window <= budget
    assert set(asked.ranking) <= set(question)
    for at in asked.ranking:
        assert sum(other not in question for other in range(at, length)) <= min(budget, length // 3)
    for controls, ranking in (asked.left(length - 1), asked.left(budget)):
        assert not controls and set(ranking) <= {*kept, *range(length - window, length)} & set(asked.ranking)


@given(
    length=st.integers(1, 120),
    first=st.integers(0, 119),
    count=st.integers(1, 12),
    window=st.integers(1, 8),
    more=st.integers(1, 60),
)
def test_with_contrast_the_text_before_the_question_and_the_first_tokens_stay_after_it(
    length, first, count, window, more
):
    first, budget = first % length, window + more
    question = list(range(first, min(first + count, length)))
    asked, plain = Asked(question, length, budget, window, contrast=True), Asked(question, length, budget, window)
    assert asked.ranking == plain.ranking and plain.controls == []
    assert asked.controls == (list(range(max(0, first - 32), first)) if asked.ranking else [])
    kept, tail = asked.kept(budget), plain.kept(budget)
    most = max(0, min(budget // 2, budget - window))
    assert len(kept) <= most
    firsts = [at for at in range(4) if first and asked.ranking and at < length - window]
    wanted = [at for at in reversed(question) if at < length - window]
    wanted += [at for at in firsts if at not in wanted]
    assert kept[: len(wanted)] == wanted[:most] and set(tail) <= {*kept, *tail[most - len(firsts) :]}
    controls, ranking = asked.left(length - 1)
    sure = {*asked.kept(budget, controls=True), *range(length - window, length)}
    assert set(ranking) == set(asked.ranking) & sure
    assert controls == ([at for at in asked.controls if at in sure] if ranking and length - 1 > budget else [])
    assert asked.left(length) == (asked.controls, asked.ranking)


def test_the_last_tokens_of_a_very_long_question_rank():
    asked = Asked(range(2000), 2000, 256, 32)
    assert list(asked.ranking) == list(range(2000 - MOST_QUERIES, 2000))
    assert len(asked.kept(256)) == 128 and max(asked.kept(256)) == 2000 - 32 - 1


def test_earlier_turns_have_been_seen():
    assert Asked([0, 1], 30, 40, 4).ranking == []
    assert Asked([0, 1], 30, 40, 4, past=100).ranking == [0, 1]


def test_positions_in_words():
    assert spans([1990, 1991, 1992]) == "tokens 1,990 to 1,992"
    assert spans([3, 5, 6]) == "tokens 3 and 5 to 6" and spans([7]) == "token 7"


# ---------------------------------------------------------------- scores


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    some=st.booleans(),
    padding=st.sampled_from([0, 3]),
    contrast=st.booleans(),
)
def test_scores_are_those_of_the_questions_queries(lengths, seed, some, padding, contrast):
    generator = torch.Generator().manual_seed(seed)
    config = ASLConfig(select_tokens=12, window=3, kernel_size=3, contrast=contrast)
    rule, tokens, seen = config.resolve(6), max(lengths) + padding, {}
    question = []
    for row, length in enumerate(lengths):
        start = max(0, length - 1 - int(torch.randint(1, 9, (1,), generator=generator)))
        positions = torch.arange(start, min(length, start + 4)) + tokens - length
        question.append(None if some and row % 2 else positions)
    prefill = Prefill(
        ASL(), rule, 6, lengths, tokens=tokens, question=question, observer=seen.__setitem__, device=here()
    )
    total = sum(lengths)
    query, key = (torch.randn(1, heads, total, DIM, generator=generator) for heads in (HEADS, GROUPS))
    for layer in range(6):
        if not prefill.needs(layer):
            continue
        rows, seen[layer] = prefill.rows, None
        prefill.observe(layer, query[:, :, rows.queries(3)], key, FlexASLAttention())
        for row, (start, length) in enumerate(zip(rows.starts, rows.lengths)):
            if length <= 3:
                continue
            places = None if rows.scoring_tokens is None else rows.scoring_tokens[row]
            if question[row] is not None and length == lengths[row] and prefill.questions.rows[row].ranking:
                first = question[row].tolist()[0]
                controls = range(max(tokens - length, first - 32), first if contrast else 0)
                assert (places + tokens - length).tolist() == [*controls, *question[row].tolist()]
                assert rows.controls[row] == len(controls)
            keys = key[:, :, start : start + length]
            queries = query[:, :, start + (torch.arange(length - 3, length) if places is None else places)]
            at = None if places is None else places[None]
            how = {"query_at": at, "power": rule.power, "controls": rows.controls[row]}
            want = reference.window_scores(queries, keys, 3, rule.pooling, **how)[0, :, : length - 3]
            torch.testing.assert_close(seen[layer][row, :, 3 - length :].double(), want, rtol=1e-5, atol=1e-5)
        kept = prefill.advance()
        if kept is not None:
            query, key = query[:, :, kept], key[:, :, kept]
    for row, made in prefill.selections.items():
        must = {int(at) for at in (question[row] - (tokens - lengths[row]))} if question[row] is not None else set()
        positions = set(prefill.kept_positions(row).tolist())
        assert len(positions) == made[-1].count
        if must:
            assert expected(sorted(must), lengths[row], 12, 3, contrast=contrast) <= positions


# ---------------------------------------------------------------- models


configs = st.builds(
    lambda rule, kv, mask: rule.replace(**kv, propagate="mask" if mask and not kv else "gather"),
    st.sampled_from([SMALL, STAGED, STAGED.replace(stages="0.8@1+0.5@2")]),
    st.sampled_from([{}, {}, {"kv_budget": 20}, {"kv_top_p": 0.6}]),
    st.booleans(),
)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(10, 90), min_size=1, max_size=3),
    config=configs,
    behind=st.integers(1, 20),
    wide=st.integers(1, 15),
    skip=st.sampled_from([None, 0, 1]),
    policy=st.sampled_from(["asl", "asl", "fixed_layer", "asl_two_pass", "gemfilter", "pyramid_infer", "snapkv"]),
)
@torch.no_grad()
def test_a_row_is_alone_and_keeps_its_question(lengths, config, behind, wide, skip, policy):
    if policy != "asl":
        config = counting(policy, config.replace(propagate="gather"))
    model, rows = tiny(dtype=torch.float64), prompts(*lengths)
    question = [(max(0, length - behind - wide), length - min(behind, length - 1)) for length in lengths]
    question = [None if row == skip else span for row, span in enumerate(question)]
    batch = left_padded(rows)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with flexasl.patch(model, config, policy, question=question) as patch:
        out = model(**batch, use_cache=True)
        together, layers = patch.report.rows, out.past_key_values.layers
        for row, ids in enumerate(rows):
            patch.question = [question[row]]
            alone = model(ids[None], use_cache=True)
            told = patch.report.rows[0]
            assert told.kept_positions == together[row].kept_positions
            assert (told.selections, told.ranked_by) == (together[row].selections, together[row].ranked_by)
            torch.testing.assert_close(out.logits[row, -1], alone.logits[0, -1], **CLOSE)
            for mine, single in zip(layers, alone.past_key_values.layers):
                for head in range(GROUPS):
                    held = _held(mine, row, head) - (batch["input_ids"].shape[1] - len(ids))
                    assert torch.equal(held, _held(single, 0, head))
            rule = patch.config
            if question[row] is not None and told.pruned:
                budget = rule.token_budget(len(ids))
                must = expected([*range(*question[row])], len(ids), budget, rule.window, rule.contrast)
                assert must <= set(told.kept_positions)


def _held(layer, row, head):
    positions = layer.positions[row] if layer.positions.dim() == 2 else layer.positions[row, head]
    if layer.valid is None:
        return positions
    return positions[layer.valid[row] if layer.valid.dim() == 2 else layer.valid[row, head]]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(26, 90), min_size=1, max_size=3),
    first=st.integers(0, 90),
    wide=st.integers(1, 40),
    config=configs.filter(lambda config: not config.compresses_cache),
    power=st.sampled_from([None, 1, 2]),
    select_tokens=st.sampled_from([12, 24, 25, 0.3]),
)
@torch.no_grad()
def test_masked_equals_gathered(lengths, first, wide, config, power, select_tokens):
    """Also where more tokens ask than are sure to stay after the first selection."""
    model, batch = tiny(dtype=torch.float64), left_padded(prompts(*lengths))
    question = [(first % length, min(length, first % length + wide)) for length in lengths]
    config, outs = config.replace(score_power=power, select_tokens=select_tokens), []
    for propagate in ("gather", "mask"):
        with flexasl.patch(model, config.replace(propagate=propagate), question=question) as patch:
            outs.append((model(**batch), patch.report.rows))
    (one, mine), (other, theirs) = outs
    torch.testing.assert_close(one.logits[:, -1], other.logits[:, -1], **CLOSE)
    for row, its in zip(mine, theirs, strict=True):
        assert (row.kept_positions, row.selections, row.ranked_by) == (
            its.kept_positions,
            its.selections,
            its.ranked_by,
        )
        assert row.reason == its.reason


@pytest.mark.parametrize("rule", BOTH_RULES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kv", [{}, {"kv_budget": 20}, {"kv_top_p": 0.6}], ids=str)
def test_decode_equals_recompute(family, kv, rule):
    model, ids = tiny(family), prompts(80)[0][None]
    with flexasl.patch(model, BOTH_RULES[rule].replace(**kv), question=(60, 70)) as patch, prefills() as read:
        out = model.generate(ids, max_new_tokens=6, output_logits=True, **GREEDY)
        row = patch.report.rows[0]
    assert row.ranked_by == "tokens 60 to 69" and {*range(60, 70)} <= set(row.kept_positions)
    layers = out.past_key_values.layers
    if any(layer.valid is not None for layer in layers):
        columns = [held_columns(layer) for layer in layers]
    else:
        columns = [layer.positions for layer in layers]
    kept, before = torch.tensor(row.kept_positions), selected(read[0], 0)[:-1]
    want = recompute(model, out.sequences, 80, columns, row.selected_layer, kept, before)
    torch.testing.assert_close(torch.stack(out.logits, 1), want[:, 79:-1], rtol=1e-3, atol=1e-3)


def test_nothing_given_changes_nothing():
    model, batch = tiny(), left_padded(prompts(90, 40))
    with flexasl.patch(model, SMALL) as patch:
        want = model(**batch).logits
        rows = patch.report.rows
    with flexasl.patch(model, SMALL, question=[None, None]) as patch:
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=0, equal_nan=True)
    assert patch.report.rows == rows and rows[0].ranked_by == "the last 8 tokens"


@pytest.mark.parametrize("later_turns", ["keep", "prune"])
def test_a_later_turn_has_a_question_of_its_own(later_turns):
    model, (first, turn) = tiny(), prompts(60, 50)
    with flexasl.patch(model, SMALL.replace(later_turns=later_turns), question=(50, 55)) as patch:
        cache = model(first[None]).past_key_values
        before = patch.report
        patch.question = (2, 7)
        model(turn[None], past_key_values=cache)
        after = patch.report.rows[0]
    assert before.rows[0].ranked_by == "tokens 50 to 54"
    if later_turns == "keep":
        assert patch.report is before
        return
    # Behind it stand 43 tokens of the turn, more than the budget; a shorter tail has been seen.
    assert after.ranked_by.startswith("the last 8 tokens") and {*range(2, 7)} <= set(after.kept_positions)
    with flexasl.patch(model, SMALL.replace(later_turns="prune"), question=(50, 55)) as patch:
        cache = model(first[None]).past_key_values
        patch.question = (30, 34)
        model(turn[None], past_key_values=cache)
    assert patch.report.rows[0].ranked_by == "tokens 30 to 33"
    assert {*range(30, 34)} <= set(patch.report.rows[0].kept_positions)


def test_a_policys_own_queries_stay():
    class Own(ASL):
        name = "own"

        def scoring_tokens(self, rows, config):
            return [torch.arange(3) for _ in rows.lengths]

    model, ids = tiny(), prompts(80)[0][None]
    with flexasl.patch(model, SMALL, Own(), question=(60, 70)) as patch:
        model(ids)
    assert patch.report.rows[0].ranked_by == "tokens that policy 'own' names"
    assert {*range(60, 70)} <= set(patch.report.rows[0].kept_positions)


# ---------------------------------------------------------------- patch and generate


def test_the_tokenizer_finds_the_question(chat):
    model, tokenizer = chat
    asked = "Who has left the house?"
    texts = [
        f"{prose(300, tokenizer)}\n\n{asked} {LONG}",
        f"{prose(200, tokenizer, seed=2)}",
        f"{asked}\n\n{prose(250, tokenizer)}",
    ]
    config, batch = ASLConfig(select_tokens=80, window=4), chat_ids(tokenizer, *texts)
    with flexasl.patch(model, config, tokenizer=tokenizer) as patch:
        model.generate(**batch, max_new_tokens=2, **GREEDY)
        rows = patch.report.rows
        one = model.generate(
            **chat_ids(tokenizer, texts[0]), max_new_tokens=2, question="Never invent facts.", **GREEDY
        )
        given = patch.report.rows[0]
        model.generate(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), max_new_tokens=2, **GREEDY)
        embedded_rows = patch.report.rows
    assert one is not None
    assert rows[0].ranked_by == asked
    assert asked in tokenizer.decode([batch["input_ids"][0, at] for at in rows[0].kept_positions])
    assert rows[1].ranked_by == "the last 4 tokens; no question was found"
    assert rows[2].ranked_by == "the last 4 tokens; too much text follows the question"
    start = batch["input_ids"].shape[1] - rows[2].prompt_tokens
    assert asked in tokenizer.decode([batch["input_ids"][2, start + at] for at in rows[2].kept_positions])
    assert given.ranked_by == "Never invent facts."
    assert {row.ranked_by for row in embedded_rows} == {"the last 4 tokens; the prompt's text is not known"}


def test_a_question_for_each_row_and_beam(chat):
    model, tokenizer = chat
    texts = [f"{prose(150, tokenizer)}\n\nWho is it? {LONG}", f"{prose(180, tokenizer)}\n\nWhere is it? {LONG}"]
    batch, config = chat_ids(tokenizer, *texts), ASLConfig(select_tokens=80, window=4)
    question = [["Who is it?", "Never invent facts."], (150, 152)]
    with flexasl.patch(model, config, tokenizer=tokenizer) as patch:
        model.generate(**batch, max_new_tokens=3, num_beams=2, question=question, **GREEDY)
        rows = [row.ranked_by for row in patch.report.rows]
        assert rows == ["Who is it? … Never invent facts."] * 2 + ["tokens 150 to 151"] * 2
        model.generate(**batch, max_new_tokens=2, **GREEDY)
        assert [row.ranked_by for row in patch.report.rows] == ["Who is it?", "Where is it?"]
        patch.question = question
        model.generate(**batch, max_new_tokens=3, num_beams=2, num_return_sequences=2, **GREEDY)
        assert [row.ranked_by for row in patch.report.rows] == rows
    assert not hasattr(model, "flexasl_patch")


@pytest.mark.cpu("a device mode is of one thread")
def test_a_call_in_another_thread_has_its_own_question():
    model, ids, seen = tiny(), prompts(80)[0][None], {}
    with flexasl.patch(model, SMALL, question=(60, 70)) as patch, asking(patch, (50, 55)):
        model(ids)
        seen["here"] = patch.report.rows[0].ranked_by

        def other():
            model(ids)
            seen["there"] = patch.report.rows[0].ranked_by

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == {"here": "the last 8 tokens; too much text follows the question", "there": "tokens 60 to 69"}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("Who?", "question='Who\\?' is a text, and there is no tokenizer to find it in the prompt; give flexasl.patch"),
        (["Who?", None], "question='Who\\?' is a text, and there is no tokenizer"),
        ((1, 2, 3), "holds \\(1, 2, 3\\); give a text of the prompt, a span \\(start, stop\\) of its positions"),
        ([1, 2], "holds 1; give a text of the prompt, a span"),
        ((1.0, 2), "holds \\(1.0, 2\\); give a text"),
        (7, "question=7 holds 7; give a text"),
    ],
)
def test_what_is_no_question_is_refused_at_once(question, message):
    model = tiny()
    with pytest.raises(FlexASLError, match=message):
        flexasl.patch(model, SMALL, question=question)
    assert not hasattr(model, "flexasl_patch")
    with flexasl.patch(model, SMALL, question=(1, 2)) as patch:
        with pytest.raises(FlexASLError, match=message):
            patch.question = question
        with pytest.raises(FlexASLError, match=message):
            model.generate(prompts(20)[0][None], max_new_tokens=1, question=question, **GREEDY)
        assert patch.question == (1, 2)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ((5, 5), "question: stop=5 is too small; give from 6 to 80"),
        ((80, 90), "question: start=80 is too large; give from 0 to 79"),
        ((70, 90), "question: stop=90 is too large"),
        ([(1, 2), (1, 2)], "question has 2 rows where the batch has 1; give one for each, or one for all"),
    ],
)
def test_spans_that_a_prompt_does_not_have(question, message):
    model, ids = tiny(), prompts(80)[0][None]
    with flexasl.patch(model, SMALL, question=question) as patch:
        with pytest.raises(FlexASLError, match=message):
            model(ids)
        patch.question = None
        model(ids)
    assert patch.report.rows[0].ranked_by == "the last 8 tokens"


def test_texts_that_a_prompt_does_not_have(chat):
    model, tokenizer = chat
    with flexasl.patch(model, tokenizer=tokenizer, question="Who?") as patch:
        with pytest.raises(FlexASLError, match=r"question='Who\?' is not in the prompt"):
            model(**chat_ids(tokenizer, "What?"))
        with pytest.raises(FlexASLError, match=r"is a text, and the prompt is given as embeddings; give a span"):
            model(inputs_embeds=torch.zeros(1, 5, 64))
        patch.question = None
        model(**chat_ids(tokenizer, "What?"))
    with pytest.raises(FlexASLError, match="tokenizer=3 is an int; give the model's tokenizer"):
        flexasl.patch(model, tokenizer=3)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([torch.tensor([3])] * 2, "question has 2 rows where the batch has 1"),
        ([torch.tensor([99])], "question of row 0: position=99 is too large; give from 0 to 39"),
        ([torch.tensor([5, 5])], "question of row 0: positions do not ascend; give each once, in order"),
        ([[5, 5]], "question of row 0: positions do not ascend; give each once, in order"),
        ([5], "question of row 0: positions are 5; give whole numbers in order"),
        (["ask"], "question of row 0: positions are 'ask'; give whole numbers in order"),
    ],
)
def test_positions_that_a_prefill_does_not_take(question, message):
    with pytest.raises(FlexASLError, match=message):
        Prefill(ASL(), SMALL.resolve(6), 6, [40], question=question)


def test_reports_tell_and_old_ones_are_read():
    model, ids = tiny(), prompts(80)[0][None]
    with flexasl.patch(model, SMALL, question=(60, 70)) as patch:
        model(ids)
    report = patch.report
    assert "\n  ranked by: tokens 60 to 69\n" in str(report)
    data = report.to_dict()
    assert Report.from_dict(data) == report
    del data["rows"][0]["ranked_by"]
    old = Report.from_dict(data)
    assert old.rows[0].ranked_by == "" and "ranked by" not in str(old)
    assert "ranked by: tokens 60 to 69" in report.plot().get_suptitle()


@pytest.mark.real("compiles")
@torch.no_grad()
def test_questions_of_any_length_make_no_graphs(monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return with_fused_rows(graph).forward

    monkeypatch.setattr("flexasl.compiling.inductor", backend)
    model = copy.deepcopy(tiny())
    torch._dynamo.reset()
    with flexasl.patch(model, SMALL, compile=True) as patch, flexasl.patch(tiny(), SMALL) as plain:
        for count, question in (
            (70, None),
            (81, (60, 70)),
            (90, (70, 73)),
            (64, (0, 64)),
            (75, (1, 3)),
            (101, (90, 97)),
        ):
            ids = prompts(count)[0][None]
            patch.question = plain.question = question
            mine, want = model(ids).logits[:, -1], tiny()(ids).logits[:, -1]
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)
            assert patch.report.rows[0].kept_positions == plain.report.rows[0].kept_positions
        assert len(made) <= 2


# ---------------------------------------------------------------- a real model

RULES = (
    " Answer in one short sentence. Do not add any explanation. Write plain text without markdown. Do not repeat the "
    "text above. If you are not sure, say so. Keep a polite and neutral tone. Write numbers as digits. Never invent "
    "facts that the text does not state."
)


@pytest.mark.slow
@torch.no_grad()
def test_rules_behind_the_question_lose_no_needle():
    model, tokenizer = embedded.load()
    held = {True: 0, False: 0}
    for seed in (1, 2, 3):
        fact = magic_number(seed)
        text = needle_prompt(tokenizer, 1500, 0.4, fact.needle, fact.question, seed) + RULES
        ids = prompt_ids(tokenizer, text)
        said = tokenizer(tokenizer.decode(ids), add_special_tokens=False, return_offsets_mapping=True)
        assert said["input_ids"] == ids
        first = tokenizer.decode(ids).index(fact.needle) + fact.needle.index(fact.answer)
        needle = {at for at, (a, b) in enumerate(said["offset_mapping"]) if b > first and a < first + 5}
        for with_question in held:
            with flexasl.patch(
                model,
                ASLConfig(select_tokens=256, min_layer=14, max_layer=14, observe_layers=1, select_on="last"),
                tokenizer=tokenizer if with_question else None,
            ) as patch:
                model(torch.tensor([ids]))
            row = patch.report.rows[0]
            assert row.ranked_by == (fact.question if with_question else "the last 32 tokens")
            # By the answer's digits; the rest of its sentence is like the question.
            held[with_question] += needle <= set(row.kept_positions)
    assert (held[True], held[False]) == (3, 0)
