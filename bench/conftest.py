"""Options of the micro benchmarks, and the table that each file of them ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import setting
import timing

OUT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, default=None, help="folder for the tables; default: print them only")


def pytest_sessionstart(session: pytest.Session) -> None:
    setting.setting()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each benchmark file says how its rows become a table."""
    out = session.config.getoption("--out")
    for module in {item.module for item in session.items}:  # type: ignore[attr-defined]
        rows = [row for row in timing.ROWS if row["file"] == module.__name__]
        if rows:
            body = module.tables(rows)
            path = None if out is None else out / module.__name__
            setting.write(path, module.TITLE, body, {"rows": rows})
