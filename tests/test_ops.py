"""Every op against its definition in `flexasl.ops.reference`."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from placing import DEVICE, here

from flexasl import ASLConfig, FlexASLAttention, ops
from flexasl.attention_spec import AttentionSpec
from flexasl.ops import cpu, reference, scoring
from flexasl.policies import ASL
from flexasl.prefill import Prefill
from flexasl.selectors.adaptive import variance_ratio

SEEDS = st.integers(0, 2**32 - 1)


def arrays(seed):
    return np.random.default_rng(seed)


def tensor(array):
    return torch.tensor(np.ascontiguousarray(array))


# ---------------------------------------------------------------- window_scores


KERNELS = {"general": ops.window_mass._init_fn} | ({"cpu": cpu.window_mass_in_tiles} if DEVICE == "cpu" else {})


def window_mass(query, key, mass=ops.window_mass, **settings):
    """Each key's share of a KV head's attention, the scoring queries' own keys included: [B, G, N]."""
    whole = mass(query, key, **settings).unflatten(1, (key.shape[1], -1)).sum(2)
    return whole / (query.shape[1] // key.shape[1] * query.shape[2])


@st.composite
def window_cases(draw):
    """Arguments of `window_mass` but for its sinks, and those that the reference has for them."""
    rng = arrays(draw(SEEDS))
    window, prefix = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    groups, repeats, dim = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([4, 6])),
    )
    tokens, lengths = prefix + window, [draw(st.integers(1, prefix + window)) for _ in range(draw(st.integers(1, 2)))]
    batch = len(lengths)
    query = rng.standard_normal((batch, groups * repeats, window, dim)).astype(np.float32)
    key = rng.standard_normal((batch, groups, tokens, dim)).astype(np.float32)
    valid = np.arange(tokens) >= tokens - np.array(lengths)[:, None]
    gaps = rng.integers(1, 5, (batch, tokens)) if draw(st.booleans()) else np.ones((batch, tokens), dtype=np.int64)
    positions = gaps.cumsum(1) - gaps[:, :1]
    spec = AttentionSpec(
        scale=draw(st.sampled_from([None, 0.2, 1.0])),
        sliding_window=draw(st.none() | st.integers(1, 14)),
        softcap=draw(st.sampled_from([None, 0.7, 5.0])),
    )
    anywhere = np.stack([rng.permutation(tokens)[:window] for _ in lengths])
    query_at = draw(st.sampled_from([None, tensor(anywhere), tensor(np.sort(anywhere, -1))]))
    return tensor(query), tensor(key), spec.text, tensor(valid), tensor(positions), query_at


def plainest(spec, valid, positions):
    """The same arguments, as they are given where there is neither padding nor gap."""
    contiguous = bool((positions == torch.arange(positions.shape[1])).all())
    return spec, None if valid.all() else valid, None if contiguous else positions


POWERS = st.sampled_from([1.0, 2.0, 4.0, 2.5, math.inf])


SHARES = st.sampled_from([0, 0, 0.3, 0.7, 1])


def some_controls(share, query):
    """How many of the queries are controls: one that ranks is left."""
    return int(share * (query.shape[2] - 1))


TILES = st.sampled_from([1, 30, 2**23])


