"""A read prompt as one file: safetensors, written whole or not at all, and checked before anything is built from it.

The file is plain safetensors with one fixed place: its header starts with the SHA-256 of all other bytes, so that a
changed bit anywhere is found. A digest is no signature: every shape, dtype and bound is checked besides, and nothing in
the file is ever run.

Format version 2 has scales of keys and values in eight bits, version 3 has layers with states, in place of keys and
values or beside them; a file without either is of version 1.

Shapes: B batch, G KV heads, N entries of a layer, D head dim of keys or of values, S positions of the sequence so far.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexasl import __version__, writing
from flexasl.errors import FlexASLError
from flexasl.quantizing import NUMBERS, SCALES, name_of
from flexasl.report import Report
from flexasl.stored import Count, Range, Unfit, dump, fit, parse

FORMAT, PLAIN, SCALED, STATEFUL = "flexasl cache", "1", "2", "3"
"""What a file says it is, and the versions of it."""
BEGINNING = b'{"__metadata__":{"digest":"'
"""Of every header; the digest follows."""
PLACE, BLANK = 8 + len(BEGINNING), b"0" * 64
"""Where in the file the digest is, and what stands for it while it is computed."""
MOST_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}
STATES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *NUMBERS.values())
STATES_AND_SCALES = ("keys", "values", "key_scales", "value_scales")
STATE = "state."
"""What the names of states begin with."""


@dataclass(frozen=True, kw_only=True)
class SavedLayer:
    """What one layer remembers."""

    stored: tuple[Tensor, ...] = ()
    """Keys [B, G, N, D] and values [B, G, N, D of values] of one dtype, floating point or of eight bits; if of eight
    bits, then also the scales of both, [B, G, N, 1] float16. Empty for a layer without keys."""
    positions: Tensor | None = None
    """[B, N] or [B, G, N] int64: the position that each entry came from, ascending among valid entries."""
    valid: Tensor | None = None
    """Bool like `positions`; None where every entry is valid."""
    uncroppable: int = 0
    """Positions that cannot be cropped."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """States [B, ...] in floating point, by name."""

    @property
    def keys(self) -> Tensor:
        return self.stored[0]

    @property
    def values(self) -> Tensor:
        return self.stored[1]


@dataclass(frozen=True, kw_only=True)
class SavedCache:
    """What a file holds."""

    layers: tuple[SavedLayer, ...]
    seen: int
    """S."""
    token_ids: Tensor | None
    """[B, S] int64; None where the model was given embeddings."""
    attention_mask: Tensor | None
    """[B, S] bool, False at padding; None where there is none."""
    model: dict[str, Any]
    """Fingerprint of the model, by the integration that knows it."""
    reports: tuple[Report, ...]
    """One for each prefill, oldest first."""
    notes: dict[str, str] = field(default_factory=dict)
    """Strings that whoever saved it wanted to keep with it."""
    flexasl: str = __version__
    """Version of the library that wrote it."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with their scales, and of states."""
        return sum(one.nbytes for layer in self.layers for one in (*layer.stored, *layer.states.values()))

    @property
    def version(self) -> str:
        """Of the format that a file of it has."""
        if any(layer.states or not layer.stored for layer in self.layers):
            return STATEFUL
        return SCALED if any(len(layer.stored) > 2 for layer in self.layers) else PLAIN


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What a file's header says in JSON."""

    flexasl: str
    seen: Annotated[int, Range(1)]
    uncroppable: list[Count]
    model: dict[str, Any]
    reports: list[Any]
    notes: dict[str, str]


def write(path: str | os.PathLike[str], saved: SavedCache) -> None:
    """Writes the file beside its place and renames it, so that `path` holds the old file or the new one, whole.

    Memory: one tensor at a time is on the host. Raises `FlexASLError`, before anything is written, where `read` would
    refuse the file, where its folder does not exist, and where it would replace a file that is no saved cache; later
    where the system cannot write it.
    """
    path = Path(path)
    check_target(path)
    # Wider elements first, so that each tensor starts at a multiple of its element's size and can be mapped.
    tensors = dict(sorted(_tensors(saved).items(), key=lambda item: -item[1].element_size()))
    try:
        fit(_Description, _describe(saved))
        description = dump(_describe(saved))
        _build(parse(description), tensors)
    except (TypeError, ValueError) as error:  # the reader's own, and those of values that JSON has no word for
        raise FlexASLError(f"{path} could not be read again, so nothing is written: {error}") from error
    header = _header(saved, description, tensors)
    with writing.replaced(path) as made, made.open("wb") as file:
        digest = hashlib.sha256()
        for piece in _pieces(header, tensors):
            digest.update(piece)
            file.write(piece)
        file.seek(PLACE)
        file.write(digest.hexdigest().encode())


def check_target(path: Path, name: str = "", inputs: tuple[str | Path | None, ...] = ()) -> None:
    """Raises `FlexASLError`, which begins with the name of an option and the path, where no cache can be saved there:
    see `writing.check_file`. safetensors opens names in UTF-8 alone."""
    try:
        os.fsencode(path).decode()
    except UnicodeError as error:
        raise FlexASLError(f"{f'{name} {path}'.lstrip()} is not UTF-8; give a name that is") from error
    writing.check_file(name, path, inputs=inputs, ours=_ours)


