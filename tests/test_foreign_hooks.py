"""Hooks of others on a patched model: they see what the unpatched model shows them, or the prompt is refused."""

import copy
import functools

import pytest
import torch
from models import FAMILIES, GREEDY, LAYERS, SMALL, counting, decoder_layers, left_padded, prompts, tiny
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import flexasl
from flexasl import UnsupportedError

KEEP_ALL = SMALL.replace(select_tokens=1.0)
BATCHES = {"one": (70,), "padded": (70, 41), "three": (50, 50, 33)}


def states_of(output):
    return output[0] if isinstance(output, tuple) else output


def with_states(output, hidden):
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Steering:
    """Hooks of every kind on some layers, which push rows by their number and tokens by their place, and remember what
    they saw."""

    def __init__(self, model, layers):
        self.seen = []
        push = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1))

        def before(layer, args):
            hidden = args[0].clone()
            hidden[:, -min(5, hidden.shape[1])] += push
            return (hidden, *args[1:])

        def before_with_keywords(layer, args, kwargs):
            self.seen.append(args[0])
            hidden = args[0].clone()
            hidden[-1, -3:] -= push
            return (hidden, *args[1:]), kwargs

        def after(layer, args, output):
            hidden = states_of(output).clone()
            hidden += push * torch.arange(len(hidden))[:, None, None]
            return with_states(output, hidden)

        def after_with_keywords(layer, args, kwargs, output):
            states_of(output)[0, -1] += push  # in place
            self.seen.append(states_of(output).clone())

        self.handles = []
        for layer in (decoder_layers(model)[index] for index in layers):
            self.handles += [
                layer.register_forward_pre_hook(before),
                layer.register_forward_pre_hook(before_with_keywords, with_kwargs=True),
                layer.register_forward_hook(after, always_call=True),
                layer.register_forward_hook(after_with_keywords, with_kwargs=True, prepend=True),
            ]

    def remove(self):
        for handle in self.handles:
            handle.remove()


def steered(model, run, layers=range(LAYERS)):
    """What the run gives, and what hooks saw in it."""
    hooks = Steering(model, layers)
    try:
        return run(model), hooks.seen
    finally:
        hooks.remove()


