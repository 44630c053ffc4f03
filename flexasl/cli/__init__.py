"""The words on a command line: `flexasl ask`, `prefill`, `inspect`, `demo`, `eval` and `calibrate`, a file each."""

import os
import sys

import typer

from flexasl.cli import ask, calibrate, demo, evaluate, inspect, prefill
from flexasl.errors import FlexASLError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask about long texts, with the prompt pruned while the model reads it.",
)
for name, command in (
    ("ask", ask.ask),
    ("prefill", prefill.prefill),
    ("inspect", inspect.inspect),
    ("demo", demo.demo),
    ("eval", evaluate.evaluate),
    ("calibrate", calibrate.calibrate),
):
    app.command(name)(command)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 the demo's answer is wrong, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        status = app(arguments or ["--help"], prog_name="flexasl", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except typer.TyperException as error:
        status = _fail(error.format_message())
    except (FlexASLError, OSError) as error:
        status = _fail(str(error))
    raise SystemExit(status if isinstance(status, int) else 0)


def _fail(message: str) -> int:
    print("flexasl:", " ".join(message.split()), file=sys.stderr)
    return 2
