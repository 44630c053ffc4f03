"""Log-likelihoods: refused where lm_eval would take them from a pruned prompt, right in two calls."""

import sys
import types

import pytest
import torch
from models import RULES, SMALL, counting, held_columns, prefills, prompts, recompute, selected, tiny
from torch.nn.functional import cross_entropy

import flexasl


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch):
    """lm_eval's way to ask for likelihoods, and its way to ask for anything else."""
    module = types.ModuleType("lm_eval.models.huggingface")
    source = (
        "def _model_call(model, ids): return model(ids).logits\n"
        "def _loglikelihood_tokens(model, ids): return _model_call(model, ids)\n"
    )
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    return module


@pytest.mark.parametrize("propagate", ["gather", "mask"])
def test_lm_eval_is_refused_where_the_prompt_may_be_pruned(score, propagate) -> None:
    model, (ids,) = tiny(), prompts(90)
    with flexasl.patch(model, SMALL.replace(propagate=propagate)):
        with pytest.raises(
            flexasl.UnsupportedError, match=r"log-likelihoods inside a prompt of 90 tokens, .*policy='full'"
        ):
            score._loglikelihood_tokens(model, ids[None])
        assert score._model_call(model, ids[None]).shape[1] == 90, "as long as nobody scores it"
        assert score._loglikelihood_tokens(model, ids[None, :24]).isfinite().all(), "within the budget"
    for policy in ("full", "snapkv"):
        with flexasl.patch(model, counting(policy), policy):
            got = score._loglikelihood_tokens(model, ids[None])
        torch.testing.assert_close(got, model(ids[None]).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt2"])
def test_two_calls_give_the_likelihood_under_what_is_left_of_the_context(family, rule) -> None:
    """As docs/evaluation.md shows it, against the unpatched model with everything dropped masked out."""
    model, (ids,) = tiny(family, torch.float64), prompts(90)
    context, answer = ids[None, :80], ids[None, 80:]
    with flexasl.patch(model, RULES[rule]) as patch, prefills() as made:
        read = model(context, use_cache=True)
        then = model(answer, past_key_values=read.past_key_values)
    row = patch.report.rows[0]
    columns = [held_columns(layer) for layer in then.past_key_values.layers]
    logits = torch.cat([read.logits[:, -1:], then.logits[:, :-1]], 1)
    kept, before = torch.tensor(row.kept_positions), selected(made[0], 0)[:-1]
    want = recompute(model, ids[None], 80, columns, row.selected_layer, kept, before)[:, 79:-1]
    assert row.kept_tokens == 24 and row.prompt_tokens == 80
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)
    likelihood, one_prompt = (-cross_entropy(part[0], answer[0], reduction="sum") for part in (logits, want))
    torch.testing.assert_close(likelihood, one_prompt, rtol=0, atol=1e-4)