def answers(batch, **settings):
    def run(model):
        out = model.generate(**batch, max_new_tokens=4, output_logits=True, **GREEDY, **settings)
        return torch.stack(out.logits, 1)

    return run


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_hooks_see_and_give_what_they_do_unpatched(family, lengths):
    if family == "mistral" or (lengths == "three" and family not in ("llama", "gpt2")):
        pytest.skip("as llama, or as the other batches")
    model, batch = tiny(family), left_padded(prompts(*BATCHES[lengths]))
    want, saw = steered(model, answers(batch))
    with flexasl.patch(model, KEEP_ALL):
        got, seen = steered(model, answers(batch))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(got, answers(batch)(model), atol=1e-2)
    assert len(seen) == len(saw) == 2 * LAYERS * 4
    for mine, theirs in zip(seen, saw):
        assert mine.shape == theirs.shape
        real = batch["attention_mask"].bool() if mine.shape[1] > 1 else torch.ones(mine.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(mine[real], theirs[real], rtol=1e-4, atol=2e-4)


def test_padding_is_zero_to_hooks_between_layers():
    model, batch, seen = tiny(), left_padded(prompts(70, 41)), []
    handle = decoder_layers(model)[2].register_forward_hook(lambda layer, args, output: seen.extend((args[0], output)))
    with flexasl.patch(model, KEEP_ALL):
        model(**batch)
    handle.remove()
    for states in seen:
        assert not states[1, :29].any() and states[1, 29:].abs().amin(0).all()


def test_hooks_registered_before_and_after_patching_are_alike():
    model, batch = tiny(), left_padded(prompts(70, 41))
    want, _ = steered(model, answers(batch))

    def patch_inside(model):
        with flexasl.patch(model, KEEP_ALL):
            return answers(batch)(model)

    torch.testing.assert_close(steered(model, patch_inside)[0], want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("config", [SMALL, SMALL.replace(propagate="mask")], ids=["gather", "mask"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_hooks_up_to_the_selecting_layer_see_the_whole_prompt(family, config):
    """What they give is what goes on: dropping tokens is masking them out, with the same hooks."""
    model, batch, last = tiny(family), left_padded(prompts(90, 61)), 3
    policy = flexasl.policies.FixedLayer(last)
    with flexasl.patch(model, counting(policy, SMALL.replace(propagate="mask")), policy) as patch:
        want, saw = steered(model, answers(batch), range(last + 1))
        kept = [row.kept_positions for row in patch.report.rows]
    with flexasl.patch(model, counting(policy, config), policy) as patch:
        got, seen = steered(model, answers(batch), range(last + 1))
        assert [row.kept_positions for row in patch.report.rows] == kept
        assert all(row.pruned and row.selected_layer == last for row in patch.report.rows)
        assert [len(row) for row in kept] == [24, 24]
        bare = answers(batch)(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(got, bare, atol=1e-2)
    for mine, theirs in zip(seen, saw, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)
    assert seen[0].shape[:2] == (2, 90)


@pytest.mark.parametrize("policy", ["full", "snapkv", "streaming"])
def test_policies_that_drop_no_tokens_take_hooks_on_all_layers(policy):
    model, batch = tiny(), left_padded(prompts(90, 61))
    want, _ = steered(model, answers(batch))
    with flexasl.patch(model, counting(policy), policy):
        got, _ = steered(model, answers(batch))
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-4, atol=2e-4)


def test_a_layer_that_may_see_fewer_tokens_is_refused_by_name():
    model, ids, ran = tiny(), prompts(90)[0][None], []
    layers = decoder_layers(model)
    handles = [layers[0].register_forward_pre_hook(lambda *_: ran.append(1))]
    with flexasl.patch(model, SMALL):
        model(ids)
        assert len(ran) == 1
        handles.append(layers[2].register_forward_hook(lambda *_: None))
        with pytest.raises(UnsupportedError, match=r"model\.layers\.2 has a hook of others \(test_foreign_hooks\..*la"):
            model(ids)
        with pytest.raises(UnsupportedError, match=r"layer 1 may see fewer tokens .* propagate='mask'.*'packed'"):
            model.generate(**left_padded(prompts(90, 61)), max_new_tokens=2, **GREEDY)
        assert len(ran) == 1, "nothing has run"
        model(ids[:, :20])  # which nothing can be dropped from
    with flexasl.patch(model, counting("asl_two_pass"), "asl_two_pass"):
        model(ids[:, :20])
        with pytest.raises(UnsupportedError, match=r"model\.layers\.0 has a hook .* layers read again the tokens"):
            model(ids)
    refusal = pytest.raises(
        UnsupportedError, match=r"model\.layers\.2 has a hook .* layer 1 may see fewer .*; give a pr"
    )
    with flexasl.patch(model, counting("pyramid_infer"), "pyramid_infer"), refusal:
        model(ids)
    for handle in handles:
        handle.remove()


class Probe:
    """A hook that is an object, and one that is its method."""

    def __call__(self, *given):
        return None

    def look(self, *given):
        return None


@pytest.mark.parametrize("place", ["mlp", "self_attn", "self_attn.o_proj", "input_layernorm"])
def test_hooks_inside_layers_are_refused_by_name_where_prompts_are_packed(place):
    model, batch = tiny(), left_padded(prompts(70, 41))
    module = model.get_submodule(f"model.layers.4.{place}")
    name = rf"model\.layers\.4\.{place} has a hook of others"
    for register in (
        lambda: module.register_forward_hook(functools.partial(Probe().look)),
        lambda: module.register_forward_pre_hook(Probe(), with_kwargs=True),
    ):
        with flexasl.patch(model, KEEP_ALL):
            handle = register()
            with pytest.raises(UnsupportedError, match=rf"{name} \(test_foreign_hooks\.Probe.*one prompt without padd"):
                model(**batch)
            handle.remove()
            model(**batch)
        handle = register()
        with flexasl.patch(model, SMALL), pytest.raises(UnsupportedError, match=rf"{name}.* one prompt within the bud"):
            model(batch["input_ids"][:1])
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_prompt_within_the_budget_and_new_tokens_take_hooks_everywhere(family):
    model, ids = tiny(family), prompts(40)[0][None]
    batch = left_padded(prompts(70, 41))

    def run(model, cache=None):
        pushed = [0.2 * torch.randn(1, generator=torch.Generator().manual_seed(2)).item()]
        parts = [part for part in decoder_layers(model)[3].modules() if not list(part.children())]
        handles = [part.register_forward_hook(lambda part, args, out: out + pushed[0]) for part in parts]
        try:
            return answers({"input_ids": ids})(model) if cache is None else step(model, cache)
        finally:
            for handle in handles:
                handle.remove()

    def step(model, cache):
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        return model(torch.full((2, 1), 7), past_key_values=cache, **given).logits

    want, want_step = run(model), run(model, model(**batch).past_key_values)
    with flexasl.patch(model, SMALL.replace(select_tokens=1.0)):
        torch.testing.assert_close(run(model), want, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(run(model, model(**batch).past_key_values), want_step, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(want, answers({"input_ids": ids})(model), atol=1e-2)


def test_a_later_turn_shows_hooks_its_tokens():
    model, batch, more = tiny(), left_padded(prompts(60, 60)), torch.stack(prompts(7, 7, seed=9))

    def turns(model):
        cache = model(**batch).past_key_values
        return steered(model, lambda model: model(more, past_key_values=cache).logits)

    want, saw = turns(model)
    for later in ("keep", "prune"):
        with flexasl.patch(model, KEEP_ALL.replace(later_turns=later)):
            got, seen = turns(model)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
        assert [states.shape for states in seen] == [states.shape for states in saw]


def test_beams_and_steering():
    model, batch = tiny(), left_padded(prompts(60, 41))

    def beams(model):
        return model.generate(**batch, max_new_tokens=5, num_beams=3, **GREEDY).sequences

    want, _ = steered(model, beams)
    with flexasl.patch(model, KEEP_ALL):
        got, _ = steered(model, beams)
    assert torch.equal(got, want)
    assert not torch.equal(want, beams(model))


def test_foreign_hooks_packed(monkeypatch):
    monkeypatch.setattr("flexasl.rows.GROUP", 80)
    model, seen, inside = tiny(), [], []
    layer, deeper = model.model.layers[1], model.model.layers[5]
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2]))),
        layer.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape[:2]))),
        layer.mlp.register_forward_hook(lambda _, args, output: inside.append(output.shape[1])),
        deeper.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2]))),
    ]
    batch = left_padded(prompts(90, 61, 9, 33))
    with flexasl.patch(model, counting("fixed_layer"), "fixed_layer:layer=1", foreign_hooks="packed"):
        model(**batch)
    for handle in handles:
        handle.remove()
    assert seen == [(1, 193), (1, 24 * 3 + 9), (1, 24 * 3 + 9)]
    assert inside == [90, 70, 33]
    for wrong in ("padded", None, True):
        with pytest.raises(flexasl.ConfigError, match=rf"foreign_hooks={wrong!r} is not known; give 'refuse' or 'pa"):
            flexasl.patch(model, foreign_hooks=wrong)


