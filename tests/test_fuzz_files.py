"""Files that are cut, edited, nested deep and of other types: each is read, or refused in one sentence.

Nothing else is ever raised, nothing goes on for ever, and no file is changed by being read.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL, prompts, tiny
from mutating import as_json, mangled, mutated
from safetensors.torch import save_file
from test_saving import described, opened, sealed

import flexasl
from flexasl import embedded, saving, weights
from flexasl.errors import FlexASLError
from flexasl.tools.evaluation import Sources, plots
from flexasl.tools.evaluation.infinitebench import from_file
from flexasl.tools.evaluation.records import ANSWERS, PROMPTS, Answered
from flexasl.tools.evaluation.runner import answer_key, prompt_key
from flexasl.tools.evaluation.samples import Sample
from flexasl.tools.evaluation.storage import Journal, read_all, read_keys, read_run
from flexasl.tools.evaluation.tables import Results, score_tables, time_tables
from flexasl.tools.text import read_text

FACTOR = int(os.environ.get("FLEXASL_FUZZ", "1"))
"""How many times more files to try: `make fuzz` sets it."""

SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {"context": "It ends in May.", "qas": [{"question": "When?", "answers": [{"text": "May"}]}]},
                {"context": "Ann pays.", "qas": [{"question": "Who?", "answers": [], "is_impossible": True}]},
            ],
        }
    ]
}
HOTPOTQA = [
    {
        "question": "Who?",
        "answer": "Ann",
        "context": [["Pay", ["Ann pays. ", "She does."]], ["End", ["In May."]]],
        "supporting_facts": [["Pay", 0]],
    }
]
INFINITEBENCH = {"id": 0, "context": "a " * 50, "input": "Which?", "answer": ["f", "A"], "options": list("fghi")}
RUN = {
    "identity": {
        "model": "tiny",
        "parameters": 1000,
        "dtype": "float32",
        "chat_template": None,
        "vocabulary": 100,
        "seed": 0,
        "together": False,
        "answer_tokens": None,
        "config": None,
        "depths": [0.0, 1.0],
        "files": {"a.txt": "0" * 64},
    },
    "about": dict.fromkeys(("device", "processor", "python", "flexasl", "torch", "transformers"), "1"),
}


def prompt(index: int) -> dict[str, Any]:
    told = {"task": "needle", "length": 100, "index": index, "prompt": "Which?", "prompt_tokens": 90, "depth": 0.5}
    return Sample(**told, references=("12",), max_new_tokens=8).to_dict()


def answer(index: int, setting: str) -> Answered:
    return Answered(
        task="needle",
        length=100,
        index=index,
        setting=setting,
        policy=setting.partition("@")[0],
        budget=None if setting == "full" else 64,
        score=float(index % 2),
        answer="12",
        depth=0.5,
        prompt_tokens=90,
        new_tokens=2,
        num_layers=6,
        kept_tokens=64,
        selected_layer=None if setting == "full" else 3,
        counted_prefill=0.5,
        kv_share=0.6,
        selections=[] if setting == "full" else [{"layer": 2, "kept_tokens": 80}, {"layer": 3, "kept_tokens": 64}],
        ranked_by="" if setting == "full" else "Which?",
        tau=0.05,
        thresholds=[(0.3, 1, 2), (0.5, 2, 4)],
        eval_layers=[2, 3],
        variance_ratio=[],
        lookup=[None, 0.6],
        first_token_seconds=0.1,
        total_seconds=0.2,
    )


def versions(value: Any, count: int) -> Iterator[bytes]:
    """Half of them edited as JSON, half of them as bytes."""
    choose = random.Random(7)
    for _ in range(count * FACTOR // 2):
        yield as_json(mangled(value, choose), choose)
    yield from mutated(json.dumps(value).encode(), count * FACTOR // 2)


def refusal(call: Callable[[], Any]) -> str | None:
    """What is said where a file is refused, in one line without control characters; None where it is read."""
    try:
        call()
    except (FlexASLError, FileNotFoundError) as error:
        said = str(error)
        assert said and said.isprintable() and len(said) < 1000, said
        return said
    return None


def tried(path: Path, made: Iterator[bytes], call: Callable[[], Any]) -> None:
    """Some are refused, each with the file's name, some may be read, and the file stays as it is."""
    refused = total = 0
    for content in made:
        path.write_bytes(content)
        said = refusal(call)
        assert path.read_bytes() == content
        assert said is None or said.startswith((str(path), f"model {path}", f"model {path.parent} ")), said
        refused, total = refused + (said is not None), total + 1
    assert 0.2 * total < refused < total or (total and refused == total)


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    settings = flexasl.ASLConfig(tau=0.3, min_layer=2, kv_budget=0.5, observe_layers=2).to_dict()
    tried(path, versions(settings, 600), lambda: flexasl.ASLConfig.load(path))
    for content in versions(settings, 200):
        path.write_bytes(content)
        refusal(lambda: flexasl.ASLConfig.load(path).resolve(6))


