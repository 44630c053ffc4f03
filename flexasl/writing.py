"""Files that take their place whole or not at all, and never that of somebody else's file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexasl.errors import FlexASLError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end, and is gone if that is not reached.

    Raises FlexASLError, which names `path`, where the system cannot write there.
    """
    with named(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".flexasl-") as folder:
        new = Path(folder) / path.name
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
        _sync_folder(path.parent)


def write(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system inside the `with` block become FlexASLError that names the path which was given, whatever
    files stand in for it until it is written."""
    try:
        yield
    except OSError as error:
        raise FlexASLError(f"{path} cannot be written: {error.strerror or error}") from error


def check_file(
    name: str, path: Path, *, inputs: Iterable[str | Path | None] = (), ours: Callable[[Path], bool] | None = None
) -> None:
    """Find out, before the work that makes it, whether a file can be put there: raises FlexASLError, which begins with
    name and path, where it cannot, where it is one of the files that are read (None and what does not exist are none),
    and where `ours` does not know the file that would be replaced. An empty file is nobody's."""
    what = f"{name} {path}".lstrip()
    if path.is_dir():
        raise FlexASLError(f"{what} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise FlexASLError(f"{what} is a device, not a file; give the name of a file")
    if not path.parent.is_dir():
        raise FlexASLError(f"{what} lies in a folder that does not exist; make {path.parent} first")
    for read in inputs:
        with suppress(OSError):
            if read is not None and path.samefile(read):
                raise FlexASLError(f"{what} is a file that is read; give another name")
    with named(path):
        if ours is not None and path.exists() and path.stat().st_size > 0 and not ours(path):
            raise FlexASLError(f"{what} was not written by flexasl; give another name, or remove that file")
    _check_folder(what, path.parent, path.name)


def check_folder(name: str, path: Path) -> None:
    """The same for files in a folder, which may not exist yet."""
    if os.path.lexists(path) and not path.is_dir():
        kind = "a file" if path.exists() else "a link that leads nowhere"
        raise FlexASLError(f"{name} {path} is {kind}; give a folder")
    _check_folder(f"{name} {path}", next(place for place in (path, *path.absolute().parents) if place.exists()), "x")


def beginning(path: Path, size: int = 4096) -> bytes:
    """The first bytes of a file, which tell what it is."""
    with path.open("rb") as file:
        return file.read(size)


def _check_folder(what: str, folder: Path, file: str) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".flexasl-") as made:
            (Path(made) / file).touch()
    except OSError as error:
        raise FlexASLError(f"{what} cannot be written: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Makes the renaming last through a power cut, where folders can be synced."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
