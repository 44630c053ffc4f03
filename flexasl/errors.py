"""What a user can get wrong, in one sentence each."""

from __future__ import annotations


class FlexASLError(ValueError):
    """Base of every error that FlexASL raises about its input; nothing has been changed when it is raised."""


class ConfigError(FlexASLError):
    """A setting has a value that it cannot have."""


class UnsupportedError(FlexASLError):
    """The model, or the way it is called, is one that FlexASL cannot honour."""
