"""Results on disk: append-only JSONL, one file for each process, which a kill can at most leave with half a line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flexasl import stored, writing
from flexasl.errors import FlexASLError
from flexasl.tools.evaluation.records import ANSWERS, PROMPTS, Run, check

RUN = "run.json"
RESULTS, SCORES, TIMES, REPORT = "results.jsonl", "scores.md", "times.md", "report.md"
PICTURES = ("pareto.png", "needle.png", "layers.png", "decisions.png")


class Journal:
    """All records of one kind in a folder, `<kind>-<rank>.jsonl`; this process appends to its own file.

    A last line that is half written, or otherwise no record, is dropped: from the own file for good, in those of others
    it is skipped. Any other line that is no record raises FlexASLError, and the file stays as it is.
    """

    def __init__(self, folder: Path, kind: str, rank: int, key: Callable[[dict[str, Any]], Any]) -> None:
        self._key, self._kind = key, kind
        self._places: dict[Any, tuple[Path, int]] = {}
        self._own = folder / f"{kind}-{rank}.jsonl"
        self._end = 0
        for path in sorted(folder.glob(f"{kind}-*.jsonl")):
            for place, size, record in _records(path, kind):
                self._places.setdefault(key(record), (path, place))
                if path == self._own:
                    self._end = place + size
        with writing.named(self._own):
            self._file = self._own.open("ab", buffering=0)
            self._file.truncate(self._end)

    def __contains__(self, key: Any) -> bool:
        return key in self._places

    def __getitem__(self, key: Any) -> dict[str, Any]:
        path, place = self._places[key]
        with path.open("rb") as stream:
            stream.seek(place)
            return check(self._kind, stored.parse(stream.readline()))

    def append(self, *records: dict[str, Any]) -> None:
        """Write records, all or none of them; when this returns, a kill no longer loses them.

        Raises FlexASLError where they cannot be written.
        """
        whole, places = b"", {}
        for record in records:
            check(self._kind, record)
            places[self._key(record)] = (self._own, self._end + len(whole))
            whole += stored.dump(record).encode() + b"\n"
        with writing.named(self._own):
            try:
                left = memoryview(whole)
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._end += len(whole)
        self._places |= places

    def close(self) -> None:
        self._file.close()


def read_all(folder: Path, kind: str, key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Every record of a kind, of all processes, each key once."""
    found: dict[Any, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        for *_, record in _records(path, kind):
            found.setdefault(key(record), record)
    return list(found.values())


def read_keys(folder: Path, kind: str, key: Callable[[dict[str, Any]], Any]) -> set[Any]:
    """The keys of what `read_all` returns, with one record at a time in memory."""
    return {key(record) for path in sorted(folder.glob(f"{kind}-*.jsonl")) for *_, record in _records(path, kind)}


def check_folder(name: str, folder: Path) -> None:
    """Raises FlexASLError, which begins with the name of an option or argument and the path, where an evaluation cannot
    put its results there: see `writing.check_folder`. A folder that holds other things will do, but not one that holds
    files of the same names which no evaluation has written."""
    writing.check_folder(name, folder)
    journals = [file.name for kind in (PROMPTS, ANSWERS) for file in folder.glob(f"{kind}-*.jsonl")]
    made = (RESULTS, SCORES, TIMES, REPORT, *PICTURES, *journals)
    for own in (RUN, *made):
        if os.path.lexists(folder / own) and not (folder / own).is_file():
            raise FlexASLError(f"{name} {folder} holds {own}, which is not a file; give another folder")
    if (folder / RUN).exists():
        read_run(folder)
        return
    for own in made:
        if (folder / own).exists():
            raise FlexASLError(
                f"{name} {folder} holds {own}, and no {RUN} that says it is of an evaluation; give another folder"
            )


@contextmanager
def held(folder: Path, rank: int) -> Iterator[None]:
    """The folder, made if need be, for this rank alone; raises FlexASLError where another process has it, and where
    `check_folder` refuses it."""
    check_folder("out", folder)
    with writing.named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".rank-{rank}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise FlexASLError(f"out={folder} is in use by another evaluation; wait for it, or give another") from error
    try:
        yield
    finally:
        lock.release()


def agree(folder: Path, identity: dict[str, Any], about: dict[str, Any]) -> None:
    """Note what the results of a folder depend on, or raise FlexASLError where it holds results of something else.

    `identity` must be the same every time; `about` is kept as it was at first.
    """
    path = folder / RUN
    if not path.exists():
        writing.write(path, stored.dump({"identity": identity, "about": about}, indent=1) + "\n")
    held = read_run(folder)["identity"]
    for name in identity:
        if held.get(name) != identity[name]:
            was, now = (_brief(value) for value in (held.get(name), identity[name]))
            raise FlexASLError(f"out={folder} holds results with {name}={was}, not {now}; give another folder")


def read_run(folder: Path) -> dict[str, Any]:
    """What `agree` noted; raises FlexASLError where the folder holds no evaluation."""
    path = folder / RUN
    if not path.is_file():
        raise FlexASLError(f"out={folder} holds no evaluation; give a folder that `flexasl eval` has written")
    try:
        run: dict[str, Any] = stored.read(path, Run)
    except stored.Unfit as error:
        raise FlexASLError(f"{path} is not what flexasl eval wrote: {error}; give another folder") from error
    return run


def _records(path: Path, kind: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Place and size in bytes, and content, of each line."""
    bad: tuple[int, stored.Unfit] | None = None
    for number, (place, line) in enumerate(stored.lines(path), 1):
        if bad is not None:
            raise FlexASLError(f"{path}, line {bad[0]} is damaged: {bad[1]}; remove the line to have it made anew")
        if not line.endswith(b"\n"):
            return
        try:
            record = check(kind, stored.parse(line))
        except stored.Unfit as error:
            bad = number, error
        else:
            yield place, len(line), record


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
