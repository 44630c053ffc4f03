"""Batches of rows of unlike lengths, through prompt, answer, later turns, crops and files: all that is read keeps its
place."""

import copy

import pytest
import torch
from models import FAMILIES, SMALL, left_padded, prompts, sliding_window, tiny

import flexasl

KEEP_ALL = SMALL.replace(select_tokens=1000)


class Conversation:
    """Rows [B, N] read so far by a patched model, each pass of which is compared with a forward over all of it."""

    def __init__(self, model):
        self.model, self.cache, self.passes = model, None, []
        self.ids = self.mask = None

    def read(self, *lengths, pads=0):
        """New tokens of each row, behind so many columns that are padding in all rows."""
        self.read_rows(prompts(*lengths, seed=len(self.passes)), pads)

    def read_rows(self, rows, pads=0):
        new = left_padded(rows)
        ids, mask = (torch.nn.functional.pad(new[name], (pads, 0)) for name in ("input_ids", "attention_mask"))
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        count = ids.shape[1]
        out = self.model(ids, **self._given(count), past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        self.passes.append((self.ids, self._given(self.ids.shape[1]), mask.bool(), out.logits))
        assert torch.equal(self.cache.token_ids, self.ids)
        assert torch.equal(self.cache.attention_mask, self.mask)

    def crop(self, count):
        self.cache.crop(-count)
        self.ids, self.mask = self.ids[:, :-count], self.mask[:, :-count]

    def reorder(self, rows):
        self.cache.batch_select_indices(torch.tensor(rows))
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def through_a_file(self, path):
        self.cache.save(path)
        self.cache = flexasl.load_cache(path, self.model)

    def _given(self, count):
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.mask, "position_ids": positions[:, -count:]}

    def check(self):
        """Against the model as it is now."""
        for ids, given, real, logits in self.passes:
            want = self.model(ids, **given, use_cache=False).logits[:, -logits.shape[1] :]
            torch.testing.assert_close(logits[real], want[real], rtol=0, atol=2e-4)


def slides(model):
    return any(sliding_window(model, layer) is not None for layer in range(model.config.num_hidden_layers))


@pytest.mark.parametrize("later_turns", ["keep", "prune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_of_padding_alone_and_crops_between_turns(family, later_turns, tmp_path):
    model = tiny(family)
    with torch.no_grad():
        with flexasl.patch(model, KEEP_ALL.replace(later_turns=later_turns)):
            talk = Conversation(model)
            talk.read(30, 17, 2, pads=3)
            talk.crop(1)
            talk.cache.save(tmp_path / "after-a-crop")
            for _ in range(3):
                talk.read(1, 1, 1)
            if not slides(model):
                talk.read(9, 12, 1, pads=2)
                talk.read(1, 1, 1)
                talk.read(2, 1, 1, pads=1)
            talk.cache = copy.deepcopy(talk.cache)
            talk.read(1, 1, 1)
            talk.crop(2)
            talk.read(6, 6, 6)
            talk.reorder([2, 0])
            talk.through_a_file(tmp_path / "at-the-end")
            for _ in range(3):
                talk.read(1, 1)
        talk.check()


def test_a_crop_after_a_turn_that_was_padded_goes_on_to_a_pruned_turn():
    model = tiny()
    with torch.no_grad():
        with flexasl.patch(model, KEEP_ALL.replace(later_turns="prune")):
            talk = Conversation(model)
            talk.read(40, 9)
            talk.crop(6)
            talk.read(3, 2)
        talk.check()


@pytest.mark.parametrize("kv_budget", [None, 16])
def test_a_later_mask_cannot_bring_padding_back(kv_budget):
    model, batch, new = tiny(), left_padded(prompts(40, 25)), torch.tensor([[7, 8], [0, 9]])
    mask = torch.cat([batch["attention_mask"], torch.tensor([[1, 1], [0, 1]])], 1)
    places = {"position_ids": (mask.cumsum(1) - 1)[:, -2:]}
    careless = torch.cat([torch.ones_like(batch["input_ids"]), mask[:, -2:]], 1)
    with torch.no_grad(), flexasl.patch(model, SMALL.replace(kv_budget=kv_budget)):
        want, got = (
            model(new, attention_mask=given, **places, past_key_values=model(**batch).past_key_values).logits
            for given in (mask, careless)
        )
    assert torch.equal(want[mask[:, -2:].bool()], got[mask[:, -2:].bool()])


@pytest.mark.parametrize("config", [{}, {"kv_budget": 16}, {"kv_top_p": 0.7}])
def test_scores_do_not_pool_over_the_padding_of_earlier_turns(config):
    config = SMALL.replace(kernel_size=7, later_turns="prune", **config)
    turns = [(60, 40), (2, 5), (50, 31), (30, 40)]
    model = tiny("llama", torch.float64)

    def talk(rows):
        talk, kept = Conversation(model), []
        for lengths in turns:
            both = prompts(*lengths, seed=len(talk.passes))
            talk.read_rows([both[row] for row in rows])
            kept.append([row.kept_positions for row in patch.report.rows])
        return kept, [logits[:, -1] for *_, logits in talk.passes]

    with torch.no_grad(), flexasl.patch(model, config) as patch:
        together, logits = talk([0, 1])
        for row in (0, 1):
            alone, own = talk([row])
            assert [kept[0] for kept in alone] == [kept[row] for kept in together]
            for mine, others in zip(own, logits, strict=True):
                torch.testing.assert_close(mine[0], others[row], rtol=0, atol=1e-5)
