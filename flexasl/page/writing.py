"""Text as HTML."""

import html
import re

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a browser obeys, or refuses, and does not show: control characters but line ends and tabs, marks that turn the
direction of writing, and halves of characters."""


def safe(text: str) -> str:
    """A text that shows as it is: markup escaped, and what does not show as `\\x1b` and the like."""
    return html.escape(OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text))
