"""Masks and attention of every kernel against the reference in float64, and the traps of compiled kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import here
from torch.nn.attention.flex_attention import create_mask

from flexasl import (
    ConfigError,
    FlexASLAttention,
    Scoring,
    Selection,
    UnsupportedError,
    Visibility,
    kernels,
    masks,
    ops,
)
from flexasl.attention_spec import AttentionSpec
from flexasl.compiling import require_compiler
from flexasl.integrations.inputs import refuse_state
from flexasl.kernels import eager, flex, sdpa, tiling
from flexasl.ops import reference

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def layouts(draw, most=6):
    """Who sees whom, as prompts and pruned caches have it: query positions, key positions and validity, arrays."""
    rng = np.random.default_rng(draw(SEEDS))
    batch, queries = draw(st.integers(1, 2)), draw(st.integers(1, most))
    own = (rng.integers(1, 4, (batch, queries)).cumsum(1) + 40).astype(np.int64)
    if draw(st.booleans()):
        own[:] = own[0]
    if draw(st.booleans()):
        keys = own
    else:
        heads, older = draw(st.sampled_from([None, 2])), draw(st.integers(0, 8))
        shape = (batch, 40) if heads is None else (batch, heads, 40)
        before = np.sort(rng.permuted(np.broadcast_to(np.arange(40), shape), axis=-1)[..., :older], -1)
        tail = own if heads is None else np.broadcast_to(own[:, None], (batch, heads, queries))
        keys = np.concatenate([before, tail], -1)
    valid = rng.random(keys.shape) < 0.7 if draw(st.booleans()) else None
    return own, keys, valid


def visibility(layout):
    queries, keys, valid = layout
    if valid is not None and keys is queries and (queries == queries[0]).all():
        # Rows of one length share their positions.
        queries = keys = queries[:1]
    return Visibility(torch.tensor(queries), torch.tensor(keys), None if valid is None else torch.tensor(valid))


def seen(layout, sliding_window):
    """[B][1 or G][M][N] bool, in loops."""
    queries, keys, valid = layout
    heads = keys.reshape(len(keys), -1, keys.shape[-1])
    real = np.ones_like(heads, dtype=bool) if valid is None else valid.reshape(heads.shape)
    out = np.zeros((*heads.shape[:2], queries.shape[1], heads.shape[2]), dtype=bool)
    for b, g, i, j in np.ndindex(*out.shape):
        back = int(queries[b, i]) - int(heads[b, g, j])
        sees = real[b, g, j] and back >= 0 and (sliding_window is None or back < sliding_window)
        out[b, g, i, j] = sees or (valid is not None and j == heads.shape[2] - queries.shape[1] + i)
    return out


windows = st.none() | st.integers(1, 30)


# ---------------------------------------------------------------- masks


@given(layout=layouts(), sliding_window=windows, data=st.data())
def test_visibility_looks_at_positions_not_slots(layout, sliding_window, data):
    visible, want = visibility(layout), seen(layout, sliding_window)
    assert np.array_equal(visible.dense(sliding_window).cpu().numpy(), want)
    assert visible.dense(sliding_window) is visible.dense(sliding_window)
    first, start = data.draw(st.integers(0, want.shape[2] - 1)), data.draw(st.integers(0, want.shape[3] - 1))
    part = visible.tile(slice(first, None), slice(start, None), sliding_window)
    assert np.array_equal(part.cpu().numpy(), want[:, :, first:, start:])
    for spec in (AttentionSpec(), AttentionSpec(sliding_window=sliding_window, softcap=2.0)):
        want = seen(layout, spec.sliding_window)
        assert np.array_equal(visible.whole_mask(spec).cpu().numpy(), want)
        assert visible.whole_mask(spec) is visible.whole_mask(spec)
        part = visible.mask(spec, slice(first, None), slice(start, None))
        assert np.array_equal(part.cpu().numpy(), want[:, :, first:, start:])


@given(layout=layouts(most=40), sliding_window=windows, block=st.sampled_from([2, 4, 16]))
def test_block_masks_say_the_same_twice(layout, sliding_window, block):
    """Uncompiled flex_attention reads `mask_mod` alone, compiled code skips blocks: each must be the whole truth."""
    _, keys, _ = layout
    groups = keys.reshape(len(keys), -1, keys.shape[-1]).shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "BLOCK", block)
        made = visibility(layout).block_mask(sliding_window, heads=2)
    want = torch.tensor(seen(layout, sliding_window)).repeat_interleave(2 // groups, 1)
    check_blocks(made, want, block)


def check_blocks(made, want, block):
    """Whether a block mask says twice what mask [B, H, M, N] says."""
    batch, heads, count, total = want.shape
    assert torch.equal(create_mask(made.mask_mod, batch, heads, count, total, device=here()), want)
    filled = torch.zeros(batch, -(-count // block) * block, -(-total // block) * block, dtype=torch.bool)
    listed = ((made.kv_num_blocks, made.kv_indices, False), (made.full_kv_num_blocks, made.full_kv_indices, True))
    for counts, indices, full in listed:
        if counts is None:
            continue
        for b, row in np.ndindex(batch, counts.shape[2]):
            for column in indices[b, 0, row, : counts[b, 0, row]].tolist():
                square = np.s_[b, row * block : (row + 1) * block, column * block : (column + 1) * block]
                assert not filled[square].any(), "a block is listed once"
                filled[square] = True
                if full:
                    part = want[b, :, square[1], square[2]]
                    assert part.shape[1] == block and part.all(), "a full block is seen whole"
    assert not (want & ~filled[:, None, :count, :total]).any(), "no pair that is seen is left out"


def test_block_masks_of_a_new_token_leave_out_the_padding_before_each_row():
    at, valid = torch.arange(1024).expand(3, -1), torch.arange(1024) >= torch.tensor([[0], [900], [300]])
    visible = Visibility(at[:, -1:], at, valid)
    assert visible.block_mask().kv_num_blocks.flatten().tolist() == [8, 1, 6]
    assert visible.block_mask(sliding_window=200).kv_num_blocks.flatten().tolist() == [2, 1, 2]


def test_block_masks_leave_out_what_nobody_sees():
    far = Visibility.last(1024, 1024).block_mask(sliding_window=128)
    assert far.kv_num_blocks.sum() + far.full_kv_num_blocks.sum() == 15
    causal = Visibility.last(1024, 1024).block_mask()
    assert (causal.kv_num_blocks.sum(), causal.full_kv_num_blocks.sum()) == (8, 28)
    pruned = torch.zeros(1024, dtype=torch.bool)
    pruned[:10] = pruned[900:] = True
    sparse = Selection(0, 3, pruned, 134).block_mask()
    assert sparse.kv_num_blocks.sum() + sparse.full_kv_num_blocks.sum() == 8 + 7


# ---------------------------------------------------------------- attention


def attention_oracle(query, key, value, mask, scale, softcap=None, sinks=None):
    """float64, over mask [B, 1 or G, M, N]."""
    mask = torch.as_tensor(mask)
    mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return reference.attention(query, key, value, mask, scale, softcap, sinks)


@st.composite
def cases(draw):
    layout = draw(layouts())
    queries, keys, _ = layout
    groups = keys.shape[1] if keys.ndim == 3 else draw(st.sampled_from([1, 2]))
    heads, generator = groups * draw(st.sampled_from([1, 2])), torch.Generator().manual_seed(draw(SEEDS))
    batch, total = len(queries), keys.shape[-1]
    width = draw(st.sampled_from([4, 6]))
    states = [
        torch.randn(batch, count, length, dim, generator=generator)
        for count, length, dim in ((heads, queries.shape[1], 4), (groups, total, 4), (groups, total, width))
    ]
    return layout, states, torch.randn(heads, generator=generator)


@settings(max_examples=100)
@given(
    case=cases(),
    kernel=st.sampled_from(["auto", "sdpa", "eager"]),
    scale=st.sampled_from([None, 0.3]),
    sliding_window=windows,
    featured=st.booleans(),
    tiles=st.sampled_from([(64, 128, 2**27, 256), (2, 2, 2, 2), (1, 1, 7, 3)]),
)
def test_attention_is_the_softmax_over_what_is_seen(case, kernel, scale, sliding_window, featured, tiles):
    layout, states, sinks = case
    softcap, sinks = (1.5, sinks) if featured and kernel != "sdpa" else (None, None)
    module = FlexASLAttention(scale=scale, sliding_window=sliding_window, softcap=softcap, kernel=kernel)
    with pytest.MonkeyPatch.context() as patch:
        names = ((eager, "QUERIES"), (tiling, "BLOCK"), (sdpa, "MASK"), (sdpa, "PROMPT"))
        for (kernels, name), value in zip(names, tiles, strict=True):
            patch.setattr(kernels, name, value)
        out = module(*states, visibility(layout), sinks=sinks)
    mask = seen(layout, sliding_window)
    want = attention_oracle(*states, mask, 0.5 if scale is None else scale, softcap, sinks)
    assert out.shape == (*states[0].shape[:3], states[2].shape[-1]) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (9, 9), (4, 9)])
@pytest.mark.parametrize("sliding_window", [None, 3, 20])
def test_without_visibility_queries_are_the_last_keys(kernel, queries, keys, sliding_window):
    query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    out = FlexASLAttention(kernel=kernel, sliding_window=sliding_window)(query, key, value)
    at = np.arange(keys)[None].repeat(2, 0)
    want = attention_oracle(query, key, value, seen((at[:, keys - queries :], at, None), sliding_window), 8**-0.5)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 40])
def test_kernels_agree_in_every_dtype(dtype, count):
    states = [torch.randn(2, heads, count if heads == 4 else 60, 16, dtype=dtype) for heads in (4, 2, 2)]
    outs = [FlexASLAttention(kernel=kernel, sliding_window=30)(*states) for kernel in ("eager", "sdpa")]
    exact = FlexASLAttention(kernel="eager", sliding_window=30)(*(part.double() for part in states))
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 0.02}
    for out in outs:
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, **close)


def test_scores_come_with_the_output_when_asked():
    query, key, value = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    at, valid = torch.arange(20).expand(2, -1) * 2, torch.arange(20) >= torch.tensor([[0], [5]])
    module, sinks = FlexASLAttention(scale=0.3, sliding_window=25, softcap=2.0), torch.randn(4)
    visible = Visibility(at, at, valid)
    out, scores = module(query, key, value, visible, sinks=sinks, scoring=Scoring(4, 3, "maxpool"))
    assert torch.equal(out, module(query, key, value, visible, sinks=sinks))
    want = ops.window_scores(query[:, :, -4:], key, 3, "maxpool", module.spec.text, valid, at, sinks)
    assert scores.shape == (2, 2, 16) and torch.equal(scores, want)


@pytest.mark.cpu("the kernels of the CPU")
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_widens_all_of_a_long_cache(dtype, sunk):
    """Soft-caps and sinks run in the eager kernel, which widens half precision to float32 part by part."""
    keys = 3 * (eager.WIDENED // (2 * 64)) + 5
    query, key, value = (torch.randn(1, heads, count, 64).to(dtype) for heads, count in ((4, 1), (2, keys), (2, keys)))
    value[:, :, keys // 2 :] += 1  # later parts are not like the first
    sinks = torch.randn(4) if sunk else None
    module = FlexASLAttention(softcap=None if sunk else 5.0)
    assert module.choose(query, key, sinks=sinks) == "eager"
    want = module(query.double(), key.double(), value.double(), sinks=sinks)
    torch.testing.assert_close(module(query, key, value, sinks=sinks).double(), want, rtol=0, atol=0.01)


@pytest.mark.parametrize("keys", [63, 64, 65, 200])
def test_decode_widens_every_part_of_a_cache_once(keys, monkeypatch):
    monkeypatch.setattr(eager, "WIDENED", 1)  # parts of 64 keys
    query, key, value = (torch.randn(2, heads, count, 8).half() for heads, count in ((4, 1), (2, keys), (2, keys)))
    module = FlexASLAttention(softcap=5.0, kernel="eager")
    want = module(query.double(), key.double(), value.double())
    torch.testing.assert_close(module(query, key, value).double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sliding_window", [None, 9])
def test_scores_where_kv_heads_have_keys_of_their_own(sliding_window):
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    at = torch.rand(2, 2, 60).argsort(-1)[..., :20].sort(-1).values
    at[..., -5:] = torch.arange(60, 65)
    valid = torch.rand(2, 2, 20) < 0.7
    sinks, scoring = torch.randn(4), Scoring(4, 3)
    module = FlexASLAttention(sliding_window=sliding_window)
    _, scores = module(query, key, value, Visibility(at[:, 0, -5:], at, valid), sinks=sinks, scoring=scoring)
    assert scores.shape == (2, 2, 16)
    for head in range(2):
        own = slice(2 * head, 2 * head + 2)
        one = Visibility(at[:, 0, -5:], at[:, head], valid[:, head])
        parts = query[:, own], key[:, head : head + 1], value[:, head : head + 1]
        want = module(*parts, one, sinks=sinks[own], scoring=scoring)[1]
        assert torch.equal(scores[:, head], want[:, 0])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("mass", [False, True])
def test_scores_by_queries_anywhere(by_head, mass):
    query, key, sinks = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 20, 8), torch.randn(4)
    at = torch.randint(1, 4, (2, 2, 20)).cumsum(-1)
    query_at = torch.rand(2, 2, 20).argsort(-1)[..., :3]
    query_at = query_at if by_head else query_at[:, 0]
    module, scoring = FlexASLAttention(sliding_window=30, softcap=2.0), Scoring(3, 3)
    made = module.scores(query, key, scoring, positions=at, sinks=sinks, query_at=query_at, mass=mass)
    for head in range(2):
        own = slice(2 * head, 2 * head + 2)
        scoring_tokens = query_at[:, head] if by_head else query_at
        arguments = query[:, own], key[:, head : head + 1], 3, "avgpool", module.spec.text, None, at[:, head]
        want = reference.window_scores_and_mass(*arguments, sinks[own], scoring_tokens)
        for got, whole in zip(made if mass else (made,), want):
            assert got.shape == (2, 2, 20)
            torch.testing.assert_close(got[:, head].double(), whole[:, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_gradients_flow(kernel):
    states = [torch.randn(1, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    module = FlexASLAttention(kernel=kernel, softcap=2.0 if kernel == "eager" else None, sliding_window=3)
    assert torch.autograd.gradcheck(lambda *parts: module(*parts), states)


@pytest.mark.cpu("the kernels of the CPU")
@pytest.mark.parametrize(
    ("settings", "sinks", "message"),
    [
        ({"kernel": "flash"}, None, "kernel='flash' is not known; give 'auto', 'flex', 'sdpa' or 'eager'"),
        ({"sliding_window": 0}, None, "sliding_window=0 is too small; give a positive number or None"),
        ({"softcap": -1.0}, None, "softcap=-1.0 is too small; give a positive number or None"),
        (
            {"kernel": "sdpa", "softcap": 30.0},
            None,
            "kernel='sdpa' has no soft-cap (softcap=30.0); give kernel='auto', 'flex' or 'eager'",
        ),
        ({"kernel": "sdpa"}, 4, "kernel='sdpa' has no sinks; give kernel='auto' or 'eager', or sinks=None"),
        ({"kernel": "flex"}, 4, "kernel='flex' has no sinks on cpu; give kernel='auto' or 'eager', or sinks=None"),
    ],
)
def test_what_a_kernel_cannot_honour_is_refused(settings, sinks, message):
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        module = FlexASLAttention(**settings)
        module(*[torch.randn(1, heads, 3, 8) for heads in (4, 2, 2)], sinks=torch.randn(sinks))
    assert str(caught.value) == message


@pytest.mark.cpu("the kernels of the CPU")
def test_auto_takes_the_kernel_of_its_table():
    plain, capped, slides = FlexASLAttention(), FlexASLAttention(softcap=3.0), FlexASLAttention(sliding_window=4)
    for count in (1, 9):
        states = torch.randn(1, 4, count, 8), torch.randn(1, 2, 9, 8)
        assert plain.choose(*states) == slides.choose(*states) == "sdpa"
        assert capped.choose(*states) == plain.choose(*states, sinks=torch.randn(4)) == "eager"


def test_a_new_token_goes_straight_to_sdpa_where_that_may_compute_it(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels, "one_token", lambda *arguments: taken.append(arguments))
    monkeypatch.setattr(kernels, "attend", lambda *arguments: None)
    states = [torch.randn(1, heads, count, 8) for heads, count in ((4, 1), (2, 9), (2, 9))]
    for asked, straight in (
        ({}, True),
        ({"kernel": "sdpa", "sliding_window": 9}, True),
        ({"kernel": "eager"}, False),
        ({"kernel": "flex"}, False),
        ({"softcap": 2.0}, False),
        ({"sliding_window": 8}, False),
    ):
        taken.clear()
        FlexASLAttention(**asked)(*states)
        assert bool(taken) == straight, asked


# ---------------------------------------------------------------- compiled flex_attention and its traps


FLEX = [
    ({}, False),
    ({"sliding_window": 150}, True),
    ({"softcap": 2.0}, True),
]


@pytest.mark.parametrize(("given", "padded"), FLEX)
def test_flex_reads_every_block_list_however_many_lengths(given, padded):
    """Past a limit of 8 compiles torch may fall back in silence to code that reads no block list."""
    module, exact = FlexASLAttention(kernel="flex", **given), FlexASLAttention(kernel="eager", **given)
    for queries, keys in ((300, 300), (1, 300), (140, 300)):
        states = [torch.randn(2, heads, keys, 16) for heads in (4, 2, 2)]
        # A view that begins in the middle of its storage, which compiled code has been known to forget.
        query = states[0][:, :, keys - queries :]
        at = torch.arange(keys).expand(2, -1)
        visible = Visibility(at[:, keys - queries :], at, at >= torch.tensor([[0], [140]])) if padded else None
        want = exact(query, *states[1:], visible)
        torch.testing.assert_close(module(query, *states[1:], visible), want, rtol=1e-4, atol=1e-5)


@pytest.mark.real("compiles")
def test_flex_compiles_apart_for_each_shape_and_as_a_whole_graph(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: made.append((function, settings)))
    flex._compiled.cache_clear()
    for kind, dynamic in (("any",), True), ((torch.Size([9]),), False), ((torch.Size([8]),), False):
        flex._compiled(kind, dynamic)
    flex._compiled.cache_clear()
    assert len({id(function.__code__) for function, _ in made}) == 3
    assert [settings for _, settings in made] == [
        {"fullgraph": True, "dynamic": dynamic} for dynamic in (True, False, False)
    ]


@pytest.mark.cpu("the kernels of the CPU")
def test_flex_on_cpu_refuses_few_keys_which_torch_gets_wrong():
    with pytest.raises(UnsupportedError, match="wrong on cpu for fewer than 128 keys, here 40; give kernel='auto'"):
        FlexASLAttention(kernel="flex")(*[torch.randn(1, heads, 40, 16) for heads in (4, 2, 2)])


def test_padded_decode_is_right():
    at, valid = torch.arange(200).expand(2, -1), torch.arange(200) >= torch.tensor([[0], [170]])
    states = [torch.randn(2, 4, 1, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)]
    visible = Visibility(at[:, -1:], at, valid)
    want = FlexASLAttention(kernel="eager")(*states, visible)
    for kernel in ("auto", "sdpa", "flex"):
        torch.testing.assert_close(FlexASLAttention(kernel=kernel)(*states, visible), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("given", "padded"), FLEX)
def test_flex_on_a_gpu_is_one_graph_for_many_lengths(given, padded):
    from torch._dynamo.utils import counters

    module, exact = FlexASLAttention(kernel="flex", **given), FlexASLAttention(kernel="eager", **given)
    before = counters["stats"]["unique_graphs"]
    for count in (260, 300, 333, 390, 405, 450, 512, 570, 600, 640):
        states = [torch.randn(2, heads, count, 16, device="cuda") for heads in (4, 2, 2)]
        at = torch.arange(count, device="cuda").expand(2, -1)
        visible = Visibility(at, at, at >= torch.tensor([[0], [140]], device="cuda")) if padded else None
        torch.testing.assert_close(module(*states, visible), exact(*states, visible), rtol=1e-2, atol=1e-3)
    assert counters["stats"]["unique_graphs"] - before == 1


def test_what_a_gpu_without_triton_lacks_is_said(monkeypatch):
    device, model = torch.device("cuda"), torch.nn.Linear(2, 2).eval()
    monkeypatch.setattr(flex, "compiles_for", lambda device: False)
    with pytest.raises(UnsupportedError, match=r"^kernel='flex' needs Triton on cuda, and a GPU that Triton knows"):
        refuse_state(model, "flex", device)
    with pytest.raises(UnsupportedError, match=r"^compile=True needs Triton on cuda, .* or give compile=False$"):
        require_compiler(device)
    monkeypatch.setattr(flex, "compiles_for", lambda device: True)
    refuse_state(model, "flex", device)
    require_compiler(device)


@pytest.mark.real("compiles")
@pytest.mark.parametrize(("capability", "knows"), [((6, 1), False), ((7, 0), True), ((9, 0), True)])
def test_which_gpus_torch_compiles_for(capability, knows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for triton in (True, False):
        monkeypatch.setattr(flex, "TRITON", triton)
        flex.compiles_for.cache_clear()
        assert flex.compiles_for(torch.device("cuda")) == (knows and triton)
    flex.compiles_for.cache_clear()
