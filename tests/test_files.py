"""What commands do with files: nothing of the user's is written over, and what cannot be used is said before a model
runs."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuzz_files import RUN, answer, prompt
from test_saving import described, opened, sealed
from tiny_chat import tiny_tokenizer

import flexasl
from flexasl import calibration, cli, embedded, run, weights
from flexasl.errors import FlexASLError
from flexasl.tools.evaluation import evaluate, plan
from flexasl.tools.evaluation.records import ANSWERS, PROMPTS
from flexasl.tools.evaluation.runner import answer_key, prompt_key
from flexasl.tools.evaluation.samples import Draft, Recipe, fill
from flexasl.tools.evaluation.storage import Journal, check_folder, read_all
from flexasl.tools.text import prose, read_text

FEW: dict[str, Any] = {"tasks": ["passkey"], "lengths": [200], "samples": 1, "policies": ["full"]}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: exit status, and what it prints."""

    def main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        return caught.value.code, *capsys.readouterr()

    return main


@pytest.fixture
def refused(call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is said of a command line that is refused before a model is loaded; no file may change, come or go."""

    def main(folder: Path, *arguments: object) -> str:
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        monkeypatch.setattr(run, "load_model", None)
        status, out, err = call(*arguments)
        assert (status, out) == (2, "") and err.startswith("flexasl: ") and err.count("\n") == 1, err
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
        return err

    return main


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "lease.txt"
    file.write_text(prose(300, tiny_tokenizer()))
    return file


@pytest.fixture
def saved(call, folder: Path, document: Path, tmp_path: Path) -> Path:
    """The document, read by `flexasl prefill`."""
    path = tmp_path / "lease.safetensors"
    arguments = ("prefill", "-f", document, "--out", path, "--model", folder, "--select-tokens", 100)
    assert call(*arguments)[0] == 0
    assert call(*arguments)[0] == 0, "a saved prompt may be made anew"
    return path


# ---------------------------------------------------------------- what is written over


def test_prefill_writes_over_no_file_of_others(refused, document: Path, tmp_path: Path) -> None:
    weights_of_others, config = tmp_path / "model.safetensors", tmp_path / "own.json"
    save_file({"a": torch.zeros(9)}, weights_of_others)
    config.write_text("{}")
    os.link(document, tmp_path / "same.txt")
    prefill = ("prefill", "-f", document, "--config", config, "--out")
    for out in (document, tmp_path / "same.txt", config):
        assert f"--out {out} is a file that is read; give another name" in refused(tmp_path, *prefill, out)
    assert "model.safetensors was not written by flexasl" in refused(tmp_path, *prefill, weights_of_others)
    assert "is a device" in refused(tmp_path, *prefill, "/dev/null")


def test_pictures_are_not_drawn_over_what_is_read(refused, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = tmp_path / "drawing.svg"
    document.write_text("<svg>A text.</svg>")
    ask = ("ask", "-q", "Why?", "-f", document, "--plot", document)
    assert "drawing.svg is a file that is read" in refused(tmp_path, *ask)


@pytest.mark.parametrize("name", ["run.json", "answers-0.jsonl", "prompts-7.jsonl", "scores.md", "needle.png"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_evaluations_find_what_is_no_file_before_the_model_runs(refused, tmp_path: Path, name: str, make) -> None:
    out = tmp_path / "results"
    out.mkdir()
    (out / "run.json").write_text(json.dumps(RUN))
    (out / name).unlink(missing_ok=True)
    make(out / name)
    assert f"--out {out} holds {name}, which is not a file" in refused(tmp_path, "eval", "--out", out)


def test_a_folder_that_is_a_link_to_nowhere(refused, tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(tmp_path / "no" / "where")
    assert "is a link that leads nowhere; give a folder" in refused(tmp_path, "eval", "--out", tmp_path / "results")


NO_UTF8 = os.fsdecode(b"lease\xff")


def test_names_of_files_that_are_no_utf8(call, refused, folder: Path, document: Path, tmp_path: Path) -> None:
    file = document.rename(tmp_path / f"{NO_UTF8}.txt")
    saved = tmp_path / "lease.safetensors"
    read = ("-f", file, "--model", folder, "--select-tokens", 100)
    assert call("prefill", *read, "--out", saved)[0] == 0
    assert "lease\\xff.txt" in flexasl.saving.read(saved).notes["source"]
    tiny = ("--model", folder, "--tasks", "passkey", "--haystack", file, "--samples", 2)
    assert call("eval", *tiny, "--lengths", 200, "--policies", "full", "--out", tmp_path / NO_UTF8)[0] == 0
    assert "lease\\xff.txt" in (tmp_path / NO_UTF8 / "report.md").read_text()
    calibrated = tmp_path / f"{NO_UTF8}.json"
    assert call("calibrate", *tiny, "--length", 400, "--select-tokens", 64, "--out", calibrated)[0] == 0
    assert call("ask", "-q", "Why?", *read, "--max-new-tokens", 1, "--config", calibrated)[0] == 0
    named = tmp_path / f"{NO_UTF8}.safetensors"
    said = refused(tmp_path, "prefill", *read, "--out", named)
    assert "lease\\xff.safetensors is not UTF-8; give a name that is" in said


def test_settings_say_nothing_that_a_terminal_would_obey(refused, document: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tau": "\x1b]0;x\x07", "\x1b[31m": 1}))
    assert refused(tmp_path, "ask", "-q", "Why?", "-f", document, "--config", config)[:-1].isprintable()
    config.write_text("{")
    asked = ("ask", "-q", "Why?", "-f", document, "--config", config.rename(tmp_path / "\x1b[31m.json"))
    assert refused(tmp_path, *asked)[:-1].isprintable()


@pytest.mark.parametrize(
    ("name", "content"),
    [("own.json", '{"name": "package"}'), ("own.evidence.json", "[1]"), ("own.md", "# Notes"), ("own.png", "a photo")],
)
def test_calibrate_writes_over_no_file_of_others(refused, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    said = refused(tmp_path, "calibrate", "--out", tmp_path / "own.json")
    assert f"--out {tmp_path / name} was not written by flexasl" in said


def test_evaluations_write_over_no_file_of_others(refused, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.touch()
    assert f"--out {file} is a file; give a folder" in refused(tmp_path, "eval", "--out", file)
    (tmp_path / "notes.txt").write_text("mine")
    check_folder("out", tmp_path)
    for name in ("report.md", "needle.png", "results.jsonl", "answers-3.jsonl"):
        (tmp_path / name).write_text("mine")
        assert f"holds {name}, and no run.json" in refused(tmp_path, "eval", "--out", tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "run.json").write_text('{"scripts": {}}')
    said = refused(tmp_path, "eval", "--out", tmp_path)
    assert f"{tmp_path / 'run.json'} is not what flexasl eval wrote: identity is missing; give another folder" in said


# ---------------------------------------------------------------- what is read


def test_texts_in_place_of_saved_prompts(refused, document: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, "ask", "-q", "Why?", "--cache", document)
    assert f"{document} was not written by flexasl; give a file that flexasl prefill or cache.save wrote" in said


def test_stored_text_reaches_the_terminal_without_what_it_would_obey(call, saved: Path) -> None:
    header, data = opened(saved.read_bytes())
    evil = "\x1b]0;x\x07\u202e"

    def change(told: dict[str, Any]) -> None:
        told["flexasl"] = told["model"]["architecture"] = told["reports"][0]["policy"] = evil
        told["reports"][0]["rows"][0]["reason"] = told["reports"][0]["config"]["kv_dtype"] = evil
        told["notes"][evil] = evil

    described(change)(header, data)
    saved.write_bytes(sealed(header, data))
    status, out, _ = call("inspect", saved)
    assert status == 0 and "\\x1b]0;x\\x07\\u202e" in out
    assert all(line.isprintable() for line in out.split("\n"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda report: report["config"].update(tau="x"), "config.tau is 'x', where a number is needed"),
        (lambda report: report["rows"][0].update(lookup=[0.5]), r"rows\[0\] has no lookup for each of its eval_la"),
        (lambda report: report["rows"][0].update(lookup=[], variance=[1.0]), r"rows\[0\] has no variance"),
        (lambda report: report["rows"][0].update(kept_positions=[5, 5]), r"rows\[0\].kept_positions do not ascend"),
        (lambda report: report["rows"][0].update(selected_layer=6), r"rows\[0\] names layer 6 of 6"),
        (lambda report: report["rows"][0].update(prompt_tokens=-1), r"rows\[0\].prompt_tokens is -1"),
    ],
)
def test_reports_that_could_not_be_shown_are_refused(saved: Path, change: Callable[..., None], words: str) -> None:
    header, data = opened(saved.read_bytes())
    described(lambda told: change(told["reports"][0]))(header, data)
    saved.write_bytes(sealed(header, data))
    with pytest.raises(FlexASLError, match=f"a report in it is not one: {words}"):
        flexasl.saving.read(saved)


def test_texts_without_an_end() -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(FlexASLError, match="/dev/zero has more than 5,000 bytes"),
    ):
        patch.setattr("flexasl.tools.text.MOST_BYTES", 5000)
        read_text("/dev/zero")


@pytest.mark.parametrize("kind", [PROMPTS, ANSWERS])
@pytest.mark.parametrize(
    "bad", [b"{}", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"task": "needle", "length', b""]
)
def test_a_bad_line(tmp_path: Path, kind: str, bad: bytes) -> None:
    """At the end it is dropped, and made anew; before others it is named, and the file stays as it is."""
    path, key = tmp_path / f"{kind}-0.jsonl", prompt_key if kind == PROMPTS else answer_key
    whole = [prompt(index) if kind == PROMPTS else dict(answer(index, "full")) for index in range(3)]
    lines = [json.dumps(record).encode() + b"\n" for record in whole]
    for end in (bad + b"\n", bad):
        path.write_bytes(b"".join(lines[:2]) + end)
        assert read_all(tmp_path, kind, key) == whole[:2] and path.read_bytes().endswith(end)
        journal = Journal(tmp_path, kind, 0, key)
        journal.append(whole[2])
        journal.close()
        assert path.read_bytes() == b"".join(lines)
    path.write_bytes(lines[0] + bad + b"\n" + lines[1])
    before = path.read_bytes()
    for read in (lambda: read_all(tmp_path, kind, key), lambda: Journal(tmp_path, kind, 0, key)):
        with pytest.raises(FlexASLError, match=r"-0\.jsonl, line 2 is damaged: .*; remove the line to have it"):
            read()
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_answers_on_a_full_disk_name_their_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path, ANSWERS, 0, answer_key)
    journal.append(dict(answer(0, "full")))
    before = (tmp_path / "answers-0.jsonl").read_bytes()
    real, journal._file = journal._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(FlexASLError, match=r"answers-0.jsonl cannot be written: No space left on device"):
        journal.append(dict(answer(1, "full")))
    journal.close()
    real.close()
    assert (tmp_path / "answers-0.jsonl").read_bytes() == before
    assert answer_key(dict(answer(1, "full"))) not in journal


def test_a_stored_prompt_that_grew_is_not_run(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(plan(**FEW), *loaded, tmp_path)
    stored = tmp_path / "prompts-0.jsonl"
    (tmp_path / "answers-0.jsonl").unlink()
    monkeypatch.setattr(run, "answer", None)
    for text, words in (("a text " * 2000, "longer than the model's context"), ("", "has no tokens")):
        stored.write_text(json.dumps(json.loads(stored.read_text()) | {"prompt": text}) + "\n")
        with pytest.raises(FlexASLError, match=words):
            evaluate(plan(**FEW), *loaded, tmp_path)


def test_a_report_without_the_full_caches_answers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flexasl.tools.evaluation import report

    (tmp_path / "run.json").write_text(json.dumps(RUN))
    records = [answer(index, "asl@64") for index in range(2)]
    (tmp_path / "answers-0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report(tmp_path).is_file()


# ---------------------------------------------------------------- prompts that never end


@pytest.mark.parametrize("template", ["static text", "{{ messages[0].role }}"])
def test_a_template_that_drops_the_message_ends_at_once(loaded, tmp_path: Path, template: str) -> None:
    model, tokenizer = loaded[0], copy.copy(loaded[1])
    tokenizer.chat_template = template
    for use in (
        lambda: evaluate(plan(**FEW), model, tokenizer, tmp_path),
        lambda: calibration.calibrate(model, tokenizer, tasks=["passkey"], unseen=None, samples=2, length=400),
        lambda: run.question_ids(tokenizer, "A text.", "Why?"),
        lambda: run.opening_ids(tokenizer, "A text."),
    ):
        with pytest.raises(FlexASLError, match="the chat template changes the user's message"):
            use()


def test_a_tokenizer_that_leaves_text_out_ends_soon() -> None:
    class Deaf:
        chat_template = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 2]}

    drafted: list[int] = []

    def draft(units: int) -> Draft:
        drafted.append(units)
        return Draft("word " * units, "", ("x",))

    with pytest.raises(FlexASLError, match=r"makes 2 tokens of .* characters, so it leaves text out"):
        fill(Recipe(draft), Deaf(), 100)
    assert max(drafted) < 50_000
    assert fill(Recipe(draft, most=3), Deaf(), 100)[2] == 2


def test_more_samples_than_anybody_waits_for(loaded) -> None:
    with pytest.raises(FlexASLError, match="samples=99999999999 "):
        plan(**FEW | {"samples": 99999999999})
    with pytest.raises(FlexASLError, match="samples=99999999999 "):
        calibration.calibrate(*loaded, samples=99999999999)
    assert len(plan(**FEW | {"samples": 1000}).items()) == 1000


# ---------------------------------------------------------------- weights


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def with_settings(**settings: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return act


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            with_settings(num_hidden_layers=7),
            "lacks 9 of the weights that its config.json asks for, .* such as model.layers.6.input",
        ),
        (
            with_settings(num_hidden_layers=5),
            "has 9 weights that its config.json leaves without use, such as model.layers.5.input",
        ),
        (
            with_settings(hidden_size=10**9),
            "says hidden_size=1000000000, and its weights are 57 tensors of at most 1000",
        ),
        (with_settings(num_hidden_layers=10**9), "says num_hidden_layers=1000000000, and its weights are 57 tensors"),
        (
            with_weights(lambda held: held.pop("model.norm.weight")),
            "lacks 1 of .* such as model.norm.weight",
        ),
        (
            with_weights(lambda held: held.update({"model.norm.weight": torch.ones(65)})),
            r"or has them in another shape, such as model.norm.weight \(\[65\], not \[64\]\)",
        ),
        (
            with_weights(lambda held: held.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
            "has 1 weights that its config.json leaves without use, such as model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\7" * 100),
            r"a file of it is damaged, model.safetensors \(SafetensorError: .*get it anew",
        ),
    ],
)
def test_folders_whose_weights_are_not_the_configs(folder: Path, tmp_path: Path, change: Any, words: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    change(model)
    with pytest.raises(FlexASLError, match=f"^model {model} .*{words}"):
        run.load_model(str(model))


def test_weights_that_no_layer_would_use_do_not_matter(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "vision.weight": torch.ones(8)}
    with_weights(lambda held: held.update(more))(model)
    assert run.load_model(str(model))[0].config.num_hidden_layers == 6


def test_a_gguf_file_that_ends_early(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "cut.gguf"
    start = b"GGUF" + (3).to_bytes(4, "little")
    for content, words in (
        (start, "it ends early"),
        (start + (200).to_bytes(8, "little") + (30).to_bytes(8, "little") + b"\7\0\0", "it would have 200 tensors"),
        (b"A text.", "it does not begin as a GGUF file does"),
        (b"GGUF" + (9).to_bytes(4, "little"), "its version is 9, and 2 and 3 are known"),
    ):
        file.write_bytes(content)
        with pytest.raises(FlexASLError, match=f"^model {file} cannot be loaded: {words}"):
            run.load_model(str(file))


def test_a_conversion_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    source = tmp_path / "weights.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_find_source", lambda: source)
    for error, words in (
        (SafetensorError("I/O error: No space left on device (os error 28)"), "cannot be stored in .*No space left"),
        (KeyError("llama.block_count"), f"cannot be made of {source}: .*block_count"),
    ):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(embedded, "_convert", fail)
        with pytest.raises(FlexASLError, match=words):
            embedded.model_path()


def test_names_of_useless_weights_are_found_out_without_the_model() -> None:
    told = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": ["0.bias", "0.deep.weight", "extra"]}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model.config = object()
    with pytest.raises(FlexASLError, match=r"has 1 weights .* such as 0\.bias"):
        weights.check_loaded("m", model, told)