def refuse_foreign(path: str | os.PathLike[str]) -> None:
    """Raises `FlexASLError` for a file that was not written by `write`, and FileNotFoundError where there is none, by
    its first bytes."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist; give a file that cache.save wrote")
    if not os.path.isfile(path):
        raise FlexASLError(f"{os.fspath(path)} is not a file; give a file that cache.save wrote")
    if not _ours(Path(path)):
        raise FlexASLError(
            f"{os.fspath(path)} was not written by flexasl; give a file that flexasl prefill or cache.save wrote"
        )


def read(path: str | os.PathLike[str]) -> SavedCache:
    """The file's content, on the CPU; tensors are mapped, not copied: pages are read when they are used.

    Never write into the tensors' file while they are in use; replacing it, as `write` does, is fine. Raises
    `FlexASLError` for anything but an unchanged file of this format version, FileNotFoundError where there is none.
    """
    refuse_foreign(path)
    try:
        metadata = _metadata(path)
        with safe_open(path, framework="pt") as file:
            if file.metadata() != metadata:
                raise Unfit("it was replaced while it was read")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        saved = _build(parse(metadata["cache"]), tensors)
        if saved.version != metadata["version"]:
            raise Unfit(f"it calls itself version {metadata['version']} and is of version {saved.version}")
        return saved
    except Unfit as unfit:
        reason = str(unfit)
    except SafetensorError as error:
        reason = f"safetensors says {str(error)[:200]!r}"
    raise FlexASLError(f"{os.fspath(path)} is not a saved cache that can be used: {reason}; save it again")


def _ours(path: Path) -> bool:
    """Whether a file, whole or not, begins as ours do."""
    start = writing.beginning(path, PLACE + 100)[8:]
    return start.startswith(BEGINNING) and f'"format":"{FORMAT}"'.encode() in start


def _tensors(saved: SavedCache) -> dict[str, Tensor]:
    """By name, in no order."""
    named = {"token_ids": saved.token_ids, "attention_mask": saved.attention_mask}
    for index, layer in enumerate(saved.layers):
        parts: dict[str, Any] = dict(zip(STATES_AND_SCALES, layer.stored))
        parts |= {"columns": layer.positions, "valid": layer.valid}
        parts |= {f"{STATE}{name}": states for name, states in layer.states.items()}
        named |= {f"layers.{index}.{part}": tensor for part, tensor in parts.items()}
    # What is small comes to the host now, so that it can be checked together wherever layers are.
    return {
        name: tensor if name.endswith(STATES_AND_SCALES) or f".{STATE}" in name else tensor.cpu()
        for name, tensor in named.items()
        if tensor is not None
    }


def _describe(saved: SavedCache) -> dict[str, Any]:
    return {
        "flexasl": saved.flexasl,
        "seen": saved.seen,
        "uncroppable": [layer.uncroppable for layer in saved.layers],
        "model": saved.model,
        "reports": [report.to_dict() for report in saved.reports],
        "notes": saved.notes,
    }


def _header(saved: SavedCache, description: str, tensors: dict[str, Tensor]) -> bytes:
    metadata = {"digest": BLANK.decode(), "format": FORMAT, "version": saved.version, "cache": description}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MOST_HEADER_BYTES:
        raise FlexASLError(f"reports and notes take {len(header)} bytes; a file holds at most {MOST_HEADER_BYTES}")
    return header


def _pieces(header: bytes, tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file's bytes, in order."""
    yield struct.pack("<Q", len(header))
    yield header
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's strings, once its digest has been found right."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < PLACE + len(BLANK):
            raise Unfit(f"it has {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view, memoryview(view) as content:
            (length,) = struct.unpack("<Q", content[:8])
            if length > min(size - 8, MOST_HEADER_BYTES):
                raise Unfit(f"its header would have {length} bytes, and it has {size} in all")
            header = bytes(content[8 : 8 + length])
            metadata: dict[str, Any] = parse(header)["__metadata__"]
            if metadata.get("format") != FORMAT:
                raise Unfit(f"its format is {metadata.get('format')!r:.20}, not {FORMAT!r}")
            if metadata.get("version") not in (PLAIN, SCALED, STATEFUL):
                raise Unfit(
                    f"its format version is {str(metadata.get('version'))[:20]!r}, and this flexasl reads {PLAIN!r}, "
                    f"{SCALED!r} and {STATEFUL!r}"
                )
            digest = hashlib.sha256(content[:PLACE])
            digest.update(BLANK)
            digest.update(content[PLACE + len(BLANK) :])
    if metadata["digest"] != digest.hexdigest():
        raise Unfit("it has changed since it was written, or was cut short")
    if set(metadata) != {"digest", "format", "version", "cache"} or not isinstance(metadata["cache"], str):
        raise Unfit("its description is not complete")
    return metadata


def _build(description: Any, tensors: dict[str, Tensor]) -> SavedCache:
    """Checks everything; raises `Unfit`."""
    told: _Description = fit(_Description, description)
    seen, uncroppable = told.seen, told.uncroppable
    if not all(count <= seen for count in uncroppable):
        raise Unfit(f"uncroppable is not a list of counts from 0 to seen={seen}")
    first = next((name for at in range(len(uncroppable)) if (name := f"layers.{at}.keys") in tensors), None)
    if first is None or tensors[first].dim() != 4:
        raise Unfit(f"{first or 'layers.0.keys'} are missing or not of four dimensions")
    batch, dtype = tensors[first].shape[0], tensors[first].dtype
    if batch < 1 or dtype not in STATES:
        raise Unfit(f"it holds {batch} rows of {seen} tokens in {dtype}")
    left = dict(tensors)
    ids = _whole(left, "token_ids", torch.int64, batch, seen)
    if ids is not None and bool((ids < 0).any()):
        raise Unfit("token_ids are not all positive")
    mask = _whole(left, "attention_mask", torch.bool, batch, seen)
    layers = tuple(_layer(left, index, (batch, seen, dtype), mask, most) for index, most in enumerate(uncroppable))
    if not layers or left:
        raise Unfit(f"tensors {sorted(left)!s:.80} belong to none of its {len(layers)} layers")
    try:
        reports = tuple(map(Report.from_dict, told.reports))
    except FlexASLError as error:
        raise Unfit(f"a report in it is not one: {error}") from error
    return SavedCache(
        layers=layers,
        seen=seen,
        token_ids=ids,
        attention_mask=mask,
        model=told.model,
        reports=reports,
        notes=told.notes,
        flexasl=told.flexasl,
    )


def _whole(left: dict[str, Tensor], name: str, dtype: torch.dtype, batch: int, seen: int) -> Tensor | None:
    """Takes a tensor [B, S] away, if it is there."""
    tensor = left.pop(name, None)
    if tensor is not None and (tensor.dtype != dtype or tensor.shape != (batch, seen)):
        raise Unfit(f"{name} is {_kind(tensor)}, where {dtype} {[batch, seen]} is needed")
    return tensor


def _layer(
    left: dict[str, Tensor], index: int, common: tuple[int, int, torch.dtype], mask: Tensor | None, uncroppable: int
) -> SavedLayer:
    """Takes a layer's tensors away."""
    batch, seen, dtype = common
    states = _states(left, index, batch)
    parts = [f"layers.{index}.{name}" for name in (*STATES_AND_SCALES, "columns", "valid")]
    if not any(name in left for name in parts):
        return SavedLayer(states=states, uncroppable=uncroppable)
    names = STATES_AND_SCALES[: 2 if name_of(dtype) is None else 4]
    stored = [part for name in names if (part := left.pop(f"layers.{index}.{name}", None)) is not None]
    positions, valid = (left.pop(f"layers.{index}.{name}", None) for name in ("columns", "valid"))
    if positions is None or len(stored) < len(names):
        raise Unfit(f"layer {index} is not complete")
    keys = stored[0]
    for name, part in zip(names, stored):
        kind, dims = (SCALES, (1,)) if name.endswith("scales") else (dtype, part.shape[3:])
        if part.dtype != kind or part.dim() != 4 or part.shape != (batch, *keys.shape[1:3], *dims):
            raise Unfit(f"layers.{index}.{name} are {_kind(part)}, which fits neither the keys nor other layers")
    heads, entries = keys.shape[1:3]
    if positions.dtype != torch.int64 or tuple(positions.shape) not in ((batch, entries), (batch, heads, entries)):
        raise Unfit(f"layers.{index}.columns are {_kind(positions)}, where {entries} entries need theirs")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != positions.shape):
        raise Unfit(f"layers.{index}.valid is {_kind(valid)}, where the positions are {list(positions.shape)}")
    if entries > seen or bool(((positions < 0) | (positions >= seen)).any()):
        raise Unfit(f"layers.{index} has entries from beyond the {seen} tokens that were read")
    real = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
    places = positions.masked_fill(~real, -1)
    if not bool(((places[..., 1:] > places.cummax(-1).values[..., :-1]) | ~real[..., 1:]).all()):
        raise Unfit(f"layers.{index}.columns do not ascend")
    if mask is not None:
        own = mask if positions.dim() == 2 else mask[:, None].expand(-1, heads, -1)
        if bool((real & ~own.gather(-1, positions)).any()):
            raise Unfit(f"layers.{index} has entries from padding")
    return SavedLayer(stored=tuple(stored), positions=positions, valid=valid, uncroppable=uncroppable, states=states)


def _states(left: dict[str, Tensor], index: int, batch: int) -> dict[str, Tensor]:
    """Takes a layer's states away."""
    start = f"layers.{index}.{STATE}"
    made = {name.removeprefix(start): left.pop(name) for name in [name for name in left if name.startswith(start)]}
    for name, states in made.items():
        if not states.is_floating_point() or states.dtype not in STATES or states.shape[:1] != (batch,):
            raise Unfit(f"{start}{name} are {_kind(states)}, where {batch} rows in floating point are needed")
    return made


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
