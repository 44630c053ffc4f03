"""The command line: what it prints where, what it refuses, and what it leaves behind."""

import copy
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_chat import save_tiny_model, tiny_tokenizer

import flexasl
from flexasl import cli, run
from flexasl.report import Report
from flexasl.tools.text import prose

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

SELECT = 100
KV_BYTES_PER_TOKEN = 6 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head dim, float32


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def document(tmp_path: Path) -> str:
    file = tmp_path / "document.txt"
    file.write_text(prose(500, tiny_tokenizer()))
    return str(file)


@pytest.fixture
def flexasl_main(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        return Outcome(caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def ask(flexasl_main, model: str, document: str):
    """`flexasl ask` about the document with the tiny model; later options win."""

    def call(*arguments: str) -> Outcome:
        given = ["--file", document, "--question", "Why?", "--model", model, "--max-new-tokens", "8"]
        budget = [] if "full" in arguments else ["--select-tokens", str(SELECT)]
        return flexasl_main("ask", *given, *budget, *arguments)

    return call


def refused(outcome: Outcome) -> str:
    """The one line on standard error, of a call that printed nothing else."""
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("flexasl: ") and outcome.err.count("\n") == 1, outcome.err
    return outcome.err


@pytest.mark.parametrize(("options", "asked"), [((), "Why?"), (("--no-rank-by-question",), None)])
def test_ask_prints_answer_then_report(ask, model: str, document: str, options, asked) -> None:
    status, out, err = ask(*options)
    assert (status, err) == (0, "")
    loaded, tokenizer = run.load_model(model)
    ids = run.question_ids(tokenizer, Path(document).read_text(), "Why?")
    config = flexasl.ASLConfig(select_tokens=SELECT)
    expected = run.answer(loaded, tokenizer, ids, max_new_tokens=8, config=config, policy="asl", question=asked)
    answer, report = out.split("policy asl")
    assert f"ranked by: {asked or 'the last 32 tokens'}\n" in report
    assert answer.strip() == expected.text != ""
    assert f"{len(ids)} tokens in, {SELECT} kept" in report


def test_json_is_one_object_and_nothing_else(ask) -> None:
    status, out, err = ask("--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert data["text"]
    assert 0 < data["first_token_seconds"] < data["total_seconds"]
    assert data["new_tokens"] == 8
    row = data["report"]["rows"][0]
    assert row["prompt_tokens"] == data["prompt_tokens"] > 500
    assert row["kept_tokens"] == SELECT
    assert data["kv_bytes"] == data["report"]["kv_bytes"] < data["prompt_tokens"] * KV_BYTES_PER_TOKEN
    assert "unpruned" not in data


def test_compare_runs_the_model_without_pruning_too(ask) -> None:
    data = json.loads(ask("--json", "--compare").out)
    plain = data["unpruned"]
    assert plain["kv_bytes"] == data["report"]["kv_bytes_full"] == data["prompt_tokens"] * KV_BYTES_PER_TOKEN
    assert plain["prompt_tokens"] == data["prompt_tokens"]
    assert "report" not in plain

    status, out, _ = ask("--compare")
    assert status == 0
    assert out.index(f"asl: {data['text']}") < out.index(f"unpruned: {plain['text']}") < out.index("policy asl")
    for words in ("time to first token", "total time", "KV cache"):
        assert words in out.split("policy asl")[1]


def test_keep_all_answers_like_the_unpruned_model(ask) -> None:
    data = json.loads(ask("--json", "--compare", "--select-tokens", "1.0").out)
    assert data["text"] == data["unpruned"]["text"]
    assert data["kv_bytes"] == data["unpruned"]["kv_bytes"]


@pytest.fixture
def saved(flexasl_main, model: str, document: str, tmp_path: Path) -> str:
    """The document, read by `flexasl prefill`."""
    path = str(tmp_path / "document.safetensors")
    status, out, err = flexasl_main(
        *("prefill", "--file", document, "--out", path, "--model", model),
        *("--select-tokens", str(SELECT), "--kv-budget", "120", "--question", "Reasons."),
    )
    assert (status, err) == (0, "")
    assert f"{SELECT} kept" in out and "ranked by: Reasons.\n" in out
    assert out.endswith(f"saved: {path}, {Path(path).stat().st_size / 2**20:,.1f} MiB\n")
    return path


@pytest.mark.parametrize("question", ["Why?", "And how?"])
def test_ask_about_a_saved_prompt(flexasl_main, model: str, document: str, saved: str, question: str) -> None:
    options = ["-q", question, "--model", model, "--max-new-tokens", "8"]
    status, out, err = flexasl_main("ask", "--cache", saved, *options)
    assert (status, err) == (0, "")
    data = json.loads(flexasl_main("ask", "--cache", saved, *options, "--json").out)
    assert out.lstrip().startswith(f"{data['text']}\n\n{saved}, read before:\npolicy asl") and data["new_tokens"] == 8
    assert data["kv_bytes"] == data["report"]["kv_bytes"] < data["report"]["kv_bytes_full"]

    loaded, tokenizer = run.load_model(model)
    text = f"{Path(document).read_text()}\n\nReasons."
    assert data["prompt_tokens"] == len(run.question_ids(tokenizer, text, question))
    ids, notes = run.opening_ids(tokenizer, Path(document).read_text(), "Reasons.")
    asking = {"tokenizer": tokenizer, "question": "Reasons."}
    with flexasl.patch(loaded, flexasl.ASLConfig(select_tokens=SELECT, kv_budget=120), **asking):
        cache = loaded(torch.tensor([ids]), use_cache=True).past_key_values
        whole = torch.tensor([ids + run.closing_ids(tokenizer, notes, question)])
        out = loaded.generate(whole, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert data["text"] == tokenizer.decode(out[0, whole.shape[1] :], skip_special_tokens=True).strip()


OPTIONS = [(("-q", "What?"), "What?"), (("--about", "What?"), "What?"), ((), "the last 32 tokens")]


@pytest.mark.parametrize(("option", "ranked_by"), OPTIONS)
def test_prefill_ranks_by_what_will_be_asked(flexasl_main, model, document, tmp_path, option, ranked_by) -> None:
    given = ["prefill", "-f", document, "--model", model, "--select-tokens", str(SELECT), "--json", *option]
    out, picture = tmp_path / "document.safetensors", tmp_path / "why.svg"
    status, printed, err = flexasl_main(*given, "--out", str(out), "--plot", str(picture))
    assert (status, err) == (0, "") and picture.read_bytes().startswith(b"<?xml")
    assert json.loads(printed)["report"]["rows"][0]["ranked_by"] == ranked_by
    held = out.read_bytes()
    for plot, words in ((str(out), "has no known format"), ("none/why.png", "make none first")):
        assert words in refused(flexasl_main(*given, "--out", str(out), "--plot", plot))
    both = str(tmp_path / "new.png")
    assert f"--plot {both} is what --out writes; give another name" in refused(
        flexasl_main(*given, "--out", both, "--plot", both)
    )
    assert out.read_bytes() == held and not Path(both).exists()


def test_everything_kept_answers_like_a_prompt_of_its_own(flexasl_main, ask, model, document, tmp_path) -> None:
    path = str(tmp_path / "whole.safetensors")
    flexasl_main("prefill", "--file", document, "--out", path, "--model", model, "--policy", "full")
    done = flexasl_main("ask", "--cache", path, "-q", "Why?", "--model", model, "--max-new-tokens", "8", "--json")
    assert json.loads(done.out)["text"] == json.loads(ask("--policy", "full", "--json").out)["text"]


def test_inspect(flexasl_main, saved: str, document: str) -> None:
    status, out, err = flexasl_main("inspect", saved)
    assert (status, err) == (0, "")
    for words in ("intact, format 1", "LlamaForCausalLM, float32", "1 row of", "about: 'Reasons.'", document, "120"):
        assert words in out
    data = json.loads(flexasl_main("inspect", saved, "--json").out)
    assert data["kv_bytes"] == data["reports"][0]["kv_bytes"] < data["bytes"] == Path(saved).stat().st_size
    assert data["tokens"] == data["reports"][0]["rows"][0]["prompt_tokens"] and data["has_token_ids"]
    assert data["model"]["settings"]["num_hidden_layers"] == 6


def test_refuses_what_is_no_saved_prompt(flexasl_main, saved: str, model: str, tmp_path: Path) -> None:
    ask = ("ask", "-q", "Why?", "--model", model, "--cache", saved)
    for option, value in [("--tau", "0.3"), ("--file", "x.txt"), ("--policy", "asl"), ("--select-tokens", "9")]:
        assert f"{option} has no effect with --cache" in refused(flexasl_main(*ask, option, value))
    for option in ("--compare", "--no-rank-by-question"):
        error = refused(flexasl_main(*ask, option))
        assert f"{option} has no effect with --cache, whose text has been read; leave it out\n" in error
    assert "dtype is 'float32'" in refused(flexasl_main(*ask, "--dtype", "bfloat16"))
    assert "none does not exist" in refused(flexasl_main("inspect", str(tmp_path / "none")))
    assert "make none first" in refused(flexasl_main("prefill", "--file", "x.txt", "--out", "none/c.safetensors"))
    damaged = bytearray(Path(saved).read_bytes())
    damaged[-1] ^= 1
    Path(saved).write_bytes(damaged)
    for command in (ask, ("inspect", saved)):
        assert "has changed since it was written" in refused(flexasl_main(*command))


@pytest.mark.parametrize("about", ["", "Numbers, and what they are for."])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", ["A text.", "It ends in a number: 12", "It ends in a line end. \n", "Ünïcode — “…”"])
def test_a_prompt_without_its_question_is_the_beginning_of_the_prompt(text: str, chat: bool, about: str) -> None:
    tokenizer = tiny_tokenizer(chat)
    ids, notes = run.opening_ids(tokenizer, text, about)
    for question in ("Why?", "12 or 13?", "[question]", "“Où?”"):
        whole = run.question_ids(tokenizer, f"{text}\n\n{about}" if about else text, question)
        assert ids + run.closing_ids(tokenizer, notes, question) == whole
    assert len(ids) >= len(tokenizer(text)["input_ids"]) - 1


def test_a_template_that_rewrites_the_message_is_refused() -> None:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = "{{ messages[0].content[:10] }}"
    with pytest.raises(flexasl.FlexASLError, match="the chat template changes the user's message"):
        run.opening_ids(tokenizer, "A text that is longer than that.")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtype(ask, name: str) -> None:
    data = json.loads(ask("--json", "--policy", "full", "--dtype", name).out)
    size = {"float32": 1, "bfloat16": 2}[name]
    assert data["kv_bytes"] == data["prompt_tokens"] * KV_BYTES_PER_TOKEN // size


def test_options_reach_the_configuration(ask) -> None:
    data = json.loads(ask("--json", "--select-tokens", "0.5", "--kv-budget", "64", "--tau", "0.125").out)
    config = data["report"]["config"]
    assert (config["select_tokens"], config["kv_budget"], config["tau"]) == (0.5, 64, 0.125)
    assert data["report"]["policy"] == "asl"
    assert data["report"]["rows"][0]["kept_tokens"] == data["prompt_tokens"] // 2


@pytest.mark.parametrize("least", [64, 256])
def test_a_quarter_of_the_prompt_is_kept_where_nothing_is_said(
    flexasl_main, model, tmp_path, monkeypatch, least
) -> None:
    monkeypatch.setattr("flexasl.tools.cli.ask.LEAST", least)
    file = tmp_path / "text.txt"
    file.write_text(prose(700, tiny_tokenizer()))
    out = flexasl_main("ask", "-f", str(file), "-q", "Why?", "--model", model, "--max-new-tokens", "1", "--json").out
    report = json.loads(out)["report"]
    (row,) = report["rows"]
    assert report["config"]["select_tokens"] == row["kept_tokens"] == max(least, row["prompt_tokens"] // 4)


def test_thousands_of_tokens(ask) -> None:
    config = json.loads(ask("--json", "--select-tokens", "4k", "--kv-budget", "0.5K").out)["report"]["config"]
    assert (config["select_tokens"], config["kv_budget"]) == (4096, 512)


def test_settings_from_a_file(ask, flexasl_main, model: str, document: str, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"select_tokens": 300, "tau": 0.75, "max_layer": 2, "kernel_size": 3}))
    found = json.loads(ask("--json", "--config", str(file)).out)["report"]["config"]
    assert (found["tau"], found["max_layer"], found["kernel_size"]) == (0.75, 2, 3)
    assert found["select_tokens"] == SELECT, "an option wins"
    out = str(tmp_path / "document.safetensors")
    options = ["--file", document, "--model", model, "--config", str(file), "--tau", "0.25", "--json"]
    found = json.loads(flexasl_main("prefill", "--out", out, *options).out)["report"]["config"]
    assert (found["tau"], found["max_layer"], found["select_tokens"]) == (0.25, 2, 300)
    both = flexasl_main("ask", "-q", "Why?", "--cache", out, "--config", str(file))
    assert "--config has no effect with --cache" in refused(both)


CALIBRATE = ("--select-tokens", "100", "--length", "400", "--samples", "1", "--tasks", "needle", "--unseen", "passkey")


def test_calibrate(flexasl_main, ask, model: str, tmp_path: Path) -> None:
    out = tmp_path / "made" / "own.json"
    out.parent.mkdir()
    status, printed, err = flexasl_main("calibrate", "--out", str(out), "--model", model, *CALIBRATE)
    assert (status, err) == (0, "")
    assert printed.startswith("# Calibration of model") and f"Settings: {out}" in printed
    names = ["own.evidence.json", "own.json", "own.md", "own.png", "own.profile.json"]
    assert sorted(file.name for file in out.parent.iterdir()) == names
    found = flexasl.ASLConfig.load(out)
    config = json.loads(ask("--json", "--config", str(out)).out)["report"]["config"]
    assert (config["max_layer"], config["tau"]) == (found.max_layer, found.tau) and found.select_tokens == SELECT


def test_calibrate_for_this_machine(flexasl_main, ask, model: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(tmp_path))
    status, printed, err = flexasl_main("calibrate", "--model", model, *CALIBRATE)
    assert (status, err) == (0, "")
    (path,) = tmp_path.rglob("*.json")
    assert printed.endswith(f"Profile: {path}\n")
    report = json.loads(ask("--json").out)["report"]
    assert str(path) in report["profile"] and report["config"]["tau"] == json.loads(path.read_text())["settings"]["tau"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "own.txt"], "out=own.txt does not end in .json"),
        (["--out", "none/own.json"], "lies in a folder that does not exist"),
        (["--out", "/proc/own.json"], "--out /proc/own.json cannot be written"),
        (["--select-tokens", "many"], "--select-tokens many is not an amount"),
        (["--length", "1k,2k"], "--length 1k,2k is several lengths"),
        (
            ["--tasks", "longbook_sum_eng"],
            "task='longbook_sum_eng' needs a file, which flexasl calibrate does not take",
        ),
        (["--unseen", "qa_1"], "task='qa_1' needs a file, which flexasl calibrate does not take"),
        (["--model", "./no/such/model"], "is neither a folder nor a GGUF file"),
        (["--samples", "0"], "samples=0 is too small"),
        (["--samples", "500001"], "samples=500001 makes 1,000,002 prompts in all; give at most 500,000"),
        (["--select-tokens", "400"], "select_tokens=400 is not smaller than a prompt"),
    ],
)
def test_calibrate_refuses(
    flexasl_main, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr("flexasl.tools.calibration.calibrating.record", None)
    given = ["--out", str(tmp_path / "own.json"), "--model", model, *CALIBRATE, *arguments]
    assert words in refused(flexasl_main("calibrate", *given))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_a_missing_extra_is_one_line(flexasl_main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(flexasl_main(command, "--out", str(tmp_path / "own.json")))
    assert f"flexasl {command} needs matplotlib; install it with: pip install 'flexasl[eval]'" in error


@pytest.mark.parametrize("arguments", [[], ["--file", "-"]])
def test_text_from_standard_input(
    flexasl_main, model: str, document: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    text = Path(document).read_text()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    _, out, _ = flexasl_main("ask", "-q", "Why?", "--model", model, "--json", "--max-new-tokens", "1", *arguments)
    assert json.loads(out)["prompt_tokens"] == len(run.question_ids(tiny_tokenizer(), text, "Why?"))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written_and_nothing_beside_it(ask, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"decision.{suffix}"
    picture.write_bytes(b"an older picture")
    assert ask("--plot", str(picture)).status == 0
    assert picture.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])
    assert sorted(file.name for file in tmp_path.iterdir()) == [picture.name, "document.txt"]


def test_html_is_a_page_of_the_prompt_and_its_answer(ask, model: str, document: str, tmp_path: Path) -> None:
    page = tmp_path / "why.HTML"
    page.write_text("an older page")
    status, out, err = ask("--html", str(page), "--json")
    assert (status, err) == (0, "")
    told, (_, tokenizer) = json.loads(out), run.load_model(model)
    ids = run.question_ids(tokenizer, Path(document).read_text(), "Why?")
    report = Report.from_dict(told["report"])
    assert page.read_text(encoding="utf-8") == report.to_html(tokenizer, ids, answer=told["text"])
    assert report.rows[0].selection_spans and "<mark" in page.read_text(encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["document.txt", page.name]


def test_html_of_a_text_that_was_read_before(flexasl_main, model: str, document: str, tmp_path: Path) -> None:
    saved, page = tmp_path / "document.safetensors", tmp_path / "why.htm"
    given = ("--model", model, "--file", document, "--select-tokens", str(SELECT), "--out", str(saved))
    assert flexasl_main("prefill", *given, "--question", "What?").status == 0
    asked = ("ask", "--cache", str(saved), "--model", model, "-q", "Why?", "--max-new-tokens", "4")
    assert flexasl_main(*asked, "--html", str(page)).status == 0
    assert "What?" in page.read_text(encoding="utf-8") and "<mark" in page.read_text(encoding="utf-8")
    over = refused(flexasl_main(*asked[:5], "-q", "Why?", "--cache", str(saved), "--html", str(saved)))
    assert "has no known format; give a name that ends in .html, .htm" in over


def test_interrupted_plot_leaves_the_old_file(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Report, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "plot", half)
    picture = tmp_path / "decision.png"
    picture.write_bytes(b"an older picture")
    assert ask("--plot", str(picture)).status == 130
    assert picture.read_bytes() == b"an older picture"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["decision.png", "document.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "best"], "policy='best' is not known; give one of asl, asl_two_pass, fixed_layer"),
        (["--select-tokens", "many"], "--select-tokens many is not an amount"),
        (["--select-tokens", "16"], "select_tokens=16"),
        (["--kv-budget", "1.5"], "kv_budget=1.5"),
        (["--tau", "0"], "tau=0"),
        (["--question", " "], "--question is empty"),
        (["--dtype", "int7"], "int7"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--file", "none.txt"], "none.txt does not exist"),
        (["--file", ""], "--file is empty"),
        (["--plot", ""], "--plot': it is empty; give a path"),
        (["--question", "Wh\udcff?"], "it is not UTF-8"),
        (["--model", __file__], "is a file that does not end in .gguf; give a folder with a model"),
        (["--plot", "/proc/picture.png"], "--plot /proc/picture.png cannot be written: "),
        (["--model", "./no/such/model"], "model ./no/such/model is neither a folder nor a GGUF file"),
        (["--model", "no-such.gguf"], "model no-such.gguf is neither a folder nor a GGUF file"),
        (["--model", "no-such-owner/no-such-model"], "model no-such-owner/no-such-model cannot be loaded"),
        (["--plot", "picture.doc"], "--plot picture.doc has no known format"),
        (["--html", "page.pdf"], "--html page.pdf has no known format; give a name that ends in .html, .htm"),
        (["--html", "none/page.html"], "--html none/page.html lies in a folder that does not exist"),
        (["--html", ""], "--html': it is empty; give a path"),
        (["--plot", "none/picture.png"], "--plot none/picture.png lies in a folder that does not exist"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_input_is_one_line(ask, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.setattr(run, "answer", None)  # no bad input may reach the model
    assert words in refused(ask(*arguments))


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "is empty"), (b"\0\1", "is binary"), (b"\xff\xfe", "is not UTF-8"), (None, "is a folder")]
)
def test_unusable_text(ask, tmp_path: Path, data: bytes | None, words: str) -> None:
    bad = tmp_path / "bad.txt"
    bad.mkdir() if data is None else bad.write_bytes(data)
    assert f"bad.txt {words}" in refused(ask("--file", str(bad)))


def test_no_text_at_a_terminal_does_not_wait(flexasl_main, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "give --file" in refused(flexasl_main("ask", "-q", "Why?"))


def test_text_longer_than_the_context(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "answer", None)
    text = prose(1200, tiny_tokenizer())
    long = tmp_path / "long.txt"
    long.write_text(text)
    length = len(run.question_ids(tiny_tokenizer(), text, "Why?"))
    error = refused(ask("--file", str(long)))
    assert f"{length} tokens" in error and "1024 tokens" in error


def test_room_for_the_answer_counts(model: str) -> None:
    loaded, _ = run.load_model(model)
    run.check_fits(loaded, 1000, 24)
    with pytest.raises(flexasl.FlexASLError, match=r"1001 tokens.*max_new_tokens=24.*1024 tokens"):
        run.check_fits(loaded, 1001, 24)


def test_prompt_of_a_model_without_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    assert tokenizer.decode(run.question_ids(tokenizer, "A text.", "Why?")) == "A text.\n\nQuestion: Why?\nAnswer:"
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(run.question_ids(tokenizer, "A text.", "Why?")) == "<user>A text.\n\nWhy?<end><assistant>"


def test_first_token_is_timed_before_the_rest_and_layers_are_counted_once(model: str, document: str) -> None:
    loaded, tokenizer = run.load_model(model)
    ids = run.question_ids(tokenizer, Path(document).read_text(), "Why?")
    layers, pieces = [], []
    answer = run.answer(
        loaded,
        tokenizer,
        ids,
        max_new_tokens=20,
        on_text=pieces.append,
        on_layer=lambda: layers.append(len(pieces)),
    )
    assert layers == [0] * 6, "one call per layer, all before the first text"
    assert "".join(pieces).strip() == answer.text
    assert 0 < answer.first_token_seconds < 0.9 * answer.total_seconds
    assert not any(module._forward_hooks for module in loaded.modules())


def test_interrupt_during_the_answer(model: str, document: str) -> None:
    command = [sys.executable, "-m", "flexasl.cli", "ask", "-f", document, "-q", "Why?", "--model", model]
    options = ["--max-new-tokens", "400", "--select-tokens", str(SELECT)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Tests that run in the background of a shell have inherited that interrupts are ignored.
    heeded = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([*command, *options], **pipes, **heeded) as process:
        assert process.stdout.read(1), "the answer streams"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"KV cache" not in out
    assert err == b""


def test_help_is_quick() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "flexasl.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ask" in done.stdout and "demo" in done.stdout
    assert "transformers" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_demo_fails_where_the_fact_is_not_found(flexasl_main, model: str) -> None:
    status, out, err = flexasl_main("demo", "--model", model, "--tokens", "700", "--select-tokens", "100")
    assert status == 1
    fact = out.partition("red fox is ")[2][:5]
    assert err == f"flexasl: the pruned answer does not contain {fact}\n"
    assert "asl: The special magic number" in out and "unpruned: The special magic number" in out
    assert "tokens in, 100 kept" in out and "time to first token" in out


@pytest.mark.slow
def test_demo_finds_the_fact(flexasl_main) -> None:
    status, out, _ = flexasl_main("demo", "--tokens", "2000")
    assert status == 0
    fact = out.partition("red fox is ")[2][:5]
    assert f"mentioned in the text is {fact}" in out.partition("asl: ")[2]
    assert "512 kept" in out
