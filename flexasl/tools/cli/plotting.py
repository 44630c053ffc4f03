"""The option `--plot`, of commands that prune one prompt."""

from pathlib import Path
from typing import Annotated, Any

from flexasl.errors import FlexASLError
from flexasl.tools.cli.options import path_option
from flexasl.tools.extras import need
from flexasl.writing import check_file, replaced

PLOT_FORMATS = (".png", ".svg", ".pdf")
Plot = Annotated[Path | None, path_option("Picture of the decision to write: .png, .svg or .pdf.", "--plot")]


def check_plot(path: Path | None, inputs: tuple[str | Path | None, ...]) -> None:
    """Find out before the model runs whether the picture can be written."""
    if path is None:
        return
    if path.suffix.lower() not in PLOT_FORMATS:
        raise FlexASLError(f"--plot {path} has no known format; give a name that ends in {', '.join(PLOT_FORMATS)}")
    check_file("--plot", path, inputs=inputs)
    need("--plot", "plot", "matplotlib")


def draw(report: Any, path: Path | None) -> None:
    """The picture, last of all: what was said is printed by then."""
    if path is not None and report is not None:
        with replaced(path) as new:
            report.plot(new)
