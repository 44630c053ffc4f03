"""Operations and attention on a GPU, against their definitions in `flexasl.ops.reference` on the CPU."""

import itertools

import pytest
import torch
from on_device import DEVICE, needs_device, needs_gpu
from test_ops import differentiable, examples
from torch.utils._pytree import tree_map_only

from flexasl import FlexASLAttention, Scoring, Visibility, ops
from flexasl.ops import reference

pytestmark = needs_device

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LATE = torch.arange(64)[None] >= 32
DECISIONS = [
    (ops.top_k_entries, (torch.rand(2, 3, 40), torch.tensor([9, 4]), 4)),
    (ops.top_k_entries, (torch.rand(2, 3, 40), torch.tensor([9, 4]), 4, torch.arange(40) >= torch.tensor([[0], [30]]))),
    (ops.top_p_entries, (torch.full((2, 2, 32), 1 / 32), 0.75, 4)),
    (ops.top_p_entries, (LATE[:, None] / 32, 0.5, 4, LATE)),
]


def there(values):
    """The same tensors on the device of these tests."""
    return tree_map_only(torch.Tensor, lambda part: part.detach().to(DEVICE).requires_grad_(part.requires_grad), values)


def name_of(op):
    return getattr(op, "_name", None) or op.__name__


# ---------------------------------------------------------------- ops


@pytest.mark.parametrize("number", range(len(list(examples()))))
def test_opcheck(number):
    op, arguments = list(examples())[number]
    torch.library.opcheck(op, there(arguments))


@pytest.mark.parametrize("number", range(len(list(differentiable()))))
def test_gradients_of_gathers_are_exact(number):
    op, arguments = list(differentiable())[number]
    # Sums of a GPU come in any order, which float64 shows.
    assert torch.autograd.gradcheck(op, there(arguments), nondet_tol=1e-12)


@pytest.mark.parametrize("number", range(len(list(examples())) + len(DECISIONS)))
def test_ops_are_what_they_are_defined_as(number):
    op, arguments = [*examples(), *DECISIONS][number]
    made, want = op(*there(arguments)), getattr(reference, name_of(op).rpartition("::")[2])(*arguments)
    for mine, exact in zip(
        *((part,) if isinstance(part, torch.Tensor) else part for part in (made, want)), strict=True
    ):
        assert mine.device.type == torch.device(DEVICE).type
        torch.testing.assert_close(mine.cpu(), exact.to(mine.dtype), **CLOSE)


@pytest.mark.parametrize("tokens", [0, 1, 33, 1000, 4097, 131_072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ranks_of_ties_zeros_and_padding(dtype, tokens):
    scores = (torch.randint(-40, 40, (3, tokens)) / 16).to(dtype)
    scores[:, ::7] = -0.0
    scores[:, 1::7] = 0.0
    scores[:, 2::31] = float("nan")
    scores[:, 3::31] = float("-inf")
    scores[:, 4::31] = float("inf")
    for valid in (None, torch.arange(tokens) >= torch.tensor([[0], [tokens // 2], [tokens - 1]])):
        held = scores if valid is None else scores.masked_fill(~valid, 99.0)
        got = ops.token_ranks(*there((held, valid))).cpu()
        want = ops.token_ranks(held, valid) if tokens > 5000 else reference.token_ranks(held, valid)
        assert torch.equal(got, want)


def test_rank_variance_of_long_prompts_is_that_of_the_cpu():
    ranks = torch.stack([torch.randperm(1_000_000, dtype=torch.int32) + 1 for _ in range(8)]).view(4, 2, -1)
    budget = torch.tensor([2048, 900_000])
    for mine, want in zip(ops.rank_variance(*there((ranks, budget))), ops.rank_variance(ranks, budget), strict=True):
        assert torch.equal(mine.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", ["avgpool", "maxpool", "phrase"])
def test_scores_of_a_long_prompt(dtype, pooling):
    query, key = torch.randn(1, 8, 32, 64).to(dtype), torch.randn(1, 2, 8192, 64).to(dtype)
    want = reference.window_scores(query, key, 25, pooling)
    got = ops.window_scores(*there((query, key)), 25, pooling)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-9)


@needs_gpu
def test_a_decision_waits_for_nothing():
    query, key = torch.randn(2, 8, 32, 64, device=DEVICE), torch.randn(2, 2, 4096, 64, device=DEVICE)
    valid = torch.arange(4096, device=DEVICE) >= torch.tensor([[0], [900]], device=DEVICE)
    budget = torch.tensor([500, 300], device=DEVICE)
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
def test_attention_is_what_it_is_defined_as(kernel, name, dtype):
    torch._dynamo.reset()
    given = dict(SETTINGS[name])
    sinks = torch.randn(4) if given.pop("sinks", False) else None
    if kernel == "flex" and DEVICE == "cpu":
        pytest.skip("flex is there to compare with")
    module = FlexASLAttention(kernel=kernel, **given)
    for states, visible in attention_cases(dtype, SHAPES if kernel in ("sdpa", "eager") else FEW_SHAPES):
        want = exact_attention(states, visible, given | {"sinks": sinks})
        shown = None if visible is None else Visibility(*there(visible))
        got = module(*there(states), shown, sinks=there(sinks))
        assert got.dtype == dtype
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(got.cpu().double(), want, **close)


def test_scores_come_with_the_output_as_on_the_cpu():
    states, visible = list(attention_cases())[1]
    module, scoring = FlexASLAttention(sliding_window=150), Scoring(8, 5, "maxpool")
    _, want = module(*states, Visibility(*visible), scoring=scoring)
    _, scores = module(*there(states), Visibility(*there(visible)), scoring=scoring)
    torch.testing.assert_close(scores.cpu(), want, rtol=1e-4, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("name", ["plain", "softcap and sliding", "sinks"])
def test_flex_compiles_nothing_for_other_lengths(name):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    given = dict(SETTINGS[name])
    sinks = torch.randn(4, device=DEVICE) if given.pop("sinks", False) else None
    module, graphs = FlexASLAttention(kernel="flex", **given), []
    for count in (260, 300, 333, 390, 512, 640):
        at = torch.arange(count).expand(2, -1)
        states = [torch.randn(2, heads, count, 64) for heads in (4, 2, 2)]
        visible = at, at, at >= torch.tensor([[0], [140]])
        got = module(*there(states), Visibility(*there(visible)), sinks=sinks)
        want = exact_attention(states, visible, given | {"sinks": None if sinks is None else sinks.cpu()})
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[1:2] * 5 and graphs[1] - graphs[0] <= 1
