"""What a terminal shows while something takes its time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self) -> None:
        self._progress.advance(self._task)

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def progress_bar(words: str, total: int | None = None) -> Iterator[Bar]:
    """A bar on standard error while something takes its time; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, refresh_per_second=4) as progress:
        yield Bar(progress, progress.add_task(words, total=total))


@contextmanager
def counted_progress(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error with the time left, one for each stage; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    bars: dict[str, Any] = {}
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=hidden or not console.is_terminal
    ) as progress:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:  # what an earlier run did says nothing about this one's speed
                bars[stage] = progress.add_task(stage, total=total, completed=done)
            progress.update(bars[stage], completed=done)

        yield advance


@contextmanager
def streamed(
    words: str, model: Any, *, begin: str = "", quiet: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What to call with each piece of an answer, which is printed unless quiet, and after each layer before it."""
    with progress_bar(words, model.config.get_text_config().num_hidden_layers) as bar:

        def show(text: str) -> None:
            nonlocal begin
            if quiet:
                return
            bar.stop()  # it shares the terminal with the answer
            print(begin + text, end="", flush=True)
            begin = ""

        yield show, bar.advance
    if not quiet:
        print("\n", flush=True)
