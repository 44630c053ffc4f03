"""Main paths on the CPU and on a device, which must come to the same: a GPU where there is one, and one that is not
there, on which a tensor of the host that meets one of the device raises. `test_waits.py` counts how often host and
device wait for each other."""

import contextlib
import copy
import os

import hybrids
import pytest
import test_sharing
import torch
from models import FAMILIES, SMALL, STAGED, counting, left_padded, prompts, tiny
from pretend_gpu import Away, away, counted, here, move
from torch.utils._pytree import tree_leaves, tree_map_only

import flexasl
from flexasl.retention import top_p

pytestmark = pytest.mark.places

CLOSE = {"rtol": 0, "atol": 2e-4, "equal_nan": True}
LENGTHS, TURN = (70, 41, 55), (50, 50, 50)


class ReadsAgain(flexasl.policies.ASL):
    """Reads what it selected again, and keeps entries by attention."""

    name, second_pass = "reads_again", True
    takes = flexasl.policies.ASL.takes - {"stages", "if_never"}

    def retention(self, config, num_layers):
        return top_p(0.6, lambda layer, tokens: 12)


class Pretended:
    """The device that is not there."""

    bring, here, move, running = staticmethod(away), staticmethod(here), staticmethod(move), staticmethod(counted)

    def holds(self, states):
        return isinstance(states, Away)


class Real:
    """The device of the tests."""

    def __init__(self, device):
        self.device = device
        self.running = contextlib.nullcontext

    def bring(self, states):
        return states.to(self.device)

    def here(self, states):
        return states.cpu()

    def move(self, model):
        model.to(self.device)

    def holds(self, states):
        return states.device.type == self.device.type


@pytest.fixture(params=["not there", "real"])
def place(request, device):
    if request.param == "not there":
        return Pretended()
    if device.type == "cpu" and "FLEXASL_TEST_DEVICE" not in os.environ:
        pytest.skip("needs a GPU beside the CPU")
    return Real(device)


class Both:
    """The same model patched on the CPU and on a device."""

    def __init__(self, place, model, config, policy="asl", **how):
        self.place = place
        self.models = copy.deepcopy(model), copy.deepcopy(model)
        self.patches = [flexasl.patch(one, config, policy, **how) for one in self.models]
        place.move(self.models[1])
        self.caches = [None, None]

    @torch.no_grad()
    def read(self, **inputs):
        """The next tokens on both: what the device says, and waits there, which are counted where it is not there."""
        plain = self.models[0](**inputs, past_key_values=self.caches[0], use_cache=True)
        given = {name: self.place.bring(states) for name, states in inputs.items()}
        with self.place.running() as waits:
            out = self.models[1](**given, past_key_values=self.caches[1], use_cache=True)
        self.caches, logits = [plain.past_key_values, out.past_key_values], self.place.here(out.logits)
        mine, its = (patch.report for patch in self.patches)
        if mine is not None:
            assert [row.kept_positions for row in its.rows] == [row.kept_positions for row in mine.rows]
            assert its.kv_tokens == mine.kv_tokens and str(its).count("\n") == str(mine).count("\n")
        torch.testing.assert_close(logits, plain.logits, **CLOSE)
        return logits, waits

    def prompt(self, lengths=LENGTHS, **more):
        batch = left_padded(prompts(*lengths))
        self.mask = batch["attention_mask"]
        return self.read(**batch, **more)

    def turn(self, lengths=(1, 1, 1)):
        batch = left_padded(prompts(*lengths, seed=5))
        self.mask = torch.cat([self.mask, batch["attention_mask"]], 1)
        return self.read(input_ids=batch["input_ids"], attention_mask=self.mask)

    def change(self, change, *arguments):
        """The same change to both caches."""
        change(self.caches[0], *arguments)
        with self.place.running():
            change(self.caches[1], *map(self.place.bring, arguments))

    def check_place(self):
        """Whether all that the second cache holds is on the device."""
        held = tree_leaves([vars(layer) for layer in self.caches[1].layers])
        held = [one for one in held if isinstance(one, torch.Tensor)]
        assert held and all(map(self.place.holds, held))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["stages", "kv_budget"])
