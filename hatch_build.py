"""The README as an index page shows it: without links that lead nowhere there."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

WHERE = """
The files that this page names (`docs/`, `examples/`, `CHANGELOG.md`) are in the source distribution:
`pip download --no-deps --no-binary flexasl flexasl`.
"""


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(readme) + WHERE}


def without_relative_links(markdown: str) -> str:
    """Links to files of the repository become their text, with the file's name where the text is another; those to
    places on the same page become their text alone. Pictures become a line that names the file."""

    def plain(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not path:
            return text
        return f"`{path}`" if path.startswith(text) else f"{text} (`{path}`)"

    markdown = re.sub(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", r"Picture (`\2`): \1", markdown)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)#]*)[^)]*\)", plain, markdown)
