"""The command line `flexasl`, and how its process ends.

No other package, and nothing slow, is imported before `main` runs: it meets an early interrupt and a missing package.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn, TextIO

from flexasl.errors import FlexASLError

UNEXPECTED, BAD_INPUT, INTERRUPTED = 1, 2, 130
TRACEBACK = "FLEXASL_TRACEBACK"


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point. Exit status: 0 done, 1 the demo's answer is wrong, or an error that nobody foresaw, 2 bad input or a
    place that cannot be written, 130 interrupted.

    Each error is one line on standard error; where the environment variable FLEXASL_TRACEBACK is set, behind a
    traceback.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, _interrupt)
    try:
        status = _finish(_run(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        status = _finish(INTERRUPTED)
    if argv is None:  # the process ends here, and an interrupt has nothing left to stop
        exec("")  # CPython ends by the signal where it has interrupted code of a text, though it was caught; no longer
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stops, once torch is whole: its C++ ends the process where an import of it is interrupted."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        raise KeyboardInterrupt
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _run(arguments: list[str]) -> int:
    try:
        _prepare_streams()
        _check_current_folder()
        from flexasl.tools.cli.app import run

        return run(arguments)
    except FlexASLError as error:
        return _fail(str(error))
    except OSError as error:
        fault = _output_fault()  # once more, where it was standard output that could not be written
        return _fail(_sentence(error)) if fault is None else _of_output(fault)
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        return _fail(f"the package {package} is missing; install it with: pip install 'flexasl[cli]'")
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error}; set {TRACEBACK}=1 to see where it comes from")
        return UNEXPECTED


def _prepare_streams() -> None:
    """Standard streams that lose nothing: letters that an encoding lacks are written as \\N escapes."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, it lives as long as the process
    if sys.stdout is None:
        raise FlexASLError("standard output is closed, so that what is found would be lost; send it to a file")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise FlexASLError("the current folder does not exist any more; go to one that does") from error


def _finish(status: int) -> int:
    """The exit status, when all that was printed is written."""
    fault = _output_fault()
    return status if fault is None or status else _of_output(fault)


def _of_output(fault: OSError) -> int:
    if isinstance(fault, BrokenPipeError):  # the reader of our output has gone: nobody is left to tell
        return UNEXPECTED
    return _fail(f"standard output cannot be written: {fault.strerror}")


def _output_fault() -> OSError | None:
    """Why standard output cannot be written; None where all that was printed is written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        return error
    return None


def _discard(stream: TextIO) -> None:
    """Send what is left of a stream nowhere: else Python would fail on it once more when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _sentence(error: OSError) -> str:
    """An error of the operating system with the name of the file; one that we raise has a sentence already."""
    if error.errno is None:
        return str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    full = error.errno in (errno.ENOSPC, errno.EFBIG)
    return f"standard output or a file cannot be written: {error.strerror}" if full else str(error.strerror)


def _fail(message: str) -> int:
    try:
        if os.environ.get(TRACEBACK):
            import traceback

            traceback.print_exc()
        from flexasl.stored import nameable, visible

        with contextlib.suppress(UnicodeEncodeError):  # halves of characters that are none of a file's name
            message = nameable(message)
        print("flexasl:", visible(" ".join(message.split())), file=sys.stderr)
    except OSError:
        _discard(sys.stderr)
    return BAD_INPUT