@given(window_cases(), st.booleans(), st.sampled_from(sorted(KERNELS)), POWERS, SHARES, TILES)
def test_window_mass_is_the_summed_softmax(case, sunk, kernel, power, share, tile):
    query, key, spec, valid, positions, query_at = case
    sinks, controls = torch.randn(query.shape[1]) if sunk else None, some_controls(share, query)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE", tile)
        patch.setattr(scoring, "LOGITS", tile)
        mass = KERNELS[kernel](query, key, *plainest(spec, valid, positions), sinks, query_at, power, controls)
    want = reference.window_mass(query, key, spec, valid, positions, sinks, query_at, power, controls)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), want, rtol=3e-5, atol=1e-6 if controls else 1e-12)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_what_controls_give_is_taken_off_in_each_head(kernel):
    """The first head looks at a key from everywhere, the second one from the question alone."""
    query = torch.tensor([[[[9.0, 0.0]] * 3, [[0.0, 0.0], [0.0, 0.0], [0.0, 9.0]]]])
    key = torch.tensor([[[[9.0, 0.0], [0.0, 9.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]])
    mass = KERNELS[kernel](query, key, "scale=1.0", power=math.inf, controls=2)[0]
    torch.testing.assert_close(mass, torch.tensor([[0.0] * 5, [0, 1 - 1 / 3, 0, 0, 0]]), rtol=0, atol=1e-6)
    sums = KERNELS[kernel](query, key, "scale=1.0", controls=2)[0]
    # The controls, which see 3 and 4 keys, give each of these a third and a fourth: for one query, the mean.
    torch.testing.assert_close(sums[1], torch.tensor([0.0, 1 - (1 / 3 + 1 / 4) / 2, 0, 0, 0]), rtol=0, atol=1e-6)
    assert (sums >= 0).all() and sums[0, 0] < 1e-6


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("power", [2.0, 4.0, math.inf])
def test_powers_keep_what_is_not_a_number_and_drop_what_is_too_small(kernel, power):
    query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[-60.0], [-44.0], [-1.0], [0.0]]]])
    mass = KERNELS[kernel](query, key, "scale=1.0", power=power)[0, 0]
    want = reference.window_mass(query, key, "scale=1.0", power=power)[0, 0]
    torch.testing.assert_close(mass.double(), want, rtol=1e-4, atol=0)
    assert (mass[0] == 0) == (power != math.inf) and mass[2] > 0
    key[0, 0, 1] = math.nan
    assert KERNELS[kernel](query, key, power=power).isnan().all()


@given(
    case=window_cases(),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["avgpool", "maxpool", "phrase"]),
    sunk=st.booleans(),
    tile=TILES,
    power=POWERS,
    share=SHARES,
)
def test_window_scores_pool_each_query_head_over_the_scored_tokens_and_sum_the_group(
    case, kernel_size, pooling, sunk, tile, power, share
):
    query, key, *marks, query_at = case
    sinks, controls = torch.randn(query.shape[1]) if sunk else None, some_controls(share, query)
    arguments = query, key, kernel_size, pooling, *marks, sinks, query_at, power, controls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE", tile)
        scores = ops.window_scores(*arguments)
        both = ops.window_scores_and_mass(*arguments)
    want, mass = reference.window_scores_and_mass(*arguments)
    assert scores.dtype == torch.float32 and torch.equal(both[0], scores)
    assert scores.shape[2] == key.shape[2] - (query.shape[2] if query_at is None else 0)
    torch.testing.assert_close(scores.double(), want, rtol=3e-5, atol=1e-6 if controls else 1e-12)
    torch.testing.assert_close(both[1].double(), mass, rtol=1e-5, atol=1e-12)


@given(case=window_cases(), kernel=st.sampled_from(sorted(KERNELS)))
def test_naming_the_last_queries_changes_nothing(case, kernel):
    query, key, *marks, _ = case
    tokens, window = key.shape[2], query.shape[2]
    last = torch.arange(tokens - window, tokens).expand(len(query), -1)
    mine, its = (KERNELS[kernel](query, key, *marks, None, query_at) for query_at in (None, last))
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scoring_queries_see_the_keys_up_to_their_own(kernel):
    query, key, query_at = torch.zeros(2, 1, 2, 4), torch.randn(2, 1, 4, 4), torch.tensor([[0, 2], [3, 1]])
    mass = KERNELS[kernel](query, key, query_at=query_at)[:, 0]
    rows = [1 + 1 / 3, 1 / 3, 1 / 3, 0], [1 / 4 + 1 / 2, 1 / 4 + 1 / 2, 1 / 4, 1 / 4]
    torch.testing.assert_close(mass, torch.tensor(rows))


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool", "phrase"])
def test_window_scores_of_a_padded_row_are_the_rows_alone(pooling):
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 14, 8)
    valid = torch.arange(14) >= torch.tensor([[0], [5]])
    scores = ops.window_scores(query, key, 5, pooling, valid=valid)
    alone = ops.window_scores(query[1:], key[1:, :, 5:], 5, pooling)
    torch.testing.assert_close(scores[1:, :, 5:], alone, rtol=1e-5, atol=1e-12)


