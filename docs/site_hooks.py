"""What the site has beyond the pages of this folder: the changelog, and files of the repository that pages link to."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\((\.{0,2}[\w./-]+)\)")
NAMED = re.compile(r"(?<![\w(/\[])docs/([\w/.-]+\.md)(#[\w-]+)?")


def on_files(files: Files, config: Any) -> Files:
    """Adds the page of the changelog, and one for each file outside of this folder that a page links to."""
    changelog = NAMED.sub(r"[\1](\1\2)", (ROOT / "CHANGELOG.md").read_text("utf-8")).replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changelog))
    linked = {
        _target(page, link) for page in files.documentation_pages() for _, link in LINK.findall(page.content_string)
    }
    for path in sorted(path for path in linked if _is_source(path)):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        if path.suffix != ".md":
            text = f"# {name}\n\n````{path.suffix[1:]}\n{text}````\n"
        files.append(File.generated(config, f"source/{name.removesuffix('.md')}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links to files outside of this folder to their pages; a link to a folder becomes its name."""

    def there(found: re.Match[str]) -> str:
        text, link = found.groups()
        path = _target(page.file, link)
        if path.is_dir():
            return f"`{path.relative_to(ROOT).as_posix()}`"
        if not _is_source(path):
            return found.group()
        name = path.relative_to(ROOT).as_posix().removesuffix(".md")
        start = os.path.dirname(page.file.src_uri)
        return f"[{text}]({os.path.relpath(f'source/{name}.md', start)})"

    return LINK.sub(there, markdown)


def _target(page: File, link: str) -> Path:
    """The file that a link of a page leads to."""
    return (ROOT / "docs" / page.src_uri).parent.joinpath(link).resolve()


def _is_source(path: Path) -> bool:
    return path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Docstrings name pages of this folder: in the API reference these names are links. Pictures of many dots get a
    width at which letters are legible, and scroll in a frame of their own where the page is narrower."""
    if page.file.src_uri.startswith("api/"):
        html = re.sub(r"(?<!/)\bdocs/([\w-]+)\.md", r'<a href="../../\1/">\1</a>', html)

    def legible(found: re.Match[str]) -> str:
        path = _target(page.file, re.sub(r"^\.\./", "", found[1]) if _is_folder(page) else found[1])
        width = struct.unpack(">I", path.read_bytes()[16:20])[0]
        picture = f'{found.group()[:-2].rstrip()} style="width: {0.55 * width:.0f}px" />'
        return f'<a class="picture" href="{found[1]}">{picture}</a>'

    return re.sub(r'<img [^>]*src="([^"]+\.png)" />', legible, html)


def _is_folder(page: Any) -> bool:
    """Whether the page gets a folder of its own, from which its links are written."""
    return page.file.name != "index"