def test_every_family(place, family, name):
    both = Both(place, tiny(family), STAGED if name == "stages" else SMALL.replace(kv_budget=16))
    both.prompt()
    both.turn()
    both.turn(TURN)
    both.check_place()


@pytest.mark.parametrize("family", test_sharing.FAMILIES)
def test_models_whose_layers_share_keys_and_values(place, family):
    both = Both(place, test_sharing.sharing(family), test_sharing.STAGES.replace(kv_budget=16))
    both.prompt()
    both.turn()
    both.turn(TURN)


@pytest.mark.parametrize("family", hybrids.HYBRIDS)
def test_models_with_states(place, family):
    both = Both(place, hybrids.hybrid(family), test_sharing.STAGES)
    both.prompt()
    both.turn()


@pytest.mark.parametrize("policy", flexasl.policies.POLICIES)
def test_every_policy(place, policy):
    both = Both(place, tiny(), counting(policy, SMALL.replace(kv_budget=16)), policy)
    both.prompt((90, 61, 70))
    both.turn()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_second_pass_that_keeps_by_attention_reads_nothing(place, family):
    both = Both(place, tiny(family), SMALL.replace(kv_top_p=0.6), ReadsAgain())
    waits = both.prompt()[1]
    both.turn()
    if isinstance(place, Real):
        return
    ends = {row.reread_layers - 1 for row in both.patches[1].report.rows}
    reads = {layer: count for layer, count in waits.by_layer("read").items() if layer is not None}
    assert min(ends) > 0 and 0 not in reads, "layer 0 runs in second passes too"
    # Where one ends, all layers free what they do not keep.
    assert all(count <= 2 + (layer in ends) for layer, count in reads.items()), waits.told()


@pytest.mark.parametrize("settings", [{}, {"kv_budget": 16}, {"kv_top_p": 0.6}, {"propagate": "mask"}], ids=str)
@pytest.mark.parametrize("config", [SMALL, STAGED], ids=["variance", "lookup"])
@pytest.mark.parametrize("lengths", [LENGTHS, (70, 70, 70)], ids=str)
def test_questions(place, lengths, config, settings):
    both = Both(place, tiny(), config.replace(**settings), question=(30, 41))
    both.prompt(lengths)
    both.turn()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_caches_in_eight_bits(place, kind):
    pytest.importorskip("torchao")
    both = Both(place, tiny(), SMALL.replace(kv_budget=16, kv_dtype=kind))
    both.prompt()
    both.turn()
    both.check_place()


@pytest.mark.parametrize("name", ["stages", "kv_budget"])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_what_is_done_to_caches(place, family, name):
    both = Both(place, tiny(family), STAGED if name == "stages" else SMALL.replace(kv_budget=16))
    both.prompt()
    both.turn((3, 3, 3))
    both.change(lambda cache: cache.crop(-2))
    both.mask = both.mask[:, :-2]
    both.turn()
    both.change(lambda cache, rows: cache.batch_select_indices(rows), torch.tensor([2, 0, 0, 1]))
    both.mask = both.mask[[2, 0, 0, 1]]
    both.turn((1, 1, 1, 1))
    both.change(lambda cache: cache.batch_repeat_interleave(2))
    both.mask = both.mask.repeat_interleave(2, 0)
    both.turn((2,) * 8)
    both.check_place()


@pytest.mark.parametrize("config", [SMALL, STAGED], ids=["variance", "lookup"])
def test_replays(place, config):
    query, key = torch.randn(6, 2, 4, 80, 16), torch.randn(6, 2, 2, 80, 16)
    mask = (torch.arange(80) >= torch.tensor([[0], [20]])).long()
    want = flexasl.replay(query, key, config, attention_mask=mask)
    with place.running():
        got = flexasl.replay(*map(place.bring, (query, key)), config, attention_mask=place.bring(mask))
    for mine, its in zip(want, got, strict=True):
        for name, value in vars(mine).items():
            made = tree_map_only(torch.Tensor, place.here, getattr(its, name))
            torch.testing.assert_close(made, value, rtol=1e-4, atol=1e-4, msg=name)
        assert place.holds(its.scores) and its.selected_layer == mine.selected_layer is not None
