"""Options that commands share, and what they say."""

import importlib.util
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.policies import POLICIES, Policy
from flexasl.policies.grammar import PAPER, number, parse
from flexasl.text import read_text


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KVDtype(StrEnum):
    int8 = "int8"
    fp8 = "fp8"


Model = Annotated[
    str | None, typer.Option(help="Model folder, hub id or GGUF file. [default: the embedded SmolLM2-135M-Instruct]")
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help=f"What to prune and when: {', '.join([*POLICIES, PAPER])}; with settings, as in fixed_layer:layer=9 or "
        "asl:tau=0.3,min_layer=10.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]
DtypeName = Annotated[Dtype | None, typer.Option(help="Number format. [default: that of the stored weights]")]
AMOUNT = "a count of tokens (512, 4k) or a share of the prompt (0.25)"
SelectTokens = Annotated[str | None, typer.Option(help=f"Tokens for the deeper layers: {AMOUNT}.")]
KVBudget = Annotated[str | None, typer.Option(help=f"Cache entries kept per KV head: {AMOUNT}. [default: all]")]
KVDtypeName = Annotated[
    KVDtype | None,
    typer.Option("--kv-dtype", help="Keep the cache in eight bits. [default: the model's number format]"),
]
Tau = Annotated[float | None, typer.Option(help="Variance ratio below which ranks have settled, in (0, 1].")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="JSON of settings, as flexasl calibrate writes it; options win over it.")
]
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


def need_extra(command: str, *names: str) -> None:
    """Find out before the model runs whether the packages of the extra `eval` are there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise FlexASLError(f"flexasl {command} needs {name}; install it with: pip install 'flexasl[eval]'")


def amount_of(name: str, text: str) -> int | float:
    """What is typed for an amount of tokens."""
    value = number(text)
    if value is None:
        raise FlexASLError(f"--{name.replace('_', '-')} {text} is no amount; give {AMOUNT}")
    return value


def text_of(file: str | None) -> str:
    """What is to be read: a file's text, or standard input's."""
    if file is None and sys.stdin.isatty():
        raise FlexASLError("there is no text to read; give --file, or pipe a text in")
    return read_text(file)
