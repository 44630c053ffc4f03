"""Model folders, files, devices and templates that cannot be used: one sentence each, with the whole reason."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chat import tiny_tokenizer

import flexasl
from flexasl import embedded, loading, run, text
from flexasl.errors import FlexASLError

pytestmark = pytest.mark.cpu("loads models from files")


def _file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        if content is not None:
            (model / name).write_bytes(content)

    return change


def _without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _cut_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _settings(name: str, **changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _config(**changes: object) -> Callable[[Path], None]:
    return _settings("config.json", **changes)


def _generation(**changes: object) -> Callable[[Path], None]:
    return _settings("generation_config.json", **changes)


def _folder_of_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def _longer_vocabulary(model: Path) -> None:
    file = model / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["vocab"] = {word: place + 5000 for word, place in told["model"]["vocab"].items()}
    file.write_text(json.dumps(told))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer too many": (_config(num_hidden_layers=7), "lacks 9 of the weights .* such as model.layers.6"),
    "wider": (_config(hidden_size=128), "lacks .* or has them in another shape"),
    "no number": (_config(hidden_size="many"), "'hidden_size' expected int, got str"),
    "no heads": (_config(num_attention_heads=0), "ZeroDivisionError"),
    "unknown": (_config(model_type="zebra"), "model type `zebra` but Transformers does not recognize"),
    "encoder and decoder": (
        _config(model_type="t5"),
        r"T5Config'> for this kind of AutoModel: AutoModelForCausalLM\.$",
    ),
    "own code": (
        _config(model_type="mine", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        "brings code of its own, which would have to be run; load it in Python",
    ),
    "no config": (_file("config.json", None), "is a folder without a config.json; give a folder with a model"),
    "half a config": (_file("config.json", b'{"a": '), "not a valid JSON file"),
    "a list": (_file("config.json", b"[]"), "cannot be loaded: .*model_type"),
    "no weights": (_file("model.safetensors", None), "no file named model.safetensors"),
    "weights cut": (_cut_weights, r"a file of it is damaged, .*\(SafetensorError: .*header"),
    "no tokenizer": (_without_tokenizer, "need to have sentencepiece or tiktoken installed"),
    "half a tokenizer": (_file("tokenizer.json", b'{"a": '), "cannot be loaded: "),
    "another tokenizer": (_file("tokenizer.json", b'{"a": 1}'), "a file of it is damaged"),
    "no width": (_config(hidden_size=0), "its config.json says hidden_size=0"),
    "a folder of weights": (_folder_of_weights, r"a file of it is damaged, model.safetensors \(OSError"),
    "a longer vocabulary": (
        _longer_vocabulary,
        r"cannot answer: its tokenizer has ids such as 50\d\d, and it 1000 tokens",
    ),
    "a length that is none": (
        _settings("tokenizer_config.json", model_max_length="long"),
        "cannot answer: .*TypeError",
    ),
    "an end that is none": (_generation(eos_token_id="end"), "cannot answer: a file of it is damaged.*TypeError"),
    "an end beyond": (_generation(forced_eos_token_id=5000), "cannot answer: .*IndexError"),
    "a penalty below 0": (_generation(repetition_penalty=-2.0), "cannot answer: `penalty` has to be"),
    "words of no kind": (_generation(bad_words_ids=3), "cannot answer: `bad_words_ids` has to be"),
}


def test_answers_are_greedy_whatever_the_model_asks_for(folder: Path, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = [{}, {"num_beams": 3}, {"use_cache": False}, {"stop_strings": ["no such words"]}]
    said = []
    for number, settings in enumerate(asked):
        model = tmp_path / str(number)
        shutil.copytree(folder, model)
        _generation(**settings)(model)
        loaded, tokenizer = run.load_model(str(model))
        ids = list(range(3, 203))
        config = flexasl.ASLConfig(select_tokens=64)
        for policy in (None, "asl"):
            given = run.answer(loaded, tokenizer, ids, max_new_tokens=6, config=config, policy=policy)
            said.append((policy, given.text, given.kv_bytes))
    assert said == said[:2] * len(asked)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_sentence(folder: Path, tmp_path: Path, kind: str, capfd) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    change, words = BROKEN[kind]
    change(model)
    with pytest.raises(FlexASLError, match=words) as caught:
        run.load_model(str(model))
    said = str(caught.value)
    assert said.startswith(f"model {model} ") and "\n" not in said
    assert capfd.readouterr().out == "", "nobody is asked anything"


@pytest.mark.parametrize("name", ["", ".", "none/of/these", "./none", "none.gguf", "owner/no name", "-x"])
def test_names_that_are_no_model(name: str) -> None:
    with pytest.raises(FlexASLError, match="give a folder with a model"):
        run.load_model(name)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_files_need_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else True)
    for load in (lambda: run.load_model(str(file)), lambda: embedded._convert(file, tmp_path)):
        with pytest.raises(
            FlexASLError, match=rf"needs {package}; install it with: pip install 'flexasl\[transformers\]'"
        ):
            load()


def test_a_file_that_is_no_gguf_file(tmp_path: Path) -> None:
    for name, words in (("model.txt", "does not end in .gguf"), ("model.gguf", "cannot be loaded: ")):
        (tmp_path / name).write_text("A text.")
        with pytest.raises(FlexASLError, match=words):
            run.load_model(str(tmp_path / name))


def test_converters_bars_are_off(capfd) -> None:
    from transformers import modeling_gguf_pytorch_utils as converter

    with loading.no_progress_bars():
        list(converter.tqdm(range(3), desc="Converting"))
    assert capfd.readouterr().err == ""
    list(converter.tqdm(range(3), desc="Converting"))
    assert "Converting" in capfd.readouterr().err, "as before"


@pytest.mark.parametrize("name", ["", "meta", "abacus", "cpu:x", "cuda:99", "hpu", "mps:3"])
def test_devices_that_compute_nothing(name: str) -> None:
    with pytest.raises(FlexASLError, match=f"device='{name}' cannot be used here: "):
        loading.find_device(name)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no users here') }}", r"cannot be used \(TemplateError: no users here\)"),
        ("{% for %}", r"cannot be used \(TemplateSyntaxError: "),
        ("{{ 1 + 'a' }}", r"cannot be used \(TypeError: "),
        ("static text", "changes the user's message"),
        ("{{ messages[0].content[:10] }}", "changes the user's message"),
    ],
)
def test_templates_that_cannot_be_used(template: str, words: str) -> None:
    from flexasl.tools.evaluation.tasks import build

    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = template
    message = "A text that is longer than that."
    for use in (
        lambda: text.prompt_ids(tokenizer, message),
        lambda: run.question_ids(tokenizer, message, "Why?"),
        lambda: run.opening_ids(tokenizer, message),
        lambda: build("needle", tokenizer, 400),
        lambda: text.needle_prompt(tokenizer, 400, 0.5, "A needle.", "Where?"),
    ):
        with pytest.raises(FlexASLError, match=words):
            use()


def test_a_template_may_strip_the_message() -> None:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = "<user>{{ messages[0].content | trim }}<end>"
    assert text.through_template(tokenizer, " A text.\n") == "<user>A text.<end>"
