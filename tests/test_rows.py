"""Varlen rows against the same rows one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import here
from test_attention import check_blocks

from flexasl import FlexASLAttention, Scoring, Visibility, masks
from flexasl.attention_spec import AttentionSpec
from flexasl.kernels import choose_for_rows
from flexasl.rows import Rows
from flexasl.rows_attention import attend, rows_attention, scores

HEADS, GROUPS, DIM = 4, 2, 8
SCORING = Scoring(window=3, kernel_size=3)
lengths = st.lists(st.integers(1, 20), min_size=1, max_size=5) | st.just([7, 7, 7]) | st.just([5, 5, 2, 2, 2])
attentions = st.builds(
    FlexASLAttention,
    scale=st.sampled_from([None, 0.3]),
    sliding_window=st.sampled_from([None, 4]),
    softcap=st.sampled_from([None, 3.0]),
)


def states(total, seed=0, entries=None):
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, GROUPS, GROUPS) if entries is None else (GROUPS, GROUPS)
    return [torch.randn(1, count, total, DIM, generator=generator, dtype=torch.float64) for count in heads]


def some_columns(lengths, tokens, seed):
    """Ascending columns of each row, of which the last is the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens - 1, generator=generator)[: length - 1].sort().values for length in lengths]
    return torch.cat([torch.cat([row, torch.tensor([tokens - 1])]) for row in rows])


@settings(max_examples=60)
@given(
    lengths=lengths,
    attention=attentions,
    gaps=st.booleans(),
    masked=st.booleans(),
    sinks=st.booleans(),
    pack=st.booleans(),
)
def test_attention_and_scores_are_those_of_each_row(lengths, attention, gaps, masked, sinks, pack):
    packed = Rows.left_padded(lengths, max(lengths) + 2, here())
    if gaps:
        packed = Rows(lengths, some_columns(lengths, 40, 1), contiguous=False)
    if masked:
        stays = torch.arange(packed.total) % 3 != 1
        stays[packed.queries(3)] = True
        packed = packed.masked(stays)
    query, key, value = states(packed.total)
    extra = torch.randn(HEADS, dtype=torch.float64) if sinks else None
    out = attend(packed, attention, query, key, value, extra)
    last = query[:, :, packed.queries(3)]
    made, none = scores(packed, attention, last, key, SCORING, range(len(lengths)), extra, pack=pack)
    assert none is None and made.shape == (len(lengths), GROUPS, max(0, max(lengths) - 3))
    same, mass = scores(packed, attention, last, key, SCORING, range(len(lengths)), extra, mass=True, pack=pack)
    assert torch.equal(same, made) and mass.shape == (len(lengths), GROUPS, max(lengths))
    for row, (start, length) in enumerate(zip(packed.starts, lengths, strict=True)):
        own = slice(start, start + length)
        at = packed.positions[None, own]
        stays = None if packed.kept is None else packed.kept[None, own]
        parts = [tensor[:, :, own] for tensor in (query, key, value)]
        want = attention(*parts, Visibility(at, at, stays), sinks=extra)
        torch.testing.assert_close(out[:, :, own], want)
        if length > 3:
            # Packed, those of the tokens that are left alone, as if the others had never been there.
            left = torch.ones(length, dtype=torch.bool) if stays is None or not pack else stays[0]
            marks = {"positions": at[:, left], "sinks": extra, "valid": None if pack else stays}
            want, whole = attention.scores(parts[0][:, :, -3:], parts[1][:, :, left], SCORING, **marks, mass=True)
            torch.testing.assert_close(made[row, :, made.shape[2] - want.shape[2] :], want[0])
            torch.testing.assert_close(mass[row, :, mass.shape[2] - whole.shape[2] :], whole[0])
        assert not made[row, :, : made.shape[2] - max(0, length - 3)].any()


