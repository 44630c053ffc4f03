"""Attention of rows by torch's variable-length function: which of its versions can compute what."""

import pytest
import torch
from torch.nn import functional as F

from flexasl.attention_spec import AttentionSpec
from flexasl.kernels import attend, can_varlen, varlen, varlen_attention

LENGTHS = (5, 9, 1)


def states(heads=4, groups=2, dim=8, dtype=torch.bfloat16, device="cpu", value_dim=None, lengths=LENGTHS):
    shapes = ((heads, dim), (groups, dim), (groups, value_dim or dim))
    return [torch.randn(1, count, sum(lengths), width, dtype=dtype, device=device) for count, width in shapes]


def boundaries(lengths=LENGTHS, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def by_row(spec, query, key, value, lengths=LENGTHS):
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)))
    return torch.cat([attend(spec, *row) for row in parts], 2)


def as_loop(query, key, value, cu_query, cu_key, most, most_keys, *, scale, window_size, enable_gqa):
    """torch's function as a loop over rows, with its conventions."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and most == most_keys == cu_query.diff().max()
    assert window_size[1] == 0, "causal"
    out = []
    for start, stop in zip(cu_query[:-1].tolist(), cu_key[1:].tolist()):
        own = [tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value)]
        at = torch.arange(stop - start, device=query.device)
        back = at[:, None] - at
        mask = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        mixed = F.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        out.append(mixed[0].transpose(0, 1))
    return torch.cat(out)


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    arguments = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
    return as_loop(*arguments, scale=None, window_size=(-1, 0), enable_gqa=False)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [2, 4])
def test_it_is_asked_for_causal_attention_of_each_row(window, scale, groups, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", as_loop)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    spec, parts = AttentionSpec(scale=scale, sliding_window=window), states(groups=groups)
    assert can_varlen(spec, *parts)
    out = varlen_attention(spec, *parts, boundaries(), max(LENGTHS))
    torch.testing.assert_close(out, by_row(spec, *parts), rtol=0, atol=0.02)


def test_what_the_installed_one_has_no_argument_for_is_not_asked_of_it(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", older)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    monkeypatch.setattr(varlen, "_takes_groups", lambda device: False)
    parts = states(groups=4)
    assert can_varlen(AttentionSpec(), *parts) and can_varlen(AttentionSpec(scale=8**-0.5), *parts)
    out = varlen_attention(AttentionSpec(), *parts, boundaries(), max(LENGTHS))
    torch.testing.assert_close(out, by_row(AttentionSpec(), *parts), rtol=0, atol=0.02)
    assert not can_varlen(AttentionSpec(scale=0.3), *parts) and not can_varlen(AttentionSpec(sliding_window=4), *parts)
    assert not can_varlen(AttentionSpec(), *states(groups=2))
    monkeypatch.setattr(varlen, "_takes_groups", lambda device: True)
    assert can_varlen(AttentionSpec(), *states(groups=2))
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert not can_varlen(AttentionSpec(), *parts)


@pytest.mark.parametrize("takes", [True, False, None])
def test_grouped_heads_are_tried_where_there_is_no_argument_for_them(takes, monkeypatch):
    def function(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        if query.shape[1] != key.shape[1]:
            if takes is None:
                raise RuntimeError("heads")
            key, value = (part.repeat_interleave(2, 1) if takes else part.repeat(1, 2, 1) for part in (key, value))
        return as_loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **settings)

    settings = {"scale": None, "window_size": (-1, 0), "enable_gqa": False}
    monkeypatch.setattr(varlen, "varlen_attn", function)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    varlen._takes_groups.cache_clear()
    assert varlen._takes_groups(torch.device("cpu")) == bool(takes)
    varlen._takes_groups.cache_clear()


def test_it_computes_plain_attention_in_half_precision_without_gradients(monkeypatch):
    parts = states()
    assert not can_varlen(AttentionSpec(), *parts), "not on CPU"
    monkeypatch.setattr(varlen, "varlen_attn", as_loop)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    assert can_varlen(AttentionSpec(), *parts)
    for spec in (AttentionSpec(softcap=3.0), AttentionSpec(kernel="sdpa"), AttentionSpec(kernel="eager")):
        assert not can_varlen(spec, *parts)
    assert not can_varlen(AttentionSpec(), *parts, sinks=torch.randn(4))
    for other in ({"dtype": torch.float32}, {"dim": 12}, {"dim": 264}, {"value_dim": 16}):
        assert not can_varlen(AttentionSpec(), *states(**other))
    parts[1].requires_grad_()
    assert not can_varlen(AttentionSpec(), *parts)
    with torch.no_grad():
        assert can_varlen(AttentionSpec(), *parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [2, 4])
def test_on_a_gpu_it_is_the_attention_of_each_row(groups, scale, window, dtype):
    lengths = (300, 7, 1, 513)
    spec = AttentionSpec(scale=scale, sliding_window=window)
    parts = states(4, groups, 64, dtype, "cuda", lengths=lengths)
    if not can_varlen(spec, *parts):
        pytest.skip(f"torch {torch.__version__} cannot")
    out = varlen_attention(spec, *parts, boundaries(lengths, "cuda"), max(lengths))
    exact = AttentionSpec(scale=scale, sliding_window=window, kernel="eager")
    want = by_row(exact, *(part.double() for part in parts), lengths)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=0.02)
