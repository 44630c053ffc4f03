"""Answers made together: the same as one by one, whatever the policy, the family and the company."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, counting, prompts, tiny
from torch import nn

import flexasl
from flexasl import cli, run
from flexasl.cache import LayerCache
from flexasl.errors import FlexASLError
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.tools.evaluation import evaluate, plan, report
from flexasl.tools.evaluation.costs import layer_costs, prefill_share
from flexasl.tools.evaluation.memo import Memo, costly_modules
from flexasl.tools.evaluation.plans import Setting
from flexasl.tools.evaluation.together import answer_together

TIMES = ("first_token_seconds", "total_seconds")
PLAN: dict[str, Any] = {
    "tasks": ["passkey"],
    "lengths": [200],
    "samples": 2,
    "policies": [*flexasl.policies.POLICIES, "asl:kv_top_p=0.9", "snapkv:kv_budget=48"],
    "budgets": [64],
}


class Words:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert evaluate(plan(**PLAN), *loaded, out, together=True)
    report(out)
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def every_setting(config: flexasl.ASLConfig = SMALL, without: str = "") -> list[Setting]:
    kinds = {name: kind for name, kind in flexasl.policies.POLICIES.items() if name != without}
    made = [Setting(label=name, policy=kind(), config=counting(name, config)) for name, kind in kinds.items()]
    return [Setting(label="unpatched"), *made]


def told(answer: Any) -> tuple[Any, ...]:
    pruned = None if answer.report is None else answer.report.to_dict() | {"prefill_seconds": None}
    return answer.text, answer.prompt_tokens, answer.new_tokens, pruned


@pytest.mark.parametrize(
    "family", ["llama", "mistral_sliding", "gemma2", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2"]
)
def test_same_answers_as_one_by_one(family: str) -> None:
    model, ids = tiny(family), prompts(150)[0].tolist()
    # Where only some layers attend to the whole prompt, this one cannot run.
    settings = every_setting(without="pyramid_infer" if "sliding_attention" in _kinds(model) else "")
    said = answer_together(model, Words(), ids, settings, max_new_tokens=12)
    for setting, answer in zip(settings, said, strict=True):
        alone = run.answer(model, _Silent(), ids, max_new_tokens=12, config=setting.config, policy=setting.policy)
        assert told(answer) == told(alone), setting.label
    assert len({answer.text for answer in said}) > 2, "settings differ, or nothing was compared"


def _kinds(model: Any) -> list[str]:
    return getattr(model.config, "layer_types", None) or []


class _Silent(Words):
    """The same for `run.answer`, which also streams."""

    def decode(self, ids: Any, skip_special_tokens: bool, **rest: Any) -> str:
        return super().decode(torch.as_tensor(ids), skip_special_tokens)


@pytest.mark.parametrize(
    "change", [{"propagate": "mask"}, {"kv_budget": 20}, {"kv_top_p": 0.8}, {"select_tokens": 0.9}]
)
def test_same_answers_under_other_settings(change: dict[str, Any]) -> None:
    model, ids = tiny(), prompts(150)[0].tolist()
    config = flexasl.ASLConfig(**(SMALL.to_dict() | change))
    policies = ["asl", "fixed_layer", "full"] + ([] if "propagate" in change else ["snapkv"])
    kinds = {name: flexasl.policies.POLICIES[name] for name in policies}
    settings = [Setting(label=name, policy=kind(), config=counting(name, config)) for name, kind in kinds.items()]
    for setting, answer in zip(settings, answer_together(model, Words(), ids, settings, max_new_tokens=8), strict=True):
        alone = run.answer(model, _Silent(), ids, max_new_tokens=8, config=setting.config, policy=setting.policy)
        assert told(answer) == told(alone), setting.label


def test_rows_end_where_they_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """End-of-sequence tokens are put where some rows meet them: at once, in the middle, and never."""
    model, ids, settings = tiny(), prompts(150)[0].tolist(), every_setting()
    free = [answer.text.split() for answer in answer_together(model, Words(), ids, settings, max_new_tokens=10)]
    ends = {int(free[0][0]), *(int(words[4]) for words in free[1:6])}
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(ends))
    said = answer_together(model, Words(), ids, settings, max_new_tokens=10)
    assert len({answer.new_tokens for answer in said}) > 1 and said[0].new_tokens == 1
    for setting, answer in zip(settings, said, strict=True):
        alone = run.answer(model, _Silent(), ids, max_new_tokens=10, config=setting.config, policy=setting.policy)
        assert told(answer) == told(alone), setting.label
    assert [one.new_tokens for one in answer_together(model, Words(), ids, settings[:3], max_new_tokens=1)] == [1] * 3


def test_the_model_is_left_as_it_was() -> None:
    model, ids = tiny(), prompts(60)[0].tolist()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    answer_together(model, Words(), ids, every_setting(), max_new_tokens=3)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="stop"), Memo(60).over(costly_modules(decoder_layers(model))):
        assert any("forward" in vars(module) for module in model.modules())
        raise RuntimeError("stop")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_a_second_prefill_computes_nothing_twice() -> None:
    model, ids = tiny(), prompts(60)[0][None]
    memo, modules = Memo(60), costly_modules(decoder_layers(model))
    computed: list[str] = []
    handles = [
        layer.mlp.act_fn.register_forward_pre_hook(lambda module, args: computed.append(type(module).__name__))
        for layer in decoder_layers(model)
    ]
    with memo.over(modules), torch.no_grad():
        first = model(ids).logits
        assert memo.hits == 0 and len(computed) == 6
        again = model(ids).logits
        assert memo.hits == 6 * 5 and len(computed) == 6, "four linear maps of attention and the MLP, in each layer"
        other = model(prompts(60, seed=1)[0][None]).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(first, again) and len(computed) == 12
    assert torch.equal(other, model(prompts(60, seed=1)[0][None]).logits)


def test_what_was_written_into_is_not_remembered() -> None:
    layer, states = nn.Linear(8, 8), torch.randn(1, 5, 8)
    memo = Memo(5)
    with torch.no_grad(), memo.over({"layer": layer}):
        wanted = layer(states).clone()
        layer(states).add_(1)
        assert memo.hits == 1 and torch.equal(layer(states), wanted) and memo.hits == 1
        states.add_(1)
        assert not torch.equal(layer(states), wanted) and memo.hits == 1
        assert layer(states[:, :3]).shape == (1, 3, 8) and memo.hits == 1, "not all of the prompt's tokens"


def test_stacked_caches_hold_each_row() -> None:
    parts = []
    for entries, by_head in ((7, False), (3, True), (5, False)):
        cache = LayerCache()
        columns = torch.arange(9 - entries, 9)
        columns = columns.expand(1, 2, -1) if by_head else columns[None]
        cache.append(torch.randn(1, 2, entries, 4), torch.randn(1, 2, entries, 6), columns, None, 9)
        parts.append(cache)
    made = LayerCache.stacked(parts, slack=4)
    assert made.keys.shape == (3, 2, 7, 4) and made.values.shape == (3, 2, 7, 6) and made.seen == 9
    made.commit(*made.extend(torch.full((3, 1), 9), None, 1), 1)
    assert made._states[0].shape[2] == 11, "room was there already"
    for row, part in enumerate(parts):
        entries = part.keys.shape[2]
        assert made.valid[row].sum(-1).tolist() == [entries + 1] * 2 and bool(made.valid[row, :, -entries - 1 :].all())
        assert torch.equal(made.keys[row, :, -entries - 1 : -1], part.keys[0])
        assert torch.equal(made.values[row, :, -entries - 1 : -1], part.values[0])
        assert torch.equal(made.positions[row, :, -entries - 1 : -1], part.positions.expand(1, 2, -1)[0])
    alike = LayerCache.stacked([parts[0], parts[0]])
    assert alike.valid is None and alike.positions.dim() == 2


def test_records_are_those_of_one_by_one(loaded, finished: Path, tmp_path: Path) -> None:
    evaluate(plan(**PLAN), *loaded, tmp_path)
    report(tmp_path)
    apart, together = lines(tmp_path / "results.jsonl"), lines(finished / "results.jsonl")
    assert all(line[name] is None for line in together for name in TIMES)
    untimed = [line | dict.fromkeys(TIMES) for line in apart]
    assert untimed == together and len(together) == 2 * len(PLAN["policies"]), "full is among the policies"
    assert (tmp_path / "scores.md").read_bytes() == (finished / "scores.md").read_bytes()


def test_report_without_seconds(finished: Path) -> None:
    page = (finished / "report.md").read_text()
    assert not (finished / "times.md").exists() and "Measured time" not in page and "seconds" not in page
    assert "- answers: all of a prompt at once, without a clock" in page
    assert (finished / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_and_gone_on(loaded, finished: Path, tmp_path: Path) -> None:
    """The kill came in the middle of a prompt's lines: the rest of its settings are answered without the others."""
    for name in ("run.json", "prompts-0.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    whole = (finished / "answers-0.jsonl").read_bytes().splitlines(keepends=True)
    held = b"".join(whole[:15]) + whole[15][:50]
    (tmp_path / "answers-0.jsonl").write_bytes(held)
    seen: list[tuple[int, int]] = []
    assert evaluate(
        plan(**PLAN),
        *loaded,
        tmp_path,
        together=True,
        on_progress=lambda stage, *of: stage == "answers" and seen.append(of),
    )
    assert seen[0] == (15, len(whole)) and seen[-1] == (len(whole), len(whole))
    assert (tmp_path / "answers-0.jsonl").read_bytes() == b"".join(whole)
    report(tmp_path)
    for name in ("scores.md", "results.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_both_ways_are_not_mixed(loaded, finished: Path) -> None:
    with pytest.raises(FlexASLError, match="holds results with together=True, not False"):
        evaluate(plan(**PLAN), *loaded, finished)


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--tasks", "passkey", "--lengths", "200", "--samples", "1", "--budget", "64", "--together"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--model", str(folder), "--out", str(tmp_path / "out")])
    assert caught.value.code == 0 and "Report:" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["together"] is True


@pytest.mark.slow
def test_embedded_model_says_the_same() -> None:
    from flexasl.tools.evaluation import build
    from flexasl.tools.text import encode

    model, tokenizer = run.load_model(None)
    sample = build("needle", tokenizer, 1024)
    ids = encode(tokenizer, sample.prompt)
    settings = every_setting(flexasl.ASLConfig(select_tokens=256))
    said = answer_together(model, tokenizer, ids, settings, max_new_tokens=sample.max_new_tokens)
    costs = layer_costs(model)
    for setting, answer in zip(settings, said, strict=True):
        alone = run.answer(
            model, tokenizer, ids, max_new_tokens=sample.max_new_tokens, config=setting.config, policy=setting.policy
        )
        assert told(answer) == told(alone), setting.label
        if answer.report is not None:
            assert prefill_share(costs, answer.report) == prefill_share(costs, alone.report)
