"""Results on disk: append-only JSONL, one file for each process, which a kill can at most leave with half a line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flexasl.errors import FlexASLError

RUN = "run.json"


class Journal:
    """All records of one kind in a folder, `<kind>-<rank>.jsonl`; this process appends to its own file.

    A half-written last line is dropped: from the own file for good, in those of others it is skipped.
    """

    def __init__(self, folder: Path, kind: str, rank: int, key: Callable[[dict[str, Any]], Any]) -> None:
        self._key = key
        self._places: dict[Any, tuple[Path, int]] = {}
        own = folder / f"{kind}-{rank}.jsonl"
        if own.exists():
            _drop_half_line(own)
        for path in sorted(folder.glob(f"{kind}-*.jsonl")):
            for place, record in _records(path):
                self._places.setdefault(key(record), (path, place))
        self._own, self._file = own, own.open("ab")

    def __contains__(self, key: Any) -> bool:
        return key in self._places

    def __getitem__(self, key: Any) -> dict[str, Any]:
        path, place = self._places[key]
        with path.open("rb") as stream:
            stream.seek(place)
            return json.loads(stream.readline())

    def append(self, *records: dict[str, Any]) -> None:
        """Write records, all with one call; when this returns, a kill no longer loses them."""
        whole, start = b"", self._file.tell()
        for record in records:
            self._places[self._key(record)] = (self._own, start + len(whole))
            whole += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file.write(whole)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_all(folder: Path, kind: str, key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Every record of a kind, of all processes, each key once."""
    found: dict[Any, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        for _, record in _records(path):
            found.setdefault(key(record), record)
    return list(found.values())


def read_keys(folder: Path, kind: str, key: Callable[[dict[str, Any]], Any]) -> set[Any]:
    """The keys of what `read_all` returns, with one record at a time in memory."""
    return {key(record) for path in sorted(folder.glob(f"{kind}-*.jsonl")) for _, record in _records(path)}


@contextmanager
def held(folder: Path, rank: int) -> Iterator[None]:
    """The folder, made if need be, for this rank alone; raises FlexASLError where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".rank-{rank}.lock", timeout=0):
            yield
    except Timeout as error:
        raise FlexASLError(f"out={folder} is in use by another evaluation; wait for it, or give another") from error


def agree(folder: Path, identity: dict[str, Any], about: dict[str, Any]) -> None:
    """Note what the results of a folder depend on, or raise FlexASLError where it holds results of something else.

    `identity` must be the same every time; `about` is kept as it was at first.
    """
    path = folder / RUN
    if not path.exists():
        write(path, json.dumps({"identity": identity, "about": about}, indent=1, ensure_ascii=False) + "\n")
    held = read_run(folder)["identity"]
    for name in identity:
        if held.get(name) != identity[name]:
            was, now = (_brief(value) for value in (held.get(name), identity[name]))
            raise FlexASLError(f"out={folder} holds results with {name}={was}, not {now}; give another folder")


def read_run(folder: Path) -> dict[str, Any]:
    """What `agree` noted; raises FlexASLError where the folder holds no evaluation."""
    if not (folder / RUN).is_file():
        raise FlexASLError(f"out={folder} holds no evaluation; give a folder that `flexasl eval` has written")
    return json.loads((folder / RUN).read_text(encoding="utf-8"))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end, and is gone if that is not reached."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".flexasl-") as folder:
        new = Path(folder) / path.name
        yield new
        os.replace(new, path)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place in bytes and content of each whole line."""
    with path.open("rb") as stream:
        place = 0
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield place, json.loads(line)
            except ValueError as error:
                raise FlexASLError(f"{path}, line {number} is damaged; remove the line to have it made anew") from error
            place += len(line)


def _drop_half_line(path: Path) -> None:
    with path.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        place = size
        while place > 0:
            start = max(0, place - 65536)
            stream.seek(start)
            end = stream.read(place - start).rfind(b"\n")
            if end >= 0:
                stream.truncate(start + end + 1)
                return
            place = start
        stream.truncate(0)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
