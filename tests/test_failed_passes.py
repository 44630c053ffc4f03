"""A pass that fails anywhere leaves a cache from which the model goes on rightly, or which it refuses."""

import copy

import pytest
import torch
from models import SMALL, decoder_layers, prompts, tiny
from transformers import DynamicCache

import flexasl
from flexasl import FlexASLError, UnsupportedError


def new():
    return torch.tensor([[5]])


HALF_FILLED = "half filled by a pass that failed; reset them"


class Failure(Exception):
    pass


def fail(*args):
    raise Failure


def parts(model):
    """[(layer, module)] of the decoder, in the order of their work."""
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        attention = next(getattr(layer, name) for name in ("self_attn", "attn") if hasattr(layer, name))
        found += [(index, layer), (index, attention), (index, layer.mlp)]
    decoder = model.get_decoder()
    return [*found, (len(decoder_layers(model)), decoder.norm if hasattr(decoder, "norm") else decoder.ln_f)]


def fails(model, module, when, ids, cache):
    handle = getattr(module, f"register_forward_{when}")(fail)
    with pytest.raises(Failure):
        model(ids, past_key_values=cache)
    handle.remove()


@pytest.mark.parametrize("when", ["pre_hook", "hook"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("slack", [0, 16])
def test_a_new_token(family, when, slack):
    model, ids = tiny(family), prompts(60)[0][None]
    with flexasl.patch(model, SMALL) as patch:
        patch.slack = slack
        cache = model(ids).past_key_values
        model(new(), past_key_values=cache)
        want = model(new(), past_key_values=copy.deepcopy(cache)).logits
        retried = []
        for index, module in parts(model):
            held = copy.deepcopy(cache)
            fails(model, module, when, new(), held)
            try:
                got = model(new(), past_key_values=held).logits
            except UnsupportedError as error:
                assert HALF_FILLED in str(error)
                with pytest.raises(FlexASLError, match="half filled"):
                    held.save("nowhere")
                held.reset()
                model(ids, past_key_values=held)
                model(new(), past_key_values=held)
                got = model(new(), past_key_values=held).logits
            else:
                retried.append(index)
                assert held.get_seq_length() == 62
            torch.testing.assert_close(got, want)
        assert set(retried) == {0}, "nothing was stored before the end of the first layer"


@pytest.mark.parametrize("later_turns", ["keep", "prune"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_prompt_and_a_later_turn(family, later_turns):
    model, (ids, turn) = tiny(family), [row[None] for row in prompts(60, 50)]
    with flexasl.patch(model, SMALL.replace(later_turns=later_turns), foreign_hooks="packed"):
        want = model(ids).past_key_values
        model(turn, past_key_values=want)
        want = model(new(), past_key_values=want).logits
        for index, module in parts(model)[3::5]:
            for tokens in (ids, turn):
                cache = DynamicCache(config=model.config) if tokens is ids else model(ids).past_key_values
                fails(model, module, "pre_hook", tokens, cache)
                assert index > 0
                with pytest.raises(UnsupportedError, match=HALF_FILLED):
                    model(tokens, past_key_values=cache)
                cache.reset()
                for part in (ids, turn):
                    model(part, past_key_values=cache)
                torch.testing.assert_close(model(new(), past_key_values=cache).logits, want)


def test_layers_that_have_read_unlike_counts():
    model, ids = tiny(), prompts(60)[0][None]
    with flexasl.patch(model, SMALL):
        cache = model(ids).past_key_values
        cache.layers[3].crop(-2)
        with pytest.raises(UnsupportedError, match=HALF_FILLED):
            model(new(), past_key_values=cache)
