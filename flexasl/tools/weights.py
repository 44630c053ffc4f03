"""Files of weights, looked at before a library reads them, and what a library says it has loaded."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flexasl import stored
from flexasl.errors import FlexASLError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of values by their codes, as `struct` writes them."""
STRING, ARRAY = 8, 9
MOST_DEPTH, MOST_DIMS = 4, 8
LAYERS = "block_count"
MOST_LETTERS = 600
"""Of what a library says."""


class _Unfit(Exception):
    """What is wrong with a file, to be said with its name."""


def check_gguf(path: Path) -> None:
    """Raises FlexASLError unless the header of a GGUF file is whole, and what it announces lies within the file.

    Reads the header alone; the work is bounded by the file's size, whatever its counts say.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _Header(file, size).check()
    except _Unfit as unfit:
        raise FlexASLError(f"model {path} cannot be loaded: {unfit}; get the file anew") from unfit


def check_safetensors(folder: Path) -> None:
    """Raises FlexASLError where a safetensors file of a folder is not whole, and where its config.json has sizes so far
    beyond those of the weights that to make such a model first, and then to refuse it, would take the whole memory."""
    from safetensors import SafetensorError, safe_open

    tensors = largest = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118, it is no dict
        except (SafetensorError, OSError) as error:
            raise FlexASLError(
                f"model {folder} cannot be loaded: a file of it is damaged, {path.name} "
                f"({type(error).__name__}: {one_line(error)}); get it anew"
            ) from error
        tensors += len(shapes)
        largest = max(largest, *map(max, filter(None, shapes)), 0)
    try:
        config = stored.read(folder / "config.json")
    except (stored.Unfit, FileNotFoundError):  # of which the library says more
        return
    for name, most in {"num_hidden_layers": tensors, "hidden_size": largest, "vocab_size": largest}.items():
        size = config.get(name) if tensors and isinstance(config, dict) else None
        if isinstance(size, int) and not 0 < size <= most:
            raise FlexASLError(
                f"model {folder} cannot be loaded: its config.json says {name}={size}, and its weights are {tensors} "
                f"tensors of at most {largest} columns; get all files of one model"
            )


def check_loaded(name: str, model: Any, told: Mapping[str, Any]) -> None:
    """Raises FlexASLError where the stored weights are not those of the model that its configuration describes.

    told is what transformers' `output_loading_info` gives: weights that are missing, have other shapes, or are
    of no use. Of the last, those count that a layer would use if it were made for them, and further layers.
    """
    shapes = {key: f" ({list(stored)}, not {list(made)})" for key, stored, made in told["mismatched_keys"]}
    wrong = sorted({*told["missing_keys"], *shapes})
    if wrong:
        raise FlexASLError(
            f"model {name} lacks {len(wrong)} of the weights that its config.json asks for, or has them in another "
            f"shape, such as {wrong[0]}{shapes.get(wrong[0], '')}; get all files of one model"
        )
    more = [] if hasattr(model.config, "quantization_config") else sorted(told["unexpected_keys"])
    unused = [key for key in more if _would_be_used(model, key)]
    if unused:
        raise FlexASLError(
            f"model {name} has {len(unused)} weights that its config.json leaves without use, such as {unused[0]}; get "
            "all files of one model"
        )


def one_line(error: BaseException) -> str:
    """All that a library says, on one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_LETTERS else f"{said[:MOST_LETTERS]}..."


def _would_be_used(model: Any, key: str) -> bool:
    """Whether a weight belongs to a module that has others, such as a bias that the config does not ask for, or to a
    layer beyond the last one."""
    modules = dict(model.named_modules())
    owner = modules.get(key.rpartition(".")[0])
    if owner is not None:
        return any(True for _ in owner.parameters(recurse=False))
    parts = key.split(".")
    for place, part in enumerate(parts):
        stack = modules.get(".".join(parts[:place]))
        if part.isdigit() and type(stack).__name__ == "ModuleList":
            return int(part) >= len(stack)  # type: ignore[arg-type]
    return False


class _Header:
    """Reads the header of a GGUF file, and never beyond the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self._size, self._order = file, size, size, "<"
        self._alignment = 32

    def check(self) -> None:
        if self._take(4) != b"GGUF":
            raise _Unfit("it does not begin as a GGUF file does")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order, version = ">", struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in (2, 3):
            raise _Unfit(f"its version is {version}, and 2 and 3 are known")
        tensors, settings = self._count("tensors", 8 + 4 + 4 + 8), self._count("settings", 8 + 4 + 1)
        for _ in range(settings):
            name = self._text()
            value = self._value(self._number("I"), 0)
            if name.endswith(LAYERS) and not (isinstance(value, int) and 0 < value <= tensors):
                raise _Unfit(f"it says {name}={value}, and has {tensors} tensors")
            if name == "general.alignment":
                if not (isinstance(value, int) and 0 < value <= 2**20):
                    raise _Unfit(f"it says {name}={value}")
                self._alignment = value
        self._check_tensors(tensors)

    def _check_tensors(self, tensors: int) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        ends = []
        for _ in range(tensors):
            name, dims = self._text(), self._number("I")
            if dims > MOST_DIMS:
                raise _Unfit(f"tensor {name!r:.80} has {dims} dimensions")
            count = 1
            for _ in range(dims):
                count *= self._number("Q")
            code, offset = self._number("I"), self._number("Q")
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(code)]
            except (ValueError, KeyError) as error:
                raise _Unfit(f"tensor {name!r:.80} is of type {code}, which is not known") from error
            ends.append((offset + count // block * size, name))
        start = self._size - self._left
        start += -start % self._alignment
        for end, name in ends:
            if start + end > self._size:
                raise _Unfit(f"it ends before its tensor {name!r:.80}")

    def _value(self, kind: int, depth: int) -> Any:
        """A number; None for what has no single one, which is passed over."""
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            self._text()
            return None
        if kind != ARRAY or depth >= MOST_DEPTH:
            raise _Unfit(f"it has a value of type {kind}, which is not known, or lists nested deep")
        inner = self._number("I")
        width = struct.calcsize(NUMBERS[inner]) if inner in NUMBERS else 8
        count = self._count("entries of a list", width)
        if inner in NUMBERS:
            self._take(count * width)
            return None
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _text(self) -> str:
        return self._take(self._count("bytes of a text", 1)).decode("utf-8", "replace")

    def _count(self, what: str, each: int) -> int:
        """A count of things that take at least so many bytes each."""
        count: int = self._number("Q")
        if count * each > self._left:
            raise _Unfit(f"it would have {count:,} {what}, and has {self._size:,} bytes in all")
        return count

    def _number(self, kind: str) -> Any:
        return struct.unpack(self._order + kind, self._take(struct.calcsize(kind)))[0]

    def _take(self, count: int) -> bytes:
        self._left -= count
        if self._left < 0:
            raise _Unfit("it ends early")
        return self._file.read(count)
