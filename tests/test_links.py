"""Links between the pages, and the navigation of the site; `make docs` checks the same in the built pages."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu("reads pages and files, not tensors")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GENERATED = {"changelog.md"}
"""Pages that docs/site_hooks.py makes."""


def text_of(page):
    """A page without its code."""
    return re.sub(r"^(```+).*?^\1|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def places(page):
    """The names of a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_pages_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, place = link.partition("#")
        if "://" in link or (page.parent == DOCS and path in GENERATED):
            continue
        there = page.parent / path if path else page
        assert there.exists(), link
        if place and not place.startswith("flexasl."):  # which mkdocstrings makes
            assert place in places(there), link


def test_every_page_is_in_the_navigation_once():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^ +- (?:[^#\n]+: )?([\w./-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted({page.relative_to(DOCS).as_posix() for page in PAGES} | GENERATED)
