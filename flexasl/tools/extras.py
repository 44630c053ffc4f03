"""Packages that only some uses need, and how to install them."""

import importlib.util

from flexasl.errors import FlexASLError


def need(what: str, extra: str, *packages: str) -> None:
    """Raises FlexASLError, with the line that installs it, where one of the packages of an extra is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise FlexASLError(f"{what} needs {name}; install it with: pip install 'flexasl[{extra}]'")