@given(
    case=window_cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kernel=st.sampled_from(sorted(KERNELS)),
)
def test_window_mass_of_a_padded_row_is_the_rows_alone(case, dtype, kernel):
    query, key, spec, valid, at, _ = case
    tokens, window, run = key.shape[2], query.shape[2], KERNELS[kernel]
    query, key = query.to(dtype), key.to(dtype)
    # What padding holds must not matter: it may be anything finite.
    padding = ~valid[:, None, :, None]
    noisy_key = key.masked_fill(padding, 9.0)
    noisy_query = query.masked_fill(padding[:, :, tokens - window :], -9.0)
    mass = run(noisy_query, noisy_key, spec, valid, at)
    for b, length in enumerate(valid.sum(1).tolist()):
        own = query[b : b + 1, :, -min(length, window) :], key[b : b + 1, :, tokens - length :]
        alone = run(*own, spec, None, at[b : b + 1, tokens - length :])
        torch.testing.assert_close(mass[b : b + 1, :, tokens - length :], alone, rtol=1e-5, atol=1e-12)
        assert not mass[b, :, : tokens - length].any()


def test_window_mass_counts_each_window_query_once():
    mass = window_mass(torch.randn(2, 4, 5, 8), torch.randn(2, 2, 12, 8))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2))
    alike = window_mass(torch.zeros(1, 1, 2, 4), torch.randn(1, 1, 4, 4))
    torch.testing.assert_close(alike[0, 0] * 2, torch.tensor([1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]))


def test_window_mass_of_one_token_is_one():
    assert window_mass(torch.randn(1, 2, 1, 4), torch.randn(1, 1, 1, 4)).tolist() == [[[1.0]]]


def test_window_mass_sees_sliding_window_minus_one_tokens_back():
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 6, 4)
    for width in range(1, 9):
        seen = window_mass(query, key, spec=f"sliding_window={width}") > 0
        assert seen.tolist() == [[[back < width for back in range(5, -1, -1)]]]
    sparse = torch.tensor([[0, 3, 6, 7, 8, 10]])
    seen = window_mass(query, key, spec="sliding_window=4", positions=sparse) > 0
    assert seen.tolist() == [[[False, False, False, True, True, True]]]


# ---------------------------------------------------------------- token_ranks


