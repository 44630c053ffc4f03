"""Tokens that see later ones, as those of an image do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from placing import here
from torch.nn.attention.flex_attention import create_mask

from flexasl.attention import FlexASLAttention
from flexasl.attention_spec import AttentionSpec
from flexasl.kernels import eager, sdpa
from flexasl.masks import Visibility
from flexasl.rows import Rows
from flexasl.rows_attention import attend

KERNELS = {"eager": eager.attend, "sdpa": sdpa.attend}


def spans(batch, tokens, seed, longest):
    """last_seen [B, N] of random spans whose tokens see each other, and by how many the furthest sees ahead."""
    generator = torch.Generator().manual_seed(seed)
    last = torch.arange(tokens).repeat(batch, 1)
    for row in range(batch):
        at = 0
        while at < tokens:
            length = min(int(torch.randint(1, longest, (), generator=generator)), tokens - at)
            if torch.rand((), generator=generator) < 0.5:
                last[row, at : at + length] = at + length - 1
            at += length
    return last, int((last - torch.arange(tokens)).max())


def allowed(positions, last, window, valid=None):
    seen = positions[:, None] <= last[:, :, None]
    if window is not None:
        seen = seen & (positions[:, None] > positions[:, :, None] - window)
    if valid is not None:
        seen = seen & valid[:, None]
    return seen | torch.eye(positions.shape[1], dtype=torch.bool)


def exact(query, key, value, mask):
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ value


@given(
    st.sampled_from([3, 130, 300, 700]),
    st.sampled_from([None, 40, 200]),
    st.integers(0, 2**20),
    st.sampled_from([4, 90, 400]),
    st.booleans(),
)
def test_kernels_and_block_masks_agree_with_the_rule(tokens, window, seed, longest, gaps):
    generator = torch.Generator().manual_seed(seed)
    last, ahead = spans(2, tokens, seed, longest)
    positions = torch.arange(tokens).repeat(2, 1)
    if gaps:  # some tokens are gone
        keep = torch.randperm(tokens, generator=generator)[: tokens // 2 + 1].sort().values
        positions, last = positions[:, keep], last[:, keep]
    valid = torch.rand(positions.shape, generator=generator) < 0.8
    visible = Visibility(positions, positions, valid, last_seen=last, ahead=ahead)
    query, key, value = torch.randn(3, 2, 2, positions.shape[1], 8, dtype=torch.float64, generator=generator)
    mask = allowed(positions, last, window, valid)
    assert torch.equal(visible.dense(window)[:, 0], mask)
    spec = AttentionSpec(sliding_window=window)
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(spec, query, key, value, visible, None), exact(query, key, value, mask))
    blocks = visible.block_mask(window)
    count = positions.shape[1]
    pointwise = create_mask(blocks.mask_mod, 2, 1, count, count, device=here())[:, 0]
    assert torch.equal(pointwise, mask)
    listed = blocks.to_dense()[:, 0].repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :count, :count].bool()
    assert not (mask & ~listed).any(), "a block that is seen is not listed"
    full = torch.zeros_like(blocks.to_dense()[:, 0])
    for row, (counts, indices) in enumerate(zip(blocks.full_kv_num_blocks[:, 0], blocks.full_kv_indices[:, 0])):
        for at, number in enumerate(counts.tolist()):
            full[row, at, indices[at, :number].long()] = 1
    full = full.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :count, :count].bool()
    assert not (full & ~mask).any(), "a block is said to be seen whole"


@pytest.mark.parametrize("window", [None, 40])
def test_rows_of_unlike_lengths(window):
    lengths, last = [150, 90, 90], [spans(1, length, 5 + row, 60) for row, length in enumerate([150, 90, 90])]
    rows = Rows.left_padded(lengths, 150, here())
    joined = torch.cat([own[0] + 150 - length for (own, _), length in zip(last, lengths)])
    rows.seeing(joined, max(ahead for _, ahead in last))
    query, key, value = torch.randn(
        3, 1, 2, sum(lengths), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    module = FlexASLAttention(sliding_window=window)
    got = attend(rows, module, query, key, value)
    ordered = attend(rows.in_order, module, query, key, value)
    for (own, _), length, start in zip(last, lengths, rows.starts):
        part = slice(start, start + length)
        at = torch.arange(length)[None]
        states = [one[:, :, part] for one in (query, key, value)]
        torch.testing.assert_close(got[:, :, part], exact(*states, allowed(at, own, window)))
        torch.testing.assert_close(ordered[:, :, part], exact(*states, allowed(at, at, window)))
