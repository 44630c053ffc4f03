"""The cache of one layer against plain lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexasl import FlexASLError
from flexasl.cache import LayerCache

GROUPS, DIM = 2, 3


class Model:
    """What a LayerCache should remember: rows[b][g] lists (column, mark) in order, real tokens only."""

    def __init__(self, batch):
        self.rows = [[[] for _ in range(GROUPS)] for _ in range(batch)]
        self.seen = 0

    def heads(self):
        return [head for row in self.rows for head in row]


def states_of(marks):
    """[B, M] marks → keys and values [B, G, M, D] that tell mark, head and part."""
    at = torch.tensor(marks, dtype=torch.float32)[:, None, :, None] * 10
    keys = at + torch.arange(GROUPS)[None, :, None, None] + torch.arange(DIM) / 10
    return keys, -keys


def held_entries(cache, row, group):
    """(column, mark) of the real entries of one head, after checking that key and value belong together."""
    columns = cache.positions[row] if cache.positions.dim() == 2 else cache.positions[row, group]
    real = torch.ones_like(columns, dtype=torch.bool)
    if cache.valid is not None:
        assert cache.valid.shape == cache.positions.shape
        real = cache.valid[row] if cache.valid.dim() == 2 else cache.valid[row, group]
    keys = cache.keys[row, group][real]
    marks = [round(value) // 10 for value in keys[:, 0].tolist()]
    want = states_of([marks])[0][0, group] if marks else keys
    assert torch.equal(keys, want) and torch.equal(cache.values[row, group][real], -want)
    return list(zip(columns[real].tolist(), marks, strict=True))


def check(cache, model):
    assert cache.seen == model.seen
    for row, heads in enumerate(model.rows):
        for group, entries in enumerate(heads):
            assert held_entries(cache, row, group) == entries
    for held in (cache.keys, cache.values):
        assert held.untyped_storage().nbytes() == held.numel() * held.element_size()
    assert cache.nbytes == cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
    assert cache.keys.shape == (len(model.rows), GROUPS, cache.positions.shape[-1], DIM)


def append(draw, cache, model, padding=False):
    batch, count = len(model.rows), draw(st.integers(1, 4))
    pads = [draw(st.integers(0, count - 1)) if padding else 0 for _ in range(batch)]
    marks = [[draw(st.integers(0, 999)) for _ in range(count)] for _ in range(batch)]
    columns = torch.arange(model.seen, model.seen + count).expand(batch, -1)
    valid = torch.arange(count) >= torch.tensor(pads)[:, None]
    cache.append(*states_of(marks), columns, valid if any(pads) or draw(st.booleans()) else None, count)
    for row, heads in enumerate(model.rows):
        for entries in heads:
            entries += [(model.seen + at, marks[row][at]) for at in range(pads[row], count)]
    model.seen += count


def keep(draw, cache, model):
    """Any subset of each head's real entries, as kept slots are given: right-aligned, the unneeded ones invalid."""
    width, chosen = cache.keys.shape[2], []
    for row, heads in enumerate(model.rows):
        for group, entries in enumerate(heads):
            columns = cache.positions[row] if cache.positions.dim() == 2 else cache.positions[row, group]
            real = [True] * width
            if cache.valid is not None:
                real = (cache.valid[row] if cache.valid.dim() == 2 else cache.valid[row, group]).tolist()
            slots = [slot for slot in range(width) if real[slot]]
            kept = sorted(draw(st.sets(st.sampled_from(slots)))) if slots else []
            heads[group] = [entries[slots.index(slot)] for slot in kept]
            assert [column for column, _ in heads[group]] == columns[kept].tolist()
            chosen.append((kept, [slot for slot in range(width) if slot not in kept]))
    count = max(len(kept) for kept, _ in chosen)
    filled = [others[: count - len(kept)] + kept for kept, others in chosen]
    shape = (len(model.rows), GROUPS, count)
    slots = torch.tensor(filled, dtype=torch.long).view(shape)
    valid = torch.tensor([[at >= count - len(kept) for at in range(count)] for kept, _ in chosen]).view(shape)
    cache.keep(slots, None if valid.all() else valid)
    assert cache.keys.shape[2] == count


