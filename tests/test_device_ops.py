"""Operations and attention on the device of the tests, a GPU where there is one, against their definitions in
`flexasl.ops.reference` on the CPU."""

import itertools

import pytest
import torch
from on_device import needs_gpu
from test_ops import differentiable, examples
from torch.utils._pytree import tree_map_only

from flexasl import FlexASLAttention, Scoring, Visibility, ops
from flexasl.ops import reference
from flexasl.rows import Rows
from flexasl.rows_attention import attend

pytestmark = pytest.mark.places

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LATE = torch.arange(64)[None] >= 32
DECISIONS = [
    (ops.top_k_entries, (torch.rand(2, 3, 40), torch.tensor([9, 4]), 4)),
    (ops.top_k_entries, (torch.rand(2, 3, 40), torch.tensor([9, 4]), 4, torch.arange(40) >= torch.tensor([[0], [30]]))),
    (ops.top_p_entries, (torch.full((2, 2, 32), 1 / 32), 0.75, 4)),
    (ops.top_p_entries, (LATE[:, None] / 32, 0.5, 4, LATE)),
]


def there(device, values):
    """The same tensors on a device."""
    return tree_map_only(torch.Tensor, lambda part: part.detach().to(device).requires_grad_(part.requires_grad), values)


def name_of(op):
    return getattr(op, "_name", None) or op.__name__


# ---------------------------------------------------------------- ops


@pytest.mark.parametrize("number", range(len(list(examples()))))
def test_opcheck(number, device):
    op, arguments = list(examples())[number]
    torch.library.opcheck(op, there(device, arguments))


@pytest.mark.parametrize("number", range(len(list(differentiable()))))
def test_gradients_of_gathers_are_exact(number, device):
    op, arguments = list(differentiable())[number]
    # Sums of a GPU come in any order, which float64 shows.
    assert torch.autograd.gradcheck(op, there(device, arguments), nondet_tol=1e-12)


@pytest.mark.parametrize("number", range(len(list(examples())) + len(DECISIONS)))
def test_ops_are_what_they_are_defined_as(number, device):
    op, arguments = [*examples(), *DECISIONS][number]
    made, want = op(*there(device, arguments)), getattr(reference, name_of(op).rpartition("::")[2])(*arguments)
    for mine, exact in zip(
        *((part,) if isinstance(part, torch.Tensor) else part for part in (made, want)), strict=True
    ):
        assert mine.device.type == device.type
        torch.testing.assert_close(mine.cpu(), exact.to(mine.dtype), **CLOSE)


