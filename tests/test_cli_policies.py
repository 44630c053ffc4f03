"""Policies and settings on the command line: one grammar in every subcommand, refused before a model is loaded."""

import json
from pathlib import Path

import pytest
from tiny_chat import save_tiny_model, tiny_tokenizer

from flexasl import cli, run
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.policies import POLICIES, choose
from flexasl.tools.cli import demo
from flexasl.tools.cli.options import chosen
from flexasl.tools.text import prose

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

COMMANDS = {
    "ask": ["--file", "document.txt", "--question", "Why?"],
    "prefill": ["--file", "document.txt", "--out", "out.safetensors"],
    "demo": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_tiny_model(folder / "model")
    (folder / "document.txt").write_text(prose(500, tiny_tokenizer()))
    return folder


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Exit status, standard output and standard error of a command line."""
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        return (caught.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "nope"], "policy='nope' is not known; give one of asl, asl_two_pass, "),
        (["--policy", "fixed_layer:layer=abc"], "layer='abc' is out of range"),
        (["--policy", "streaming:sinks=2.5"], "sinks=2.5 is not a whole number"),
        (["--policy", "asl:layer=3"], "policy='asl:layer=3': layer is not a setting of asl"),
        (["--policy", "asl:tau"], "policy='asl:tau': 'tau' is not a setting; give name=value"),
        (["--policy", "snapkv:tau=0.3"], "tau=0.3 would have no effect under policy 'snapkv'"),
        (["--policy", "full", "--select-tokens", "99"], "select_tokens=99 would have no effect under policy 'full'"),
        (["--policy", "asl:select_tokens=50", "--select-tokens", "99"], "contradicts policy='asl:select_tokens=50'"),
        (["--select-tokens", "4q"], "--select-tokens 4q is not an amount; give a count of tokens (512, 4k) or a share"),
    ],
)
def test_bad_policies_are_one_line_before_the_model_is_loaded(call, monkeypatch, command, options, words) -> None:
    monkeypatch.setattr(run, "load_model", None)
    status, out, err = call(command, *COMMANDS[command], *options)
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err, err
    assert "an instance" not in err


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("asl", "asl_two_pass")])
def test_tau_and_calibrated_layers_are_refused_where_they_have_no_effect(call, folder, monkeypatch, policy) -> None:
    monkeypatch.setattr(run, "load_model", None)
    (folder / "own.json").write_text('{"min_layer": 2, "max_layer": 4}')
    for options, words in (
        (["--tau", "0.3"], "tau=0.3 would have no effect"),
        (["--config", "own.json"], "min_layer=2 and max_layer=4 would have no effect"),
    ):
        status, out, err = call("ask", *COMMANDS["ask"], "--policy", policy, *options)
        assert (status, out) == (2, "") and words in err, err


@pytest.mark.parametrize("options", [["--tasks", "needle,longbook_sum_eng"], ["--tasks", "qa_1"], ["--unseen", "qa_2"]])
def test_calibrate_names_no_option_that_it_lacks(call, monkeypatch, options) -> None:
    monkeypatch.setattr(run, "load_model", None)
    status, out, err = call("calibrate", "--out", "new.json", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "needs a file, which flexasl calibrate does not take; give some of " in err
    assert "--infinitebench" not in err and "--qa-file" not in err


def test_ask_takes_what_eval_takes(call) -> None:
    given = ["ask", *COMMANDS["ask"], "--model", "model", "--max-new-tokens", "2", "--json", "--select-tokens", "0.1k"]
    for policy, wanted in (
        ("fixed_layer:layer=4", {"max_layer": 4, "select_tokens": 102}),
        ("paper", {"variance_reference": "initial", "select_on": "last", "pooling": "avgpool"}),
        ("asl:tau=0.3,min_layer=3", {"tau": 0.3, "min_layer": 3}),
    ):
        status, out, err = call(*given, "--policy", policy)
        assert (status, err) == (0, "")
        config = json.loads(out)["report"]["config"]
        assert {name: config[name] for name in wanted} == wanted


def test_demo_has_a_budget_only_where_the_policy_takes_one(call, monkeypatch) -> None:
    def answered(*given, **rest):
        if len(given) <= 5:
            raise FlexASLError("enough")
        seen.append(given[5])

    seen = []
    monkeypatch.setattr(demo, "answered", answered)
    for policy in ("full", "asl:select_tokens=300", "asl"):
        with pytest.raises(SystemExit):
            cli.main(["demo", "--model", "model", "--tokens", "700", "--policy", policy])
    assert [config.select_tokens for config in seen] == [ASLConfig().select_tokens, 300, 512]


def test_options_win_over_a_file_and_must_agree_with_the_policy(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"tau": 0.7, "window": 16, "select_tokens": 30}')
    assert chosen("asl", file=file)[1] == ASLConfig(tau=0.7, window=16, select_tokens=30)
    assert chosen("asl:tau=0.3", file=file)[1].tau == 0.3, "what comes with the policy is an option too"
    assert chosen("asl", 0.2, file=file, select_tokens="20")[1] == ASLConfig(tau=0.2, window=16, select_tokens=20)
    assert chosen("asl:window=8", select_tokens="20")[1] == ASLConfig(window=8, select_tokens=20)
    assert choose("asl:window=8,select_tokens=20")[1] == ASLConfig(window=8, select_tokens=20)