def crop(draw, cache, model):
    count = draw(st.integers(0, model.seen + 1))
    cache.crop(count)
    if count:
        model.seen = max(0, model.seen - count)
        for heads in model.rows:
            heads[:] = [[entry for entry in entries if entry[0] < model.seen] for entries in heads]


def select_rows(draw, cache, model):
    rows = draw(st.lists(st.integers(0, len(model.rows) - 1), min_size=1, max_size=3))
    cache.select_rows(torch.tensor(rows))
    model.rows = [[list(entries) for entries in model.rows[row]] for row in rows]


@settings(max_examples=150)
@given(data=st.data())
def test_cache_remembers_what_plain_lists_remember(data):
    cache, model = LayerCache(), Model(data.draw(st.integers(1, 3)))
    append(data.draw, cache, model, padding=True)
    check(cache, model)
    for change in data.draw(st.lists(st.sampled_from([append, keep, crop, select_rows]), max_size=6)):
        change(data.draw, cache, model)
        check(cache, model)


def filled(batch=2, count=6):
    cache = LayerCache()
    marks = [[10 * row + at for at in range(count)] for row in range(batch)]
    cache.append(*states_of(marks), torch.arange(count).expand(batch, -1), None, count)
    return cache


def test_an_empty_cache():
    cache = LayerCache()
    cache.crop(3)
    cache.select_rows(torch.tensor([0]))
    assert (cache.nbytes, cache.seen, cache.keys, cache.positions) == (0, 0, None, None)


def test_clear_forgets_everything():
    cache = filled()
    cache.clear()
    assert (cache.nbytes, cache.seen, cache.keys, cache.values, cache.positions, cache.valid) == (0, 0, *[None] * 4)


def test_a_view_of_a_bigger_tensor_is_copied():
    whole = torch.randn(1, 6, 5, DIM)
    cache = LayerCache()
    cache.append(whole[:, :GROUPS], whole[:, GROUPS : 2 * GROUPS], torch.arange(5)[None], None, 5)
    assert torch.equal(cache.keys, whole[:, :GROUPS])
    assert cache.keys.untyped_storage().nbytes() == GROUPS * 5 * DIM * 4
    assert cache.values.untyped_storage().nbytes() == GROUPS * 5 * DIM * 4
    assert cache.nbytes == 2 * GROUPS * 5 * DIM * 4


def test_expanded_heads_are_stored_for_real():
    one = torch.randn(1, 1, 5, DIM).expand(-1, GROUPS, -1, -1)
    cache = LayerCache()
    cache.append(one, one, torch.arange(5)[None], None, 5)
    assert cache.nbytes == cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()


def test_states_that_own_their_storage_are_not_copied():
    keys, values = torch.randn(1, 5, GROUPS, DIM).transpose(1, 2), torch.randn(1, GROUPS, 5, DIM)
    cache = LayerCache()
    cache.append(keys, values, torch.arange(5)[None], None, 5)
    assert cache.keys.data_ptr() == keys.data_ptr() and cache.values.data_ptr() == values.data_ptr()


def test_crop_frees_what_it_forgets():
    cache = filled(count=6)
    cache.crop(4)
    assert cache.keys.shape[2] == 2
    assert cache.nbytes == 2 * 2 * GROUPS * 2 * DIM * 4 == 2 * cache.keys.untyped_storage().nbytes()
    assert cache.positions.untyped_storage().nbytes() <= 2 * 2 * 8
    cache.crop(99)
    assert (cache.seen, cache.nbytes) == (0, 0)


def test_an_empty_cache_can_be_cropped_and_filled_again():
    cache = filled(count=6)
    cache.crop(6)
    cache.crop(1)
    assert (cache.seen, cache.nbytes) == (0, 0)
    cache.append(*states_of([[5], [6]]), torch.tensor([[0], [0]]), None, 1)
    assert [held_entries(cache, row, 0) for row in range(2)] == [[(0, 5)], [(0, 6)]]


def test_crop_leaves_pruned_entries_pruned():
    cache = filled(batch=1)
    slots = torch.tensor([[[0, 3, 5], [1, 2, 4]]])
    cache.keep(slots, None)
    cache.crop(2)
    assert [[column for column, _ in held_entries(cache, 0, group)] for group in range(GROUPS)] == [[0, 3], [1, 2]]
    cache.append(*states_of([[77]]), torch.tensor([[4]]), None, 1)
    assert [held_entries(cache, 0, group)[-1] for group in range(GROUPS)] == [(4, 77), (4, 77)]