@st.composite
def scored_rows(draw):
    """Scores with many ties, and padding that would score best, anywhere or nowhere."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(0, 40))
    rng = arrays(draw(SEEDS))
    scores = rng.integers(-3, draw(st.sampled_from([0, 4, 10**6])), (rows, tokens)).astype(np.float32)
    valid = rng.random((rows, tokens)) < draw(st.sampled_from([0.5, 2.0]))
    return np.where(valid, scores, np.float32(1e9)), valid


RANKS = {"general": ops.token_ranks._init_fn} | ({"cpu": cpu.token_ranks_by_radix} if DEVICE == "cpu" else {})


@pytest.mark.parametrize("kernel", RANKS)
@given(rows=scored_rows())
def test_token_ranks_are_stable_and_put_padding_last(kernel, rows):
    scores, valid = map(tensor, rows)
    ranks = RANKS[kernel](scores, None if valid.all() else valid)
    assert ranks.dtype == torch.int32 and torch.equal(ranks, reference.token_ranks(scores, valid))


def test_token_ranks_of_many_equal_scores_go_to_the_earlier_token():
    assert ops.token_ranks(torch.zeros(2, 5000)).tolist() == [list(range(1, 5001))] * 2


# ---------------------------------------------------------------- rank_variance


@given(seed=SEEDS, layers=st.integers(1, 8), rows=st.integers(1, 3), tokens=st.integers(1, 40), data=st.data())
def test_rank_variance_is_exact(seed, layers, rows, tokens, data):
    rng = arrays(seed)
    ranks = np.stack([[rng.permutation(tokens) + 1 for _ in range(rows)] for _ in range(layers)]).astype(np.int32)
    budget = data.draw(st.lists(st.integers(0, tokens + 2), min_size=rows, max_size=rows))
    arguments = tensor(ranks), torch.tensor(budget)
    variance, size = ops.rank_variance(*arguments)
    assert variance.dtype == torch.float64
    assert (variance.tolist(), size.tolist()) == tuple(want.tolist() for want in reference.rank_variance(*arguments))


def test_rank_variance_by_hand():
    ranks = torch.tensor([[[1, 2, 3, 4]], [[2, 1, 4, 3]], [[1, 3, 2, 4]]], dtype=torch.int32)
    # Budget 2: tokens 0, 1, 2 are ranked within it in some layer; their ranks are (1, 2, 1), (2, 1, 3), (3, 4, 2).
    variance, size = ops.rank_variance(ranks, torch.tensor([2]))
    assert size.tolist() == [3]
    assert variance.item() == pytest.approx((2 / 3 + 2 + 2) / 9)


@pytest.mark.parametrize("layers, tokens", [(2, 200_000), (2, 4_000_000), (4, 2_000_000), (16, 1_000_000)])
def test_rank_variance_of_long_prompts_does_not_overflow(layers, tokens):
    up = torch.arange(1, tokens + 1, dtype=torch.int32)
    ranks = torch.stack([up, up.flip(0)])[:, None].repeat(layers // 2, 1, 1)
    variance, size = ops.rank_variance(ranks, torch.tensor([tokens]))
    assert size.item() == tokens
    # Each token's ranks are half of them j, half of them tokens + 1 - j.
    assert variance.item() == float(Fraction(tokens**2 - 1, 12))


def test_rank_variance_of_the_longest_prompts_is_rounded_once_a_step():
    """16 layers of 4 million tokens, by few tokens of the union that have the farthest ranks."""
    layers, tokens, budget = 16, 4_194_304, 1000
    ranks = torch.full((layers, 1, tokens), tokens, dtype=torch.int32)
    ranks[: layers // 2, :, :budget] = torch.arange(1, budget + 1, dtype=torch.int32)
    variance, size = ops.rank_variance(ranks, torch.tensor([budget]))
    assert size.item() == budget
    want = Fraction(sum((tokens - rank) ** 2 for rank in range(1, budget + 1)), 4 * budget)
    assert variance.item() == pytest.approx(float(want), rel=3e-16)


# ---------------------------------------------------------------- selection


@given(seed=SEEDS, rows=st.integers(1, 3), tokens=st.integers(0, 20), window=st.integers(1, 4), data=st.data())
def test_select_tokens_takes_ranks_within_the_budget_and_the_window(seed, rows, tokens, window, data):
    ranks = np.stack([arrays(seed + row).permutation(tokens) + 1 for row in range(rows)]).astype(np.int32)
    budget = data.draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    arguments = tensor(ranks), torch.tensor(budget), window
    keep = ops.select_tokens(*arguments)
    assert torch.equal(keep, reference.select_tokens(*arguments))
    assert keep.sum(1).tolist() == [most + window for most in budget]


@given(seed=SEEDS, shape=st.sampled_from([(1,), (3,), (2, 3)]), tokens=st.integers(1, 20), extra=st.integers(0, 3))
def test_kept_indices_are_ascending_and_right_aligned(seed, shape, tokens, extra):
    keep = arrays(seed).random((*shape, tokens)) < 0.5
    count = min(tokens, int(keep.sum(-1).max()) + extra)
    slots, valid = ops.kept_indices(tensor(keep), count)
    assert slots.shape == valid.shape == (*shape, count)
    for row in np.ndindex(*shape):
        places, stays = reference.kept_indices(tensor(keep[row]), count)
        assert torch.equal(slots[row][stays], places[stays]) and torch.equal(valid[row], stays)
        assert len(set(slots[row].tolist())) == count


@given(seed=SEEDS, rows=st.integers(1, 3), tokens=st.integers(1, 9), rest=st.sampled_from([(), (2,), (3, 2)]))
def test_gather_tokens(seed, rows, tokens, rest):
    rng = arrays(seed)
    shared = bool(rng.integers(2))
    states = rng.standard_normal((1 if shared else rows, tokens, *rest))
    slots = rng.integers(0, tokens, (rows, int(rng.integers(0, tokens + 1))))
    gathered = ops.gather_tokens(tensor(states), tensor(slots))
    assert gathered.shape == (*slots.shape, *rest)
    assert torch.equal(gathered, reference.gather_tokens(tensor(states), tensor(slots)))
    assert gathered.untyped_storage().nbytes() == gathered.numel() * gathered.element_size()


@given(seed=SEEDS, rows=st.integers(1, 3), groups=st.integers(1, 2), tokens=st.integers(1, 9), kept=st.integers(0, 9))
def test_compact_kv(seed, rows, groups, tokens, kept):
    rng = arrays(seed)
    batch = 1 if rng.integers(2) else rows
    keys, values = (tensor(rng.standard_normal((batch, groups, tokens, dim))) for dim in (4, 6))
    slots = tensor(rng.integers(0, tokens, (rows, groups, kept)))
    compacted = ops.compact_kv(keys, values, slots)
    for made, want in zip(compacted, reference.compact_kv(keys, values, slots), strict=True):
        assert torch.equal(made, want)
        assert made.untyped_storage().nbytes() == made.numel() * made.element_size()


# ---------------------------------------------------------------- top_k_entries, top_p_entries


@given(rows=scored_rows(), groups=st.integers(1, 3), window=st.integers(1, 3), data=st.data())
def test_top_k_entries_keep_the_best_of_each_head(rows, groups, window, data):
    scores, valid = rows
    heads = np.stack([scores, *(np.roll(scores, shift, 1) for shift in range(1, groups))], 1)
    heads = np.where(valid[:, None], heads, np.float32(1e9))
    budget = [data.draw(st.integers(0, count)) for count in valid.sum(1).tolist()]
    arguments = tensor(heads), torch.tensor(budget), window
    keep = ops.top_k_entries(*arguments, None if valid.all() else tensor(valid))
    assert torch.equal(keep, reference.top_k_entries(*arguments, tensor(valid)))


@st.composite
def masses(draw):
    """Attention mass in 256ths, so that float32 sums are exact and `top_p` can be met to the bit."""
    rng = arrays(draw(SEEDS))
    window, groups = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    lengths = draw(st.lists(st.integers(window + 1, 50), min_size=1, max_size=2))
    flat, whole = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 4]))  # the rest goes to cached entries, to sinks
    rows = []
    for length in lengths:
        odds = np.ones(length) if flat else rng.dirichlet(np.full(length, 0.4)) + 1e-9
        rows.append(rng.multinomial(256, odds / odds.sum(), (groups,)) / 256 / whole)
    top_p = draw(st.integers(1, 256)) / 256
    return rows, lengths, top_p, window


@given(case=masses())
def test_top_p_entries_reach_the_mass_in_eights(case):
    rows, lengths, top_p, window = case
    tokens = max(lengths)
    mass = np.zeros((len(rows), len(rows[0]), tokens), dtype=np.float32)
    for b, row in enumerate(rows):
        mass[b, :, tokens - lengths[b] :] = row
    valid = np.arange(tokens) >= tokens - np.array(lengths)[:, None]
    keep = ops.top_p_entries(tensor(mass), top_p, window, None if valid.all() else tensor(valid))
    assert torch.equal(keep, reference.top_p_entries(tensor(mass), top_p, window, tensor(valid)))


def test_top_p_entries_by_hand():
    mass = torch.tensor([2.0**-j for j in range(1, 20)] + [2.0**-19])[None, None]
    kept = [ops.top_p_entries(mass, top_p, 1)[0, 0].nonzero().flatten().tolist() for top_p in (0.9, 0.998, 1.0)]
    assert kept == [[0, 19], [*range(8), 19], [*range(16), 19]]
    even = torch.full((1, 1, 16), 1 / 16)
    kept = [ops.top_p_entries(even, count / 16, 1).sum().item() for count in (7, 8, 15, 16)]
    assert kept == [2, 9, 9, 16], "mass that meets top_p exactly is enough"


def test_top_p_entries_never_keep_padding():
    valid = torch.tensor([[False, False, False, True, True], [True] * 5])
    mass = torch.where(valid, 0.5, 0.0)[:, None]
    keep = ops.top_p_entries(mass, 0.9, 3, valid)
    assert keep[:, 0].tolist() == [[False, False, False, True, True], [True, False, True, True, True]]


def test_top_p_entries_of_a_padded_row_are_the_rows_alone_where_rounding_leaves_the_mass_short_of_top_p():
    alone = torch.full((1, 1, 12), 1 / 12)
    alone[..., -1] = 0.0833  # in total 0.99997
    padded = torch.cat([torch.zeros(1, 1, 20), alone], -1)
    valid = torch.arange(32)[None] >= 20
    want = ops.top_p_entries(alone, 1.0, 1)
    assert torch.equal(ops.top_p_entries(padded, 1.0, 1, valid)[..., 20:], want)


# ---------------------------------------------------------------- torch.library


def states(dtype=torch.float32, tokens=20, window=4):
    return torch.randn(2, 4, window, 8, dtype=dtype), torch.randn(2, 2, tokens, 8, dtype=dtype)


def examples():
    valid = torch.arange(20) >= torch.tensor([[0], [5]])
    at = torch.arange(20).expand(2, -1)
    ranks = torch.stack([torch.randperm(16) + 1 for _ in range(6)]).view(3, 2, 16).int()
    budget = torch.tensor([4, 7])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield ops.window_scores, (*states(dtype), 5, "avgpool")
        yield ops.gather_tokens, (torch.randn(2, 9, 3, dtype=dtype), torch.tensor([[1, 3], [0, 8]]))
        yield ops.compact_kv, (*[torch.randn(2, 2, 9, 4, dtype=dtype) for _ in range(2)], torch.randint(9, (2, 2, 5)))
    spec, query_at = (
        AttentionSpec(scale=0.3, sliding_window=6, softcap=20.0).text,
        torch.tensor([[3, 9, 11, 19], [19, 6, 7, 8]]),
    )
    yield ops.window_scores, (*states(), 3, "maxpool", spec, valid, at)
    yield ops.window_scores, (*states(), 3, "maxpool", spec, valid, at, None, query_at)
    yield ops.window_scores, (*states(tokens=4), 3, "avgpool")
    for scoring_tokens in (None, query_at):
        yield ops.window_scores_and_mass, (*states(), 5, "avgpool", spec, valid, at, torch.randn(4), scoring_tokens)
        yield ops.window_mass, (*states(), spec, None, None, None, scoring_tokens)
        yield ops.window_mass, (*states(), spec, None, None, None, scoring_tokens, 2.0)
        yield ops.window_scores_and_mass, (*states(), 5, "maxpool", spec, None, None, None, scoring_tokens, math.inf)
        for power in (1.0, math.inf):
            marks = spec, valid, at, None, scoring_tokens, power, 1
            yield ops.window_mass, (*states(), *marks)
            yield ops.window_scores, (*states(), 3, "maxpool", *marks)
            yield ops.window_scores_and_mass, (*states(), 3, "maxpool", *marks)
    yield ops.gather_tokens, (torch.randn(1, 9), torch.tensor([[1, 3], [0, 8]]))
    yield from differentiable()
    yield ops.token_ranks, (torch.randn(2, 16),)
    yield ops.token_ranks, (torch.randn(2, 0), torch.ones(2, 0, dtype=torch.bool))
    yield ops.rank_variance, (ranks, budget)
    yield ops.select_tokens, (ranks[0], budget, 4)
    yield ops.select_tokens, (ranks[0], budget, 4, valid)


def differentiable():
    """Gathers of states with gradients, of which some slots are named twice or never."""
    for rows in (1, 3):
        slots = torch.tensor([[1, 3, 3], [0, 8, 2], [5, 5, 5]])
        for rest in ((), (4,), (2, 2)):
            yield ops.gather_tokens, (torch.randn(rows, 9, *rest, dtype=torch.float64, requires_grad=True), slots)
        states = [torch.randn(rows, 2, 9, dim, dtype=torch.float64, requires_grad=True) for dim in (4, 3)]
        yield ops.compact_kv, (*states, torch.randint(9, (3, 2, 5)))
    yield ops.compact_kv, (states[0].detach(), states[1], torch.randint(9, (3, 2, 0)))


@pytest.mark.parametrize("number", range(len(list(differentiable()))))
def test_gradients_of_gathers_are_exact(number):
    op, arguments = list(differentiable())[number]
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


@pytest.mark.real("looks into the dispatcher")
@pytest.mark.parametrize("number", range(len(list(examples()))))
def test_opcheck(number):
    op, arguments = list(examples())[number]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("kernel", RANKS)
@pytest.mark.parametrize("lowest", [float("nan"), float("-inf")])
def test_nan_and_minus_infinity_rank_behind_every_number_and_before_padding(lowest, kernel):
    scores = torch.tensor([[9.0, 1.0, lowest, -3.0, float("inf"), lowest]])
    valid = torch.tensor([[False, True, True, True, True, True]])
    assert RANKS[kernel](scores, valid).tolist() == [[6, 2, 4, 3, 1, 5]]


def test_a_token_that_is_not_finite_leaves_other_rows_and_heads_alone():
    query, key = states()
    want = ops.window_scores(query, key, 5, "avgpool")
    key[1, 0, 7] = float("nan")
    scores = ops.window_scores(query, key, 5, "avgpool")
    assert scores[1, 0].isnan().all()
    assert torch.equal(scores[0], want[0]) and torch.equal(scores[1, 1], want[1, 1])
    valid = torch.arange(20) >= torch.tensor([[0], [8]])
    padded = ops.window_scores(query, key, 5, "avgpool", valid=valid)
    assert padded.isfinite().all(), "what padding holds does not matter"
    torch.testing.assert_close(padded[1, :, 8:], ops.window_scores(query, key[..., 8:, :], 5, "avgpool")[1])


@pytest.mark.parametrize("kernel", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ranks_are_exact_in_every_dtype(dtype, kernel):
    scores = torch.randint(-40, 40, (3, 500)).to(dtype) / 16
    scores[:, ::7] = -0.0
    scores[:, 1::7] = 0.0
    scores[2] = 1 + torch.randperm(500).to(dtype) * torch.finfo(dtype).eps
    assert torch.equal(RANKS[kernel](scores), reference.token_ranks(scores))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scoring_holds_no_more_than_it_says(kernel, monkeypatch):
    """All logits at once would be 16 MiB. On CPU the largest tensor that is made is two buffers of two heads."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            out = function(*arguments, **(settings or {}))
            if isinstance(out, torch.Tensor) and out._base is None and "out" not in (settings or {}):
                self.made = max(self.made, out.untyped_storage().nbytes())
            return out

    heads, groups, tokens, window = 8, 2, 16_384, 32
    query, key = torch.randn(1, heads, window, 16), torch.randn(1, groups, tokens, 16)
    monkeypatch.setattr(cpu, "TILE", 2 * window * tokens)
    with Counting() as counting:
        KERNELS[kernel](query, key)
    head = window * tokens * 4
    assert counting.made == (2 * 2 * head if kernel == "cpu" else heads // groups * head)


def decision(graphs):
    """The whole decision of a layer: scores, ranks, variance, what has settled, and the tokens that would be kept."""

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def decide(query, key, held, reference, budget, best):
        scores = ops.window_scores(query, key, 5, "avgpool").sum(1)
        ranks = torch.stack([*held, ops.token_ranks(scores)])
        variance, union = ops.rank_variance(ranks, budget)
        ratio = variance_ratio(torch.stack([reference, variance]), "peak")[-1]
        chosen = ops.token_ranks(torch.maximum(best, scores))
        keep = ops.select_tokens(chosen, budget, query.shape[2])
        return ratio < 0.4, (variance, union), ops.kept_indices(keep, 8)[0]

    return decide


@pytest.mark.real("compiles")
def test_the_decision_is_one_graph_for_many_lengths():
    graphs = []
    decide = decision(graphs)
    for tokens in (20, 33, 57, 80):
        query, key = states(tokens=tokens)
        held = [torch.stack([torch.randperm(tokens - 4) + 1 for _ in range(2)]).int() for _ in range(3)]
        budget, reference, best = torch.tensor([4, 4]), torch.tensor([30.0, 1e6]).double(), torch.rand(2, tokens - 4)
        settled, seen, slots = decide(query, key, held, reference, budget, best)
        scores = ops.window_scores(query, key, 5, "avgpool").sum(1)
        variance, union = ops.rank_variance(torch.stack([*held, ops.token_ranks(scores)]), budget)
        assert torch.equal(seen[0], variance) and torch.equal(seen[1], union)
        assert torch.equal(settled, variance / torch.maximum(reference, variance) < 0.4)
        top = torch.maximum(best, scores).topk(4).indices.sort().values
        assert torch.equal(slots, torch.cat([top, torch.arange(tokens - 4, tokens).expand(2, -1)], 1))
    assert len(graphs) == 1


@pytest.mark.real("counts calls, which test_waits.py counts there")
@pytest.mark.parametrize("if_never", ["keep", "select"])
def test_the_decision_moves_one_scalar_to_the_host_for_each_observed_layer(if_never, monkeypatch):
    moved = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        whole = getattr(torch.Tensor, name)

        def counted(self, *arguments, whole=whole, name=name, **settings):
            moved.append((name, self.numel()))
            return whole(self, *arguments, **settings)

        monkeypatch.setattr(torch.Tensor, name, counted)
    rule = ASLConfig(
        select_tokens=20, window=4, min_layer=2, max_layer=6, observe_layers=2, tau=1e-9, if_never=if_never
    )
    prefill = Prefill(ASL(), rule.resolve(8), 8, [60], device=here())
    moved.clear()
    for layer in range(8):
        query, key = torch.randn(1, 4, rule.window, 8), torch.randn(1, 2, prefill.rows.width, 8)
        prefill.observe(layer, query, key, FlexASLAttention())
        prefill.advance()
    evaluated = 5 if if_never == "keep" else 4  # at the last one it selects in any case
    assert moved == [("tolist", 1)] * evaluated


def test_phrase_pooling_takes_a_run_of_tokens_and_goes_on_behind_it():
    """With 5 tokens: three of the average, two beside these, and ten more behind."""
    key = torch.zeros(1, 1, 60, 4)
    key[0, 0, 30, 0] = 50.0
    query = torch.zeros(1, 1, 4, 4)
    query[..., 0] = 1.0
    weight = ops.window_scores(query, key, 1, "phrase", power=math.inf)[0, 0, 30].item()
    scores = ops.window_scores(query, key, 5, "phrase", power=math.inf)[0, 0]
    assert weight > 0.99 and (scores > 0.01).nonzero()[:, 0].tolist() == list(range(25, 46))
    torch.testing.assert_close(scores[25:36], torch.full((11,), weight / 7), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores[35:46], weight / 7 * 0.95 ** torch.arange(11), rtol=1e-6, atol=0)


@pytest.mark.real("looks into the dispatcher")
def test_logits_of_one_query_head_at_a_time_where_more_are_too_many(monkeypatch):
    query, key, held = torch.randn(2, 8, 4, 16), torch.randn(2, 2, 40, 16), []
    want, softmax = ops.window_mass._init_fn(query, key), torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda logits, dim: (held.append(logits.numel()), softmax(logits, dim))[1]
    )
    for most, tiles in ((2 * 4 * 40 * 4, 2), (2 * 4 * 40 * 3, 4), (1, 8)):
        held.clear()
        monkeypatch.setattr(scoring, "LOGITS", most)
        torch.testing.assert_close(ops.window_mass._init_fn(query, key), want)
        assert len(held) == tiles and max(held) <= max(most, 2 * 4 * 40)
