"""The options `--plot` and `--html`, of commands that prune one prompt."""

from pathlib import Path
from typing import Annotated, Any

from flexasl.errors import FlexASLError
from flexasl.tools.cli.options import path_option
from flexasl.tools.extras import need
from flexasl.writing import check_file, replaced, write

PLOT_FORMATS = (".png", ".svg", ".pdf")
HTML_FORMATS = (".html", ".htm")
Plot = Annotated[Path | None, path_option("Picture of the decision to write: .png, .svg or .pdf.", "--plot")]
Html = Annotated[Path | None, path_option("Page to write, with the kept tokens of the text marked: .html.", "--html")]


def check_plot(path: Path | None, inputs: tuple[str | Path | None, ...]) -> None:
    """Find out before the model runs whether the picture can be written."""
    if path is not None:
        _check("--plot", path, PLOT_FORMATS, inputs)
        need("--plot", "plot", "matplotlib")


def check_html(path: Path | None, inputs: tuple[str | Path | None, ...]) -> None:
    """The same for the page."""
    if path is not None:
        _check("--html", path, HTML_FORMATS, inputs)


def _check(option: str, path: Path, formats: tuple[str, ...], inputs: tuple[str | Path | None, ...]) -> None:
    if path.suffix.lower() not in formats:
        raise FlexASLError(f"{option} {path} has no known format; give a name that ends in {', '.join(formats)}")
    check_file(option, path, inputs=inputs)


def draw(report: Any, path: Path | None) -> None:
    """The picture, last of all: what was said is printed by then."""
    if path is not None and report is not None:
        with replaced(path) as new:
            report.plot(new)


def write_page(path: Path | None, answer: Any, tokenizer: Any, ids: list[int]) -> None:
    """The page of an answer to a prompt."""
    if path is not None and answer.report is not None:
        write(path, answer.report.to_html(tokenizer, ids, answer=answer.text))