@pytest.mark.parametrize("value", [SQUAD, HOTPOTQA], ids=["squad", "hotpotqa"])
def test_questions(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "questions.json"
    tried(path, versions(value, 500), lambda: Sources(qa_files=(path,)))


def test_benchmark_files(tmp_path: Path) -> None:
    path = tmp_path / "code_debug.jsonl"

    def read() -> None:
        for index, _ in enumerate(records := Sources(infinitebench=tmp_path).records("code_debug") or []):
            from_file("code_debug", records, "order", index).draft(10)

    tried(path, versions(INFINITEBENCH, 500), read)


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "lease.txt"
    text = "Der Mietvertrag endet am 30. September 2031. “Übergabe” um 12 Uhr. \n" * 5
    tried(path, mutated(text.encode(), 400 * FACTOR), lambda: read_text(path))


def test_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    tried(path, versions(RUN, 500), lambda: read_run(tmp_path))


def jsonl(records: list[Any], choose: random.Random) -> bytes:
    return b"\n".join(as_json(record, choose).replace(b"\n", b" ") for record in records) + b"\n"


@pytest.mark.parametrize("kind", [PROMPTS, ANSWERS])
def test_records(tmp_path: Path, kind: str) -> None:
    """What is whole is kept: a bad last line is dropped, a bad line elsewhere is named, and nothing is changed then."""
    path, choose = tmp_path / f"{kind}-0.jsonl", random.Random(3)
    key: Any = prompt_key if kind == PROMPTS else answer_key
    settings = ["full", "asl@64"]
    whole = [answer(index, name) for index in range(3) for name in settings] if kind == ANSWERS else []
    whole = whole or [prompt(index) for index in range(6)]
    right = b"".join(json.dumps(record).encode() + b"\n" for record in whole)

    def edited() -> Iterator[bytes]:
        for _ in range(300 * FACTOR):
            at = choose.randrange(len(whole))
            yield jsonl([*whole[:at], mangled(whole[at], choose), *whole[at + 1 :]], choose)
        yield from mutated(right, 300 * FACTOR)

    def read() -> None:
        records = read_all(tmp_path, kind, key)
        assert read_keys(tmp_path, kind, key) == set(map(key, records))
        if kind == ANSWERS and records:
            results = Results(records)
            plots._sizes(results.settings)
            score_tables(results)
            if results.timed:
                time_tables(results)

    def go_on() -> None:
        journal = Journal(tmp_path, kind, 0, key)
        try:
            kept = path.read_bytes()
            assert content.startswith(kept) and kept.count(b"\n") >= content.count(b"\n") - 1
            assert all(journal[one] for one in read_keys(tmp_path, kind, key))
            new = whole[0] | {"index": 99}
            journal.append(new)
            assert journal[key(new)] == new
        finally:
            journal.close()
        assert path.read_bytes().startswith(kept)
        read()

    named = 0
    for content in edited():
        path.write_bytes(content)
        said = refusal(read)
        assert path.read_bytes() == content
        assert (refusal(go_on) is None) == (said is None)
        if said is not None:
            assert said.startswith(f"{path}, line ") and path.read_bytes() == content
            named += 1
    assert named > 100 * FACTOR


def test_manifests(tmp_path: Path) -> None:
    path = tmp_path / embedded.MANIFEST
    (tmp_path / "config.json").write_text("{}")
    embedded._write_manifest(tmp_path, tmp_path / "config.json")
    manifest = json.loads(path.read_text())
    assert embedded._intact(tmp_path, None)
    for content in versions(manifest, 300):
        path.write_bytes(content)
        assert embedded._intact(tmp_path, None) in (True, False) and path.read_bytes() == content


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF file with values and tensors of several types."""
    from gguf import GGMLQuantizationType, GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["<end>", "a", "b", "c"] * 20)
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4] * 20)
    for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((8, 32), dtype=np.float32))
    writer.add_tensor("packed", np.zeros((2, 34), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files(gguf_file: Path, tmp_path: Path) -> None:
    weights.check_gguf(gguf_file)
    content, path = gguf_file.read_bytes(), tmp_path / "made.gguf"
    header = content.index(b"packed") + 60

    def made() -> Iterator[bytes]:
        for start in mutated(content[:header], 1000 * FACTOR):
            yield start + content[header:]
        for size in range(0, header, 3):
            yield content[:size]

    tried(path, made(), lambda: weights.check_gguf(path))
    path.write_bytes(content[:-32])
    assert "it ends before its tensor 'packed'" in str(refusal(lambda: weights.check_gguf(path)))


def test_safetensors_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(8, 8), "b": torch.zeros(4, dtype=torch.int64)}, path, metadata={"format": "pt"})
    tried(path, mutated(path.read_bytes(), 500 * FACTOR), lambda: weights.check_safetensors(tmp_path))


# ---------------------------------------------------------------- saved caches


def test_saved_caches(tmp_path: Path) -> None:
    """Edited by somebody who makes the digest right: what is read can be shown, drawn and saved again."""
    pytest.importorskip("matplotlib")
    path, again, choose = tmp_path / "prompt.safetensors", tmp_path / "again.safetensors", random.Random(5)
    with flexasl.patch(tiny(), SMALL), torch.no_grad():
        cache = tiny()(prompts(64)[0][None], use_cache=True).past_key_values
        cache.save(path, notes={"title": "a contract"})
    content = path.read_bytes()

    def made() -> Iterator[bytes]:
        for number in range(400 * FACTOR):
            header, data = opened(content)
            change = (lambda c: c.update(reports=mangled(c["reports"], choose))) if number % 2 else None
            try:
                described(change or (lambda c: mangled(c, choose)))(header, data)
                yield sealed(header, data)
            except UnicodeEncodeError:
                continue
        for start in mutated(content[:3000], 200 * FACTOR):
            yield _resealed(start + content[3000:])

    read = 0

    def show() -> None:
        nonlocal read
        saved = saving.read(path)
        read += 1
        for report in saved.reports:
            text = str(report)
            assert all(line.isprintable() for line in text.split("\n"))
            if report.rows and read % 10 == 0:
                report.plot()
        saving.write(again, saved)
        assert saving.read(again).notes == saved.notes

    tried(path, made(), show)
    assert read > 20 * FACTOR


def _resealed(content: bytes) -> bytes:
    """The content with its right digest where a digest would be."""
    blank = content[: saving.PLACE] + saving.BLANK + content[saving.PLACE + 64 :]
    return blank[: saving.PLACE] + hashlib.sha256(blank).hexdigest().encode() + blank[saving.PLACE + 64 :]
