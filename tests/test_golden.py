"""Every decision of the published method, on its golden vectors (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flexasl

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]}


def rule(case):
    given = case["params"]
    settings = {
        "select_tokens": given["select_k"],
        "kv_budget": given["cache_k"],
        "kv_top_p": given["cache_p"],
        "window": given["window_size"],
        "kernel_size": given["kernel_size"],
        "pooling": given["pooling"],
        "variance_reference": "initial",
        "select_on": "last",
    }
    if given["mode"] == "fixed":
        return flexasl.ASLConfig(**settings), flexasl.policies.FixedLayer(given["select_layer"])
    adaptive = {"tau": given["tau"], "min_layer": given["L_min"], "observe_layers": given["L_obs"]}
    return flexasl.ASLConfig(**settings, **adaptive), "asl"


def states(case):
    tensors = load_file(GOLDEN / case["file"])
    return tensors, tensors["q"].float()[:, None], tensors["k"].float()[:, None]


def check(case, tensors, row):
    want = case["results"]
    for name in ("ranks", "scores", "selected"):
        setattr(row, name, None if row[name] is None else row[name].cpu())
    assert row.selected_layer == want["selected_layer"]
    assert row.scored_layers == tensors["scored_layers"].tolist()
    assert torch.equal(row.ranks, tensors["ranks"])
    torch.testing.assert_close(row.scores, tensors["scores"], rtol=1e-5, atol=0)
    assert row.eval_layers == want["eval_layers"]
    assert row.union_size == want["union_size"]
    assert row.variance == pytest.approx(want["variance"], rel=1e-5)
    assert row.variance_ratio == pytest.approx(want["variance_ratio"], rel=1e-5)
    if "selected" in tensors:
        assert row.selected.tolist() == tensors["selected"].tolist()
    else:
        assert row.selected is None
    lengths = [[len(kept) for kept in layer] for layer in row.kept_indices]
    assert lengths == want["kv_len_per_layer"]
    if "kept_indices" in tensors:
        ends = tensors["kept_lengths"].flatten().cumsum(0).tolist()[:-1]
        golden = tensors["kept_indices"].tensor_split(ends)
        order = list if case["kept_order_is_unambiguous"] else sorted
        mine = [order(kept.tolist()) for layer in row.kept_indices for kept in layer]
        assert mine == [order(kept.tolist()) for kept in golden]


@pytest.mark.parametrize("name", CASES)
def test_solo(name, device):
    case = CASES[name]
    tensors, query, key = states(case)
    config, policy = rule(case)
    check(case, tensors, flexasl.replay(query.to(device), key.to(device), config, policy)[0])


@pytest.mark.parametrize("other_length", [70, 300])
@pytest.mark.parametrize("name", CASES)
def test_in_a_batch_with_another_prompt(name, other_length, device):
    case = CASES[name]
    tensors, query, key = states(case)
    config, policy = rule(case)
    width = max(other_length, query.shape[3])
    mask = torch.zeros(2, width, dtype=torch.long)
    batched = []
    for recorded in (query, key):
        padded = torch.randn(len(recorded), 2, recorded.shape[2], width, recorded.shape[4])
        padded[:, 1:, :, width - query.shape[3] :] = recorded
        batched.append(padded)
    mask[0, width - other_length :] = 1
    mask[1, width - query.shape[3] :] = 1
    given = (recorded.to(device) for recorded in batched)
    check(case, tensors, flexasl.replay(*given, config, policy, attention_mask=mask.to(device))[1])


def test_paper_is_the_published_rule():
    case = CASES["never_snap"]
    tensors, query, key = states(case)
    given = rule(case)[0].to_dict()
    changes = {
        name: value for name, value in given.items() if name not in ("variance_reference", "select_on", "if_never")
    }
    check(case, tensors, flexasl.replay(query, key, flexasl.ASLConfig.paper(**changes))[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"attention_mask": torch.tensor([[1] * 60 + [0] * 164])}, "pad prompts on the left"),
        ({"key": torch.zeros(1, 1, 2, 8, 16)}, "do not match"),
    ],
)
def test_refuses_states_that_do_not_fit(change, problem):
    _, query, key = states(CASES["early"])
    with pytest.raises(flexasl.FlexASLError, match=problem):
        flexasl.replay(query, **({"key": key} | change))
