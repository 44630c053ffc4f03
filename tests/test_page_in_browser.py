"""The page of a report in Chromium: `make test-browser`, or any environment with playwright and a browser."""

import re
import shutil

import pytest
import torch
from test_page import HOSTILE, Bytes, row_of
from test_report import full_row, make_report

pytestmark = [pytest.mark.cpu("reads pages and files, not tensors"), pytest.mark.slow]
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

LENGTH = 32_768
CONTRAST = """nodes => {
  const canvas = document.createElement('canvas'), draw = canvas.getContext('2d', {willReadFrequently: true});
  const layers = node => node ? [...layers(node.parentElement), getComputedStyle(node).backgroundColor] : [];
  const pixel = colors => {
    draw.clearRect(0, 0, 1, 1);
    for (const color of colors) { draw.fillStyle = color; draw.fillRect(0, 0, 1, 1); }
    return [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c / 255);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return nodes.map(node => {
    const behind = layers(node), style = getComputedStyle(node);
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const [one, two] = [light(pixel(behind)), light(pixel([...behind, ink]))].sort((a, b) => b - a);
    return (one + 0.05) / (two + 0.05);
  });
}"""
"""How the colours of elements stand out from what is behind them, as WCAG counts it."""


@pytest.fixture(scope="module")
def browser():
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


@pytest.fixture
def shown(browser, tmp_path):
    """Opens a page, and fails where it loads or says anything."""
    asked, opened = [], []

    def show(html, width=1280, scheme="light"):
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.append(page)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: asked.append(message.text))
        page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        assert asked == [file.as_uri()]
        asked.clear()
        return page

    yield show
    for page in opened:
        page.close()
    assert not asked


@pytest.fixture(scope="module")
def report():
    """Of 32k tokens, of which 2k were kept, in runs of 12."""
    starts = torch.randint(LENGTH - 12, (170,), generator=torch.Generator().manual_seed(0)).tolist()
    final = {at for start in starts for at in range(start, start + 12)} | set(range(LENGTH - 32, LENGTH))
    first = final | {at for start in starts for at in range(start, min(start + 70, LENGTH))}
    layers = {"eval_layers": (3, 4, 5, 6, 7, 8, 9, 10), "lookup": (0.01, 0.02, 0.03, 0.1, 0.7, 0.6, 0.5, 0.4)}
    ran = {"layer_tokens": (LENGTH,) * 8 + (len(first),) * 3 + (len(final),) * 19}
    row = row_of(LENGTH, [first, final], ranked_by="Who?", ranking_spans=((LENGTH - 20, LENGTH - 10),), **layers, **ran)
    stage = {"tokens": 0.3, "tau": 0.4, "min_layer": 5, "max_layer": 7}
    config = {"select_tokens": 2048, "tau": 0.2, "min_layer": 10, "max_layer": 21, "stages": [stage]}
    return make_report(row, config=config, kv_tokens=ran["layer_tokens"])


@pytest.fixture(scope="module")
def ids():
    words = b"a river runs by the old mill, and nobody has counted the stones in it since the flood.\n"
    return list((words * (LENGTH // len(words) + 1))[:LENGTH])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_is_legible(shown, report, ids, width, scheme):
    page = shown(report.to_html(Bytes(), ids, answer="word" * 200), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    inside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > innerWidth).length"
    )
    assert inside == 0
    sizes = page.eval_on_selector_all("svg text", "all => all.map(one => one.getBoundingClientRect().height)")
    assert len(sizes) > 20 and min(sizes) >= 10, "about nine points"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128
    assert dark == (scheme == "dark")
    words = [
        "h1",
        "dt",
        "dd",
        "figcaption",
        "svg text",
        ".legend li",
        ".legend span",
        "mark.k1",
        "mark.k2",
        ".text",
        "td",
    ]
    for selector in words:
        page.evaluate("document.querySelector('details').open = true")
        assert min(page.eval_on_selector_all(selector, CONTRAST)) >= 4.5, selector


def test_shades_are_told_apart(shown, report, ids):
    page = shown(report.to_html(Bytes(), ids))
    shades = [
        page.locator(kind).first.evaluate("one => getComputedStyle(one).backgroundColor")
        for kind in ("mark.k1", "mark.k2")
    ]
    assert len(set(shades)) == 2
    assert page.locator("mark.asks").count() == 1


def test_dropped_text_is_folded_and_shown_on_demand(shown, report, ids):
    page = shown(report.to_html(Bytes(), ids))
    text = page.locator(".text")
    short = text.evaluate("one => one.innerText.length")
    assert short < LENGTH / 2
    folds = page.locator("input.fold")
    label = folds.first.get_attribute("aria-label")
    tokens = int(re.fullmatch(r"Show ([\d,]+) dropped tokens", label)[1].replace(",", ""))
    folds.first.click()
    assert text.evaluate("one => one.innerText.length") == pytest.approx(short + tokens, abs=2)
    folds.first.focus()
    page.keyboard.press("Space")
    assert text.evaluate("one => one.innerText.length") == short
    page.get_by_label("Show dropped text").check()
    assert text.evaluate("one => one.textContent.length") == LENGTH
    assert text.evaluate("one => one.innerText.length") == pytest.approx(LENGTH, abs=2)


def test_a_text_cannot_do_anything(shown):
    encoded = list(HOSTILE.encode())
    report = make_report(row_of(len(encoded), [{0, 1, 5}], reason=HOSTILE, ranked_by=HOSTILE), policy=HOSTILE)
    page = shown(report.to_html(Bytes(), encoded, answer=HOSTILE))
    assert page.locator("script, img").count() == 0
    said = HOSTILE.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert page.locator(".text").text_content() == said == page.locator(".answer").text_content()


def test_a_notebook_shows_a_report_in_its_own_colours(shown, report):
    around = '<!doctype html><meta charset="utf-8"><body style="background: {}; color: {}"><p>cell</p>{}'
    for background, ink in (("white", "black"), ("#111", "#ddd")):
        page = shown(around.format(background, ink, report._repr_html_()), 700)
        for selector in ("dt", "dd", "figcaption", "svg text", "p"):
            assert min(page.eval_on_selector_all(selector, CONTRAST)) >= 4.5, selector
        font = "one => getComputedStyle(one).fontFamily"
        assert page.locator("body > p").evaluate(font) != page.locator(".flexasl").evaluate(font), "no rule leaks out"
    page = shown(make_report(*[full_row()] * 9)._repr_html_())
    assert page.locator("section").count() == 8
