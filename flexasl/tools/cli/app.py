"""The words on a command line: `flexasl ask`, `prefill`, `inspect`, `demo`, `eval`, `calibrate` and `serve`, a file
each."""

import platform
from importlib import metadata
from typing import Annotated

import typer
from typer.main import get_command

from flexasl import __version__
from flexasl.errors import FlexASLError
from flexasl.tools.cli import ask, calibrate, demo, evaluate, inspect, prefill, serve

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Ask about long texts, with the prompt pruned while the model reads it.",
)
for name, function in (
    ("ask", ask.ask),
    ("prefill", prefill.prefill),
    ("inspect", inspect.inspect),
    ("demo", demo.demo),
    ("eval", evaluate.evaluate),
    ("calibrate", calibrate.calibrate),
    ("serve", serve.serve),
):
    app.command(name)(function)


def run(arguments: list[str]) -> int:
    """Do what the command line says, and return the exit status. Raises FlexASLError for what it cannot say."""
    try:
        status = command(arguments or ["--help"], prog_name="flexasl", standalone_mode=False)
    except typer.TyperException as error:
        raise FlexASLError(error.format_message().replace(": Value error, ", ": ")) from error
    return status if isinstance(status, int) else 0


def _tell_version(wanted: bool) -> None:
    if not wanted:
        return
    parts = [f"flexasl {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    print(", ".join(parts))
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    # No docstring: it would take the place of the help of `app`.
    pass


command = get_command(app)
