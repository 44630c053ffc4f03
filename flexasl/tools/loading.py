"""A model and its tokenizer by name, and what other libraries say of those that they cannot load, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexasl import checks
from flexasl.errors import FlexASLError
from flexasl.tools import weights
from flexasl.tools.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
TYPES = "the name of a number format, such as 'bfloat16', or None"
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Settings of `generate` under which an answer is one row, token by token, whatever the model's own settings say."""
NAMES = "give a folder with a model, a file that ends in .gguf, or a hub id such as owner/name"


def load_model(
    name: str | None, dtype: str | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer. Code that comes with a model is not run.

    Args:
        name: A folder, a hub id or a GGUF file. None: the embedded model.
        dtype: A name such as `"bfloat16"`. None: that of the stored weights, float32 for a GGUF file.
        device: A name such as `"cpu"` or `"cuda:1"`.

    Raises:
        FlexASLError: The device, the folder, the file or the model cannot be used, or weights are missing.
    """
    from flexasl.tools import embedded

    if not isinstance(name, (str, type(None))):
        name = str(checks.path("name", name))
    kind = dtype if dtype is None else getattr(torch, checks.instance("dtype", dtype, str, TYPES), None)
    if dtype is not None and not isinstance(kind, torch.dtype):
        raise FlexASLError(f"dtype={checks.shown(dtype)} is not known; give {TYPES}")
    place = find_device(device)
    if name is None:
        return embedded.load(getattr(torch, dtype or "float32"), place)
    folder, source = _find(name)
    model, tokenizer = read(name, folder, dtype or ("float32" if source else "auto"), **source)
    model.name_or_path = name
    model = model.to(place).eval()
    with in_one_sentence(f"model {name} cannot answer"):
        _answer_once(model, tokenizer)
    return model, tokenizer


def read(name: str, folder: str | Path, dtype: Any, **source: Any) -> tuple[Any, Any]:
    """What transformers makes of a folder; raises FlexASLError, which names the model and has the whole reason."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = source | {"trust_remote_code": False}  # None would ask on standard output
    models: Any = AutoModelForCausalLM
    with no_progress_bars(), in_one_sentence(f"model {name} cannot be loaded"):
        # Weights of other shapes are told with the rest, in place of an error that names none.
        model, found = models.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    weights.check_loaded(name, model, found)
    return model, tokenizer


def _answer_once(model: Any, tokenizer: Any) -> None:
    """One word read and one token said, since nothing checks the settings of tokenizers and generation before."""
    ids = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"] or [0]
    prompt = torch.tensor([ids], dtype=torch.int64, device=model.device)
    most = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= most:
        raise ValueError(f"its tokenizer has ids such as {max(ids)}, and it {most} tokens; get both of one model")
    said = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, tokenizer=tokenizer, **GREEDY
    )
    tokenizer.decode(said[0])


def find_device(name: str) -> torch.device:
    """The device of that name; raises FlexASLError where nothing can be computed there."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device).item()
    except Exception as error:  # each backend raises its own
        reason = str(error).strip().partition("\n")[0]
        raise FlexASLError(f"device={name!r} cannot be used here: {reason}") from error
    return device


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Raises FlexASLError, what with the whole reason, for whatever a library raises about files that it reads: a
    damaged folder can raise anything."""
    try:
        yield
    except FlexASLError:
        raise
    except Exception as error:
        reason = weights.one_line(error).partition(" Model type should be one of")[0]  # some hundred names
        if "trust_remote_code" in reason:
            reason = "it brings code of its own, which would have to be run; load it in Python, and patch it there"
        elif not isinstance(error, (OSError, ValueError, ImportError)):
            reason = f"a file of it is damaged, or not what it should be ({type(error).__name__}: {reason})"
        raise FlexASLError(f"{what}: {reason}") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers' bars off, its converter's of GGUF files too, which does not ask its settings."""
    from transformers import modeling_gguf_pytorch_utils as converter
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), converter.tqdm
    logging.disable_progress_bar()
    converter.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        converter.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _find(name: str) -> tuple[str, dict[str, str]]:
    """Where a model lies, and which file of the folder it is, where it is one."""
    path = Path(name)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise FlexASLError(f"model {name} is a folder without a config.json; {NAMES}")
        weights.check_safetensors(path)
        return name, {}
    if name and path.exists():
        if path.suffix != ".gguf":
            raise FlexASLError(f"model {name} is a file that does not end in .gguf; {NAMES}")
        need(f"model {name}", "transformers", "gguf", "accelerate")
        weights.check_gguf(path)
        return str(path.parent), {"gguf_file": path.name}
    if not HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise FlexASLError(f"model {name or repr(name)} is neither a folder nor a GGUF file; {NAMES}")
    return name, {}
