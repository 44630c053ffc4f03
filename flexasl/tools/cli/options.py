"""Options that commands share, what they say, and how they are read."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.policies import POLICIES, Policy
from flexasl.policies.grammar import PAPER, number, parse
from flexasl.tools.text import read_text

MOST_TOKENS = 100_000_000
"""Larger counts are slips of the keyboard."""


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KVDtype(StrEnum):
    int8 = "int8"
    fp8 = "fp8"


def path(text: str) -> Path:
    """A path as it was typed; `Path` alone takes an empty one for the folder it is in."""
    return Path(_given(text))


def words(text: str) -> str:
    """Words for the model. Where the locale is not that of the terminal, they come as bytes in disguise (surrogates),
    and are read as what they nearly always are, UTF-8."""
    if not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise typer.BadParameter("it is not UTF-8; give it in UTF-8") from None


def _given(text: str) -> str:
    if not text:
        raise typer.BadParameter("it is empty; give a path")
    return text


def _number(value: float | None) -> float | None:
    if value is not None and value != value:  # which no bound refuses
        raise typer.BadParameter("nan is not a number")
    return value


def path_option(help: str, *names: str, **settings: Any) -> Any:
    """An option that takes a path, which is not empty."""
    return typer.Option(*names, help=help, parser=path, metavar="PATH", **settings)


Model = Annotated[
    str | None,
    typer.Option(
        help="Model folder, hub id or GGUF file.", show_default="the embedded SmolLM2-135M-Instruct", metavar="NAME"
    ),
]
TextFile = Annotated[
    str | None,
    typer.Option("--file", "-f", help="UTF-8 text; - is standard input.", show_default="-", metavar="PATH"),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help=f"How to prune: {', '.join([*POLICIES, PAPER])}; with settings, as in fixed_layer:layer=9 or "
        "asl:tau=0.3,stages=0.5@5-9+0.25.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]
DtypeName = Annotated[Dtype | None, typer.Option(help="Number format.", show_default="that of the stored weights")]
AMOUNT = "a count of tokens (512, 4k) or a share of the prompt (0.25)"
SelectTokens = Annotated[str | None, typer.Option(help=f"Tokens for the deeper layers: {AMOUNT}.", show_default="2048")]
KVBudget = Annotated[str | None, typer.Option(help=f"Cache entries kept per KV head: {AMOUNT}.", show_default="all")]
KVDtypeName = Annotated[
    KVDtype | None,
    typer.Option("--kv-dtype", help="Keep the cache in eight bits.", show_default="the model's number format"),
]
Tau = Annotated[
    float | None,
    typer.Option(
        help="Score of a far token that counts as a look-up, in (0, 1]; under paper, the variance "
        "ratio below which ranks have settled.",
        callback=_number,
        show_default="0.2; 0.3 under paper",
    ),
]
ConfigFile = Annotated[
    Path | None, path_option("JSON of settings, as flexasl calibrate writes it; options override it.", "--config")
]
Depth = Annotated[float, typer.Option(min=0, max=1, callback=_number, help="Where the fact is hidden: 0 start, 1 end.")]
Haystack = Annotated[Path | None, path_option("Text to hide needles in.", show_default="English prose")]
Seed = Annotated[int, typer.Option(help="Chooses the prompts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def chosen(
    policy: str,
    tau: float | None = None,
    kv_dtype: KVDtype | None = None,
    file: Path | None = None,
    **amounts: str | None,
) -> tuple[Policy, ASLConfig]:
    """Policy and settings, by options as they were typed; settings that were not given are the file's, or at their
    defaults. Raises FlexASLError, before a model is there, also for those that the policy would ignore."""
    options: dict[str, Any] = {name: amount_of(name, text) for name, text in amounts.items() if text is not None}
    if tau is not None:
        options["tau"] = tau
    if kv_dtype is not None:
        options["kv_dtype"] = kv_dtype.value
    named = parse(policy)
    config = named.onto(ASLConfig() if file is None else ASLConfig.load(file), options)
    named.policy.check(config)
    return named.policy, config


def amount_of(name: str, text: str) -> int | float:
    """What is typed for an amount of tokens."""
    option, value = f"--{name.replace('_', '-')}", number(text)
    if value is None:
        raise FlexASLError(f"{option} {text} is not an amount; give {AMOUNT}")
    if value > MOST_TOKENS:
        raise FlexASLError(f"{option} {text} is more than any model reads; give at most {MOST_TOKENS:,}")
    return value


def check_lengths(option: str, lengths: list[int]) -> list[int]:
    """The same lengths, where a model could have read so much."""
    for length in lengths:
        if length > MOST_TOKENS:
            raise FlexASLError(f"{option} {length} is more than any model reads; give at most {MOST_TOKENS:,}")
    return lengths


def text_of(file: str | None) -> str:
    """What is to be read: a file's text, or standard input's."""
    if file == "":
        raise FlexASLError("--file is empty; give the name of a text file, or - for standard input")
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise FlexASLError("there is no text to read; give --file, or pipe a text in")
    return read_text(file)