@settings(max_examples=60)
@given(lengths=lengths, most=st.integers(1, 40), masked=st.booleans())
def test_groups_are_whole_rows_in_order_and_no_larger_than_they_must_be(lengths, most, masked):
    packed = Rows.left_padded(lengths, max(lengths) + 2, here())
    if masked:
        packed = packed.masked(torch.arange(packed.total) % 3 != 1)
    with pytest.MonkeyPatch.context() as context:
        context.setattr("flexasl.rows.GROUP", most)
        groups = packed.groups()
    assert [length for _, group in groups for length in group.lengths] == lengths
    at = torch.arange(packed.total)
    assert torch.equal(torch.cat([at[tokens] for tokens, _ in groups]), at)
    for tokens, group in groups:
        assert group.total <= most or len(group.lengths) == 1
        assert torch.equal(group.positions, packed.positions[tokens])
        assert torch.equal(group.kept, packed.kept[tokens]) if masked else group.kept is None
    assert all(one.total + other.lengths[0] > most for (_, one), (_, other) in itertools.pairwise(groups))


@settings(max_examples=40)
@given(
    lengths=lengths,
    attention=attentions,
    entries=st.integers(1, 9),
    by_head=st.booleans(),
    padded=st.booleans(),
    sinks=st.booleans(),
)
def test_a_later_turn_attends_to_its_cache_and_itself(lengths, attention, entries, by_head, padded, sinks):
    batch, past = len(lengths), 12
    packed = Rows.left_padded(lengths, max(lengths), here())
    query, key, value = states(packed.total)
    generator = torch.Generator().manual_seed(3)
    shape = (batch, GROUPS, entries) if by_head else (batch, entries)
    columns = torch.rand(*shape[:-1], past, generator=generator).argsort(-1)[..., :entries].sort(-1).values
    valid = torch.rand(shape, generator=generator) < 0.7 if padded else None
    held = [torch.randn(batch, GROUPS, entries, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
    extra = torch.randn(HEADS, dtype=torch.float64) if sinks else None
    turn = packed.after(columns, valid, past)
    joined = [turn.join(kept, new) for kept, new in zip(held, (key, value), strict=True)]
    out = attend(turn, attention, query, *joined, extra)
    last = query[:, :, packed.queries(3)]
    made, mass = scores(turn, attention, last, joined[0], SCORING, range(batch), extra, mass=True)
    assert torch.equal(scores(turn, attention, last, joined[0], SCORING, range(batch), extra)[0], made)
    for row, (start, length) in enumerate(zip(packed.starts, lengths, strict=True)):
        own = slice(start, start + length)
        new = packed.positions[None, own] + past
        keys, values = (
            torch.cat([kept[row : row + 1], part[:, :, own]], 2) for kept, part in zip(held, (key, value), strict=True)
        )
        for group in range(GROUPS):
            heads, place = slice(2 * group, 2 * group + 2), (row, group) if by_head else (row,)
            at = torch.cat([columns[place][None], new], 1)
            seen = None
            if padded:
                seen = torch.cat([valid[place][None], torch.ones_like(new, dtype=torch.bool)], 1)
            mine = None if extra is None else extra[heads]
            parts = query[:, heads, own], keys[:, group : group + 1], values[:, group : group + 1]
            want = attention(*parts, Visibility(new, at, seen), sinks=mine)
            torch.testing.assert_close(out[:, heads, own], want)
            if length > 3:
                real = slice(None) if seen is None else seen[0]  # padding is nobody's neighbour
                settings = {"positions": at[:, real], "sinks": mine}
                want, whole = attention.scores(
                    parts[0][:, :, -3:], parts[1][:, :, real], SCORING, **settings, mass=True
                )
                torch.testing.assert_close(made[row, group, made.shape[2] - length + 3 :], want[0, 0, 3 - length :])
                torch.testing.assert_close(mass[row, group, mass.shape[2] - length :], whole[0, 0, -length:])


@pytest.mark.real("looks into the dispatcher")
@pytest.mark.parametrize("masked", [False, True])
def test_the_node_of_a_graph_is_a_sound_op(masked):
    packed = Rows.left_padded([6, 4, 4], 6, here())
    stays = torch.arange(14) % 3 != 1 if masked else None
    query, key, value = (tensor.float() for tensor in states(14))
    arguments = (query, key, value, packed.layout, packed.positions, stays, None, "sliding_window=3")
    torch.library.opcheck(rows_attention, arguments)
    query, key, value = (tensor.requires_grad_() for tensor in (query, key, value))
    torch.library.opcheck(rows_attention, (query, key, value, *arguments[3:6], torch.randn(HEADS), arguments[7]))
    want = attend(packed.masked(stays), FlexASLAttention(sliding_window=3), query, key, value)
    torch.testing.assert_close(rows_attention(*arguments), want)


@pytest.mark.real("looks into the dispatcher")
@pytest.mark.parametrize("softcap, sunk", [(None, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_the_node_of_a_graph_has_the_gradients_of_attention(softcap, sunk, masked, few, monkeypatch):
    monkeypatch.setattr("flexasl.kernels.gradients.PAIRS", 1 if few else 2**22)
    lengths = [6, 4, 4]
    packed = Rows(lengths, some_columns(lengths, 12, 1), contiguous=False)
    if masked:
        packed = packed.masked(torch.arange(14) % 3 != 1)
    inputs = [tensor.requires_grad_() for tensor in states(14)]
    inputs += [torch.randn(HEADS, dtype=torch.float64, requires_grad=True)] if sunk else [None]
    *qkv, sinks = inputs
    attention = FlexASLAttention(sliding_window=5, softcap=softcap, kernel="eager")
    rows = (packed.layout, packed.positions, packed.kept, sinks)
    out = rows_attention(*qkv, *rows, attention.spec.text)
    want, way = attend(packed, attention, *qkv, sinks), torch.randn(1, HEADS, 14, DIM, dtype=torch.float64)
    wanted = [tensor for tensor in inputs if tensor is not None]
    for mine, its in zip(torch.autograd.grad(out, wanted, way), torch.autograd.grad(want, wanted, way), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


def each_alone(rows, sliding_window):
    """[1, 1, T, T] bool: who sees whom, row by row."""
    seen = torch.zeros(1, 1, rows.total, rows.total, dtype=torch.bool)
    for row in range(len(rows.lengths)):
        own = rows.of(row)
        at, kept = rows.positions[None, own], None if rows.kept is None else rows.kept[None, own]
        last = None if rows.last_seen is None else rows.last_seen[None, own]
        seen[:, :, own, own] = Visibility(at, at, kept, last_seen=last).dense(sliding_window)
    return seen


@settings(max_examples=60)
@given(
    lengths=lengths,
    window=st.none() | st.integers(1, 12),
    gaps=st.booleans(),
    masked=st.booleans(),
    ahead=st.integers(0, 5),
    block=st.sampled_from([2, 4, 16]),
)
def test_rows_of_one_sequence_do_not_see_each_other(lengths, window, gaps, masked, ahead, block):
    rows = Rows.left_padded(lengths, max(lengths) + 2, here())
    if gaps:
        rows = Rows(lengths, some_columns(lengths, 40, 1), contiguous=False)
    if masked:
        rows = rows.masked(torch.arange(rows.total) % 3 != 1)
    if ahead:
        rows.seeing(rows.positions + torch.arange(rows.total) % (ahead + 1), ahead)
    want = each_alone(rows, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "BLOCK", block)
        visible = rows.together()
        assert visible is rows.together()
        assert torch.equal(visible.dense(window), want)
        if rows.total > 1:
            check_blocks(visible.block_mask(window), want, block)


def after_a_past(lengths, entries, by_head=False, padded=False, seed=3, past=None):
    """Rows of these lengths behind cached entries, with gaps between them."""
    past, generator = past or 2 * entries, torch.Generator().manual_seed(seed)
    shape = (len(lengths), GROUPS, entries) if by_head else (len(lengths), entries)
    at = torch.rand(*shape[:-1], past, generator=generator).argsort(-1)[..., :entries].sort(-1).values
    valid = torch.rand(shape, generator=generator) < 0.7 if padded else None
    return Rows.left_padded(lengths, max(lengths), here()).after(at, valid, past)


@given(
    lengths=lengths,
    entries=st.integers(1, 9),
    by_head=st.booleans(),
    padded=st.booleans(),
    window=st.sampled_from([None, 5]),
    block=st.sampled_from([2, 4, 16]),
)
def test_rows_of_one_sequence_see_their_own_cached_entries_alone(lengths, entries, by_head, padded, window, block):
    rows = after_a_past(lengths, entries, by_head, padded)
    held, valid, past = rows.past
    want = torch.zeros(1, GROUPS if by_head else 1, rows.total, rows.total + len(lengths) * entries, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(rows.starts, lengths)):
        new = rows.positions[None, rows.of(row)] + past
        joined = [held[row : row + 1], new.expand(GROUPS, -1)[None] if by_head else new]
        at = torch.cat(joined, -1)
        seen = None if valid is None else torch.cat([valid[row : row + 1], torch.ones_like(joined[1], dtype=bool)], -1)
        first = start + row * entries
        want[:, :, rows.of(row), first : first + entries + length] = Visibility(new, at, seen).dense(window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "BLOCK", block)
        visible = rows.together()
        assert visible is rows.together() and torch.equal(visible.dense(window), want)
        assert torch.equal(visible.tile(slice(1, None), slice(2, None), window), want[:, :, 1:, 2:])
        if rows.total > 1:
            by_query_head = want.repeat_interleave(HEADS // want.shape[1], 1)
            check_blocks(visible.block_mask(window, HEADS), by_query_head, block)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_all_rows_at_once_after_cached_entries_are_each_of_them(kernel, by_head, window):
    rows, (query, key, value) = after_a_past([300, 61, 33], 40, by_head, True), states(394)
    held = torch.randn(2, 3, GROUPS, 40, DIM, dtype=torch.float64)
    query, key, value = (one.float() for one in (query, rows.join(held[0], key), rows.join(held[1], value)))
    want = attend(rows, FlexASLAttention(sliding_window=window, kernel="eager"), query, key, value)
    module, calls = FlexASLAttention(sliding_window=window, kernel=kernel), []
    if kernel == "flex":
        module.register_forward_pre_hook(lambda *given: calls.append(1))
        got = attend(rows, module, query, key, value)
        assert len(calls) == 1
    else:
        got = module(query, key, value, rows.together())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_sequence_are_those_of_its_rows():
    rows = Rows.left_padded([512, 256, 1024], 1024, here())
    made = rows.together().block_mask()
    # Diagonals of 4, 2 and 8 blocks, and what is before each.
    assert (made.kv_num_blocks.sum(), made.full_kv_num_blocks.sum()) == (14, 6 + 1 + 28)
    made = after_a_past([512, 256, 1024], 384).together().block_mask()
    # The same, and the 3 blocks that are cached of each row before its 4, 2 and 8 blocks of queries.
    assert (made.kv_num_blocks.sum(), made.full_kv_num_blocks.sum()) == (14, 35 + 3 * (4 + 2 + 8))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_flex_takes_all_rows_at_once(window, masked):
    rows, query, key, value = Rows.left_padded([100, 61, 33], 100, here()), *states(194)
    query, key, value = (tensor.float() for tensor in (query, key, value))
    rows = rows.masked(torch.arange(194) % 3 != 1) if masked else rows
    want = attend(rows, FlexASLAttention(sliding_window=window, kernel="eager"), query, key, value)
    calls, module = [], FlexASLAttention(sliding_window=window, kernel="flex")
    module.register_forward_pre_hook(lambda *given: calls.append(1))
    torch.testing.assert_close(attend(rows, module, query, key, value), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "flex", "sdpa", "eager"])
def test_how_rows_go_through_attention(kernel, cuda):
    def chosen(spec, lengths=3, varlen=False):
        return choose_for_rows(spec, cuda, lengths=lengths, varlen=lambda: varlen)

    spec = AttentionSpec(kernel=kernel)
    assert chosen(spec, lengths=1) == "batch"
    if kernel == "auto":
        assert chosen(spec, varlen=True) == "varlen"
    flexible = kernel == "flex" or (kernel == "auto" and cuda)
    specs = [spec, AttentionSpec(kernel=kernel, sliding_window=9)]
    specs += [] if kernel == "sdpa" else [AttentionSpec(kernel=kernel, softcap=3.0)]
    for one in specs:
        assert chosen(one) == ("flex" if flexible else "each")


def test_last_tokens_of_each_row():
    packed = Rows.left_padded([4, 2, 3], 6, here())
    assert packed.queries(3).tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and packed.queries(3) is packed.queries(3)
    assert packed.queries(1).tolist() == [3, 5, 8]


def test_rows_as_a_padded_batch_and_back():
    packed = Rows.left_padded([3, 5, 1], 6, here())
    tokens, real = packed.as_batch()
    assert tokens[real].tolist() == list(range(9)) and real.sum(1).tolist() == [3, 5, 1]
    assert packed.flat(6).tolist() == [3, 4, 5, 7, 8, 9, 10, 11, 17]
    assert packed.cu_seqlens.tolist() == [0, 3, 8, 9] and packed.cu_seqlens.dtype == torch.int32
    assert Rows.left_padded([4, 4], 4, here()).as_batch()[1] is None


@settings(max_examples=40)
@given(lengths=lengths, attention=attentions, seed=st.integers(0, 99), past=st.booleans(), sinks=st.booleans())
def test_any_tokens_of_a_row_can_score_the_others(lengths, attention, seed, past, sinks):
    rows, generator = (
        Rows.left_padded(lengths, max(lengths), here()),
        torch.Generator().manual_seed(seed),
    )
    query, key, _ = states(rows.total, seed)
    rows.scoring_tokens = [
        torch.randperm(length, generator=generator)[: 1 + seed % length].sort().values for length in lengths
    ]
    held, joined = 0, key
    if past:
        held = 5
        rows = rows.after(torch.arange(5).expand(len(lengths), -1), None, 5)
        before = torch.randn(len(lengths), GROUPS, 5, DIM, generator=generator, dtype=torch.float64)
        joined = rows.join(before, key)
    extra = torch.randn(HEADS, dtype=torch.float64) if sinks else None
    scoring_tokens = query[:, :, rows.queries(3)]
    made, mass = scores(rows, attention, scoring_tokens, joined, SCORING, range(len(lengths)), extra, mass=True)
    alone = scores(rows, attention, scoring_tokens, joined, SCORING, range(len(lengths)), extra)[0]
    assert torch.equal(alone, made)
    for row, length in enumerate(lengths):
        own = rows.of(row)
        if length <= 3:
            assert not made[row].any()
            continue
        keys = torch.cat([before[row : row + 1], key[:, :, own]], 2) if past else key[:, :, own]
        at = rows.scoring_tokens[row]
        positions = torch.cat([torch.arange(held), rows.positions[own] + held])[None]
        marks = {"sinks": extra, "query_at": at[None] + held, "positions": positions}
        want, whole = attention.scores(query[:, :, own][:, :, at], keys, SCORING, **marks, mass=True)
        torch.testing.assert_close(made[row, :, 3 - length :], want[0, :, held:-3])
        torch.testing.assert_close(mass[row, :, -length:], whole[0, :, held:] * 3 / len(at))


def test_groups_keep_the_tokens_that_score():
    rows = Rows.left_padded([4, 2, 3], 4, here())
    rows.scoring_tokens = [torch.tensor([0, 2]), torch.tensor([1]), torch.tensor([0])]
    assert rows.queries(1).tolist() == [0, 2, 5, 6]
    with pytest.MonkeyPatch.context() as context:
        context.setattr("flexasl.rows.GROUP", 4)
        groups = [(tokens.start, group.queries(1).tolist()) for tokens, group in rows.groups()]
    assert groups == [(0, [0, 2]), (4, [1]), (6, [0])]


@torch.library.custom_op("flexasl_tests::blocks", mutates_args=())
def blocks(states: torch.Tensor) -> torch.Tensor:
    visible = Visibility(torch.arange(300)[None], torch.arange(300)[None], torch.arange(300)[None] != 7)
    with torch.no_grad():
        return states + visible.block_mask(64).kv_num_blocks.sum()


@blocks.register_fake
def _(states):
    return torch.empty_like(states)


@pytest.mark.real("compiles")
def test_an_op_of_a_graph_can_make_block_lists():
    graph = torch.compile(lambda states: blocks(states), fullgraph=True)
    assert torch.equal(graph(torch.zeros(1)), blocks(torch.zeros(1)))
