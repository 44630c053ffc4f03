"""The built site in Chromium: `make docs` first, then in any environment with playwright and a browser.

`test_no_link_leads_nowhere` needs the built site alone.
"""

import functools
import http.server
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

SITE = Path(__file__).parents[1] / "out" / "site"
PAGES = sorted(page.relative_to(SITE).as_posix().removesuffix("index.html") for page in SITE.rglob("index.html"))
pytestmark = [
    pytest.mark.cpu("reads pages and files, not tensors"),
    pytest.mark.slow,
    pytest.mark.skipif(not PAGES, reason="the site is not built; run make docs"),
]

OUTSIDE = """() => {
  const scrolls = node => node && (['auto', 'scroll', 'hidden'].includes(getComputedStyle(node).overflowX)
    || scrolls(node.parentElement));
  const wide = document.documentElement.clientWidth + 1;
  return [...document.querySelectorAll('article *')].filter(
    node => node.getBoundingClientRect().right > wide && !scrolls(node)).map(node => node.outerHTML.slice(0, 120));
}"""
"""Elements that stand out of the page on the right, but for those in a frame that scrolls by itself."""
PICTURES = """() => [...document.querySelectorAll('article img')].map(
  node => [node.src, node.complete && node.naturalWidth, node.getBoundingClientRect().width])"""
CONTRAST = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const text = getComputedStyle(document.querySelector('article')).color;
  const page = getComputedStyle(document.body).backgroundColor;
  const [dark, bright] = [light(text), light(page)].sort((a, b) => a - b);
  return [light(page), (bright + 0.05) / (dark + 0.05)];
}"""
"""How bright the page is, and how text stands out from it, as WCAG counts it."""


class Links(HTMLParser):
    """Where a page links to, and the places in it that have a name."""

    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.links += [told[name] for name in ("href", "src") if told.get(name)]
        self.names |= {told[name] for name in ("id", "name") if told.get(name)}


def test_no_link_leads_nowhere():
    read = {page: Links((SITE / page / "index.html").read_text("utf-8")) for page in PAGES}
    lost = []
    for page, found in read.items():
        for link in found.links:
            target, place = urldefrag(urljoin(f"http://site/{page}", link))
            if urlsplit(target).netloc != "site" or link.startswith(("data:", "mailto:")):
                continue
            path = unquote(urlsplit(target).path).removeprefix("/")
            there = path in read or path == "" or (SITE / path).is_file()
            if not there or (path in read and unquote(place) not in read[path].names and not place.startswith("__")):
                lost.append((page, link))
    assert not lost


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            if "Executable doesn't exist" in str(error):
                pytest.skip("no browser is installed")
            raise
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_fits_and_shows_its_pictures(browser, address, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(address) else None)
    wrong = []
    for name in PAGES:
        page.goto(address + name, wait_until="load")
        out = page.evaluate(OUTSIDE)
        if out or page.evaluate("document.documentElement.scrollWidth") > width:
            wrong.append((name, out))
        for source, natural, shown in page.evaluate(PICTURES):
            if not natural or shown < (300 if source.endswith(".svg") else 0.54 * natural):
                wrong.append((name, source, natural, shown))
        bright, contrast = page.evaluate(CONTRAST)
        if contrast < 4.5 or (bright > 0.5) != (scheme == "light"):
            wrong.append((name, bright, contrast))
    page.close()
    assert not wrong and not said


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize(("words", "found"), [("saved prompts", "saved-prompts"), ("ForwardPass", "api/decoder")])
def test_search_finds_pages(browser, address, width, words, found):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(address, wait_until="networkidle")
    if width < 960:
        page.click("label[for=__search] >> visible=true")
    page.locator("input.md-search__input").press_sequentially(words)  # it listens to keys
    first = page.locator(f".md-search-result__link[href*='{found}']").first
    first.wait_for(state="visible", timeout=60_000)
    first.click()
    page.wait_for_url(f"**/{found}/**")
    assert words.lower() in page.locator("article").inner_text().lower()
    page.close()