@pytest.mark.parametrize("tokens", [0, 1, 33, 1000, 4097, 131_072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ranks_of_ties_zeros_and_padding(dtype, tokens, device):
    scores = (torch.randint(-40, 40, (3, tokens)) / 16).to(dtype)
    scores[:, ::7] = -0.0
    scores[:, 1::7] = 0.0
    scores[:, 2::31] = float("nan")
    scores[:, 3::31] = float("-inf")
    scores[:, 4::31] = float("inf")
    for valid in (None, torch.arange(tokens) >= torch.tensor([[0], [tokens // 2], [tokens - 1]])):
        held = scores if valid is None else scores.masked_fill(~valid, 99.0)
        got = ops.token_ranks(*there(device, (held, valid))).cpu()
        want = ops.token_ranks(held, valid) if tokens > 5000 else reference.token_ranks(held, valid)
        assert torch.equal(got, want)


def test_rank_variance_of_long_prompts_is_that_of_the_cpu(device):
    ranks = torch.stack([torch.randperm(1_000_000, dtype=torch.int32) + 1 for _ in range(8)]).view(4, 2, -1)
    budget = torch.tensor([2048, 900_000])
    for mine, want in zip(
        ops.rank_variance(*there(device, (ranks, budget))), ops.rank_variance(ranks, budget), strict=True
    ):
        assert torch.equal(mine.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", ["avgpool", "maxpool", "phrase"])
def test_scores_of_a_long_prompt(dtype, pooling, device):
    query, key = torch.randn(1, 8, 32, 64).to(dtype), torch.randn(1, 2, 8192, 64).to(dtype)
    want = reference.window_scores(query, key, 25, pooling)
    got = ops.window_scores(*there(device, (query, key)), 25, pooling)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-9)


@needs_gpu
def test_a_decision_waits_for_nothing(device):
    query, key = torch.randn(2, 8, 32, 64, device=device), torch.randn(2, 2, 4096, 64, device=device)
    valid = torch.arange(4096, device=device) >= torch.tensor([[0], [900]], device=device)
    budget = torch.tensor([500, 300], device=device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores, mass = ops.window_scores_and_mass(query, key, 7, "avgpool", valid=valid)
        ranks = ops.token_ranks(scores.sum(1), valid[:, :-32])
        ops.rank_variance(torch.stack([ranks, ranks]), budget)
        ops.select_tokens(ranks, budget, 32, valid)
        ops.top_k_entries(scores, budget, 32, valid[:, :-32])
        ops.top_p_entries(mass / 128, 0.9, 32, valid)
        slots = torch.stack([ranks[:, :100].long()] * 2, 1)
        ops.compact_kv(key, key, slots)
        ops.gather_tokens(key[:, 0], slots[:, 0])
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---------------------------------------------------------------- attention


SETTINGS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "sliding": {"sliding_window": 150},
    "softcap": {"softcap": 2.0},
    "softcap and sliding": {"softcap": 2.0, "sliding_window": 150},
    "sinks": {"sinks": True},
    "sinks and sliding": {"sinks": True, "sliding_window": 150},
}


SHAPES = [(300, 300), (140, 300), (90, 90), (1, 300), (1, 40)]
FEW_SHAPES = [(300, 300), (90, 90), (1, 300)]
"""Each is another graph to flex_attention."""


def attention_cases(dtype=torch.float32, shapes=SHAPES):
    """Queries, keys, values and visibility of prompts and of decode, without gaps, padded, and by KV head."""
    for count, total in shapes:
        states = [torch.randn(2, heads, many, 64).to(dtype) for heads, many in ((4, count), (2, total), (2, total))]
        at = torch.arange(total).expand(2, -1)
        yield states, None
        yield states, (at[:, total - count :], at, at >= torch.tensor([[0], [total // 3]]))
        if shapes is SHAPES:
            yield states, (at[:, total - count :] * 3, at * 3, None)
        if count == 1:
            own = torch.rand(2, 2, total * 2).argsort(-1)[..., :total].sort(-1).values
            yield states, (at[:, -1:] * 2, own, torch.rand(2, 2, total) < 0.8)


def exact_attention(states, visible, settings):
    settings = dict(settings)
    window = settings.pop("sliding_window", None)
    made = Visibility.last(states[0].shape[2], states[1].shape[2]) if visible is None else Visibility(*visible)
    seen = made.dense(window)
    seen = seen if seen.shape[1] == 1 else seen.repeat_interleave(states[0].shape[1] // seen.shape[1], 1)
    return reference.attention(*states, seen, **settings)


DTYPES = {"sdpa": [torch.float32, torch.bfloat16, torch.float16], "flex": [torch.float32, torch.bfloat16]}
DTYPES |= {"eager": DTYPES["sdpa"], "auto": [torch.bfloat16]}
KERNELS = [
    (kernel, name, dtype)
    for kernel, dtypes in DTYPES.items()
    for name, dtype in itertools.product(SETTINGS, dtypes)
    if kernel != "sdpa" or not {"softcap", "sinks"} & set(SETTINGS[name])
]


@pytest.mark.parametrize(("kernel", "name", "dtype"), KERNELS, ids=str)
def test_attention_is_what_it_is_defined_as(kernel, name, dtype, device):
    torch._dynamo.reset()
    given = dict(SETTINGS[name])
    sinks = torch.randn(4) if given.pop("sinks", False) else None
    if kernel == "flex" and device.type == "cpu":
        pytest.skip("flex is there to compare with")
    module = FlexASLAttention(kernel=kernel, **given)
    for states, visible in attention_cases(dtype, SHAPES if kernel in ("sdpa", "eager") else FEW_SHAPES):
        want = exact_attention(states, visible, given | {"sinks": sinks})
        shown = None if visible is None else Visibility(*there(device, visible))
        got = module(*there(device, states), shown, sinks=there(device, sinks))
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
            continue
        # Weights and output are rounded to this dtype once each, so a mixture of values is off by that of their sizes.
        sizes = exact_attention([*states[:2], states[2].abs()], visible, given | {"sinks": sinks})
        assert ((got.cpu().double() - want).abs() <= 2 * torch.finfo(dtype).eps * sizes + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_of_several_lengths_attend_as_each_alone(name, masked, dtype, device):
    """As one call on a GPU, by `varlen_attn` or flex_attention."""
    torch._dynamo.reset()
    given, lengths = dict(SETTINGS[name]), [300, 7, 140, 1]
    sinks = torch.randn(4) if given.pop("sinks", False) else None
    kept = torch.arange(448) % 3 != 1 if masked else None
    query, key, value = (torch.randn(1, heads, 448, 64).to(dtype) for heads in (4, 2, 2))
    rows = Rows.left_padded(lengths, 300, device)
    rows = rows if kept is None else rows.masked(kept.to(device))
    got = attend(rows, FlexASLAttention(**given), *there(device, (query, key, value)), there(device, sinks)).cpu()
    for row in range(len(lengths)):
        own, at = rows.of(row), torch.arange(lengths[row])[None]
        parts = [states[:, :, own] for states in (query, key, value)]
        shown = at, at, None if kept is None else kept[None, own]
        want = exact_attention(parts, shown, given | {"sinks": sinks})
        sizes = exact_attention([*parts[:2], parts[2].abs()], shown, given | {"sinks": sinks})
        most = (1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * sizes + 1e-6
        assert ((got[:, :, own].double() - want).abs() <= most).all()


def test_scores_come_with_the_output_as_on_the_cpu(device):
    states, visible = list(attention_cases())[1]
    module, scoring = FlexASLAttention(sliding_window=150), Scoring(8, 5, "maxpool")
    _, want = module(*states, Visibility(*visible), scoring=scoring)
    _, scores = module(*there(device, states), Visibility(*there(device, visible)), scoring=scoring)
    torch.testing.assert_close(scores.cpu(), want, rtol=1e-4, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("name", ["plain", "softcap and sliding", "sinks"])
def test_flex_compiles_nothing_for_other_lengths(name, device):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    given = dict(SETTINGS[name])
    sinks = torch.randn(4, device=device) if given.pop("sinks", False) else None
    module, graphs = FlexASLAttention(kernel="flex", **given), []
    for count in (260, 300, 333, 390, 512, 640):
        at = torch.arange(count).expand(2, -1)
        states = [torch.randn(2, heads, count, 64) for heads in (4, 2, 2)]
        visible = at, at, at >= torch.tensor([[0], [140]])
        got = module(*there(device, states), Visibility(*there(device, visible)), sinks=sinks)
        want = exact_attention(states, visible, given | {"sinks": None if sinks is None else sinks.cpu()})
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[1:2] * 5 and graphs[1] - graphs[0] <= 1