# ---------------------------------------------------------------- sliding windows


def extend(draw, cache, model, window):
    """One or a few tokens, as decode reads them; a step that failed before it was stored leaves nothing."""
    batch, count = len(model.rows), draw(st.sampled_from([1, 1, 1, 2, 3]))
    marks = [[draw(st.integers(0, 99)) for _ in range(count)] for _ in range(batch)]
    columns = torch.arange(model.seen, model.seen + count).expand(batch, -1)
    valid = torch.ones(batch, count, dtype=torch.bool) if draw(st.booleans()) else None
    before = cache.positions, cache.valid, cache.keys, cache.seen
    if draw(st.booleans()):
        cache.extend(columns, valid, count, window)
        assert before[3] == cache.seen
        check_visible(cache, model, window)
    keys, values = cache.extend(columns, valid, count, window)
    assert keys.shape[2] <= window - 1 + count
    keys[:, :, -count:], values[:, :, -count:] = states_of(marks)
    at, real = cache.marks(keys.shape[2])
    cache.commit(keys, values, count)
    assert torch.equal(at, cache.positions[..., -keys.shape[2] :])
    assert real is None or torch.equal(real, cache.valid[..., -keys.shape[2] :])
    for row, heads in enumerate(model.rows):
        for entries in heads:
            entries += [(model.seen + place, marks[row][place]) for place in range(count)]
    model.seen += count


def check_visible(cache, model, window):
    """All that the next token sees is there, and nothing that the model has not."""
    assert cache.seen == model.seen
    for row, heads in enumerate(model.rows):
        for group, entries in enumerate(heads):
            held = held_entries(cache, row, group)
            near = [entry for entry in entries if entry[0] > model.seen - window]
            assert held[len(held) - len(near) :] == near and held == entries[len(entries) - len(held) :]


def check_aligned(cache, model):
    sure = max(count for count in range(cache.positions.shape[-1] + 1) if cache.is_aligned(count))
    first, last = cache.positions.shape[-1] - sure, torch.arange(model.seen - sure, model.seen)
    padding = torch.zeros_like(cache.positions, dtype=torch.bool) if cache.valid is None else ~cache.valid
    assert ((cache.positions[..., first:] == last) | padding[..., first:]).all()
    assert cache.is_padded or not padding[..., first:].any()


@settings(max_examples=100)
@given(data=st.data(), window=st.integers(1, 7), slack=st.sampled_from([0, 3, 128]))
def test_a_sliding_window_forgets_nothing_that_is_seen_again(data, window, slack):
    draw, cache, model = data.draw, LayerCache(slack), Model(data.draw(st.integers(1, 2)))
    append(draw, cache, model, padding=draw(st.booleans()))
    if draw(st.booleans()):
        keep(draw, cache, model)
    recorded = None
    for _ in range(draw(st.integers(1, 10))):
        change = draw(st.sampled_from(["extend"] * 5 + ["forget", "crop", "record", "select_rows"]))
        if change == "extend":
            extend(draw, cache, model, window)
            if recorded is None:
                assert cache.positions.shape[-1] <= max(4, 2 * window + 2)
        elif change == "forget":
            cache.forget(window, draw(st.integers(0, 3)))
        elif change == "record":
            cache.activate_past_recording()
            recorded = model.seen
        elif change == "select_rows":
            select_rows(draw, cache, model)
        else:
            allowed = cache.seen - cache.uncroppable
            count = draw(st.integers(0, model.seen))
            if count <= allowed or count == model.seen:
                cache.crop(count)
                model.seen -= count
                for heads in model.rows:
                    heads[:] = [[entry for entry in entries if entry[0] < model.seen] for entries in heads]
                recorded = None if recorded is None else model.seen
            else:
                with pytest.raises(FlexASLError, match=f"crop at most {allowed}, or call activate_past_recording"):
                    cache.crop(count)
        if recorded is not None:
            assert cache.uncroppable <= recorded
        check_visible(cache, model, window)
        check_aligned(cache, model)