def test_gradients_reach_backward_hooks_of_layers():
    model, batch = copy.deepcopy(tiny()), left_padded(prompts(40, 40))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]

    def gradients(model):
        given, seen = embeds.clone().requires_grad_(), []
        layer = model.model.layers[2]
        handle = layer.register_full_backward_hook(lambda layer, before, after: seen.append(after[0]))
        try:
            out = model(inputs_embeds=given, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            out.logits[:, -1].square().mean().backward()
        finally:
            handle.remove()
        return given.grad[mask.bool()], seen[0][mask.bool()]

    want = gradients(model)
    with flexasl.patch(model, KEEP_ALL):
        for mine, theirs in zip(gradients(model), want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
        handle = model.model.layers[2].mlp.register_full_backward_hook(lambda *_: None)
        with torch.no_grad():
            model(**batch)  # in which it is not called
        with pytest.raises(UnsupportedError, match=r"model\.layers\.2\.mlp has a hook of others"):
            model(**batch)
        handle.remove()


def test_global_hooks_are_hooks_inside_layers():
    model, batch = tiny(), left_padded(prompts(40, 25))
    handle = register_module_forward_hook(lambda *_: None)
    try:
        with flexasl.patch(model, KEEP_ALL):
            model(batch["input_ids"][:1])
            with pytest.raises(UnsupportedError, match="has a hook of others"):
                model(**batch)
    finally:
        handle.remove()


def test_hooks_that_look_at_no_rows_go_on_working():
    model, batch = copy.deepcopy(tiny()), left_padded(prompts(40, 25))
    prune.random_unstructured(model.model.layers[5].mlp.up_proj, "weight", amount=0.2)
    parametrizations.weight_norm(model.model.layers[4].mlp.gate_proj)
    want = model(**batch, output_hidden_states=True).logits
    with FlopCounterMode(display=False), flexasl.patch(model, KEEP_ALL):
        got = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


def test_a_hook_that_changes_the_number_of_tokens_is_refused():
    model, ids = tiny(), prompts(40)[0][None]
    handle = model.model.layers[1].register_forward_hook(lambda layer, args, out: torch.cat([out, out], 1))
    refusal = pytest.raises(UnsupportedError, match=r"hidden states are \[2, 80, 64\] where \[2, 40\] tokens came in")
    with flexasl.patch(model, KEEP_ALL), refusal:
        model(ids.repeat(2, 1))
    handle.remove()


def test_a_removed_patch_leaves_the_forward_that_came_after_it():
    model, ids = copy.deepcopy(tiny()), prompts(40)[0][None]
    want, layer, ran = model(ids).logits, model.model.layers[2], []
    patch = flexasl.patch(model, KEEP_ALL)
    inner = layer.forward

    def outer(*args, **kwargs):
        ran.append(1)
        return inner(*args, **kwargs)

    layer.forward = outer
    patch.remove()
    assert layer.forward is outer
    assert torch.equal(model(ids).logits, want) and ran == [1]


def test_compiled_layers_take_hooks_around_them_and_refuse_those_inside(monkeypatch):
    monkeypatch.setattr("flexasl.compiling.inductor", lambda graph, inputs: graph.forward)
    model = copy.deepcopy(tiny())
    batch = left_padded(prompts(60, 41))
    want, saw = steered(model, answers(batch))
    with flexasl.patch(model, KEEP_ALL, compile=True):
        got, seen = steered(model, answers(batch))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert [states.shape for states in seen] == [states.shape for states in saw]
        cache = model(**batch).past_key_values
        handle = model.model.layers[3].mlp.register_forward_hook(lambda *_: None)
        token, mask = torch.full((2, 1), 7), torch.ones(2, 61, dtype=torch.long)
        for run in (
            lambda: model(batch["input_ids"][:1]),
            lambda: model(token, attention_mask=mask, past_key_values=cache),
        ):
            with pytest.raises(UnsupportedError, match=r"layers\.3\.mlp has a hook .* compile=True runs layers as gra"):
                run()
        handle.remove()
        model(token, attention_mask=mask, past_key_values=cache)
