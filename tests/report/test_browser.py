"""Pages in a real browser: Chromium, where one is installed, driven by Playwright; it never fetches one."""

import shutil

import pytest
from test_pages import COMPARISON, RESULT

from bnsurgery import finetune, report

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# As root in a container there is no sandbox; and a test must not call home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=["insertion", "training", "comparison"], scope="module")
def page(request, insertion_page, tmp_path_factory):
    config = finetune.Config(data="a" * 200, output="runs/x", source="vgg11")
    made = {
        "insertion": lambda: insertion_page,
        "training": lambda: report.training(RESULT, config),
        "comparison": lambda: report.comparison(COMPARISON),
    }[request.param]()
    path = tmp_path_factory.mktemp("page") / "page.html"
    made.save(path)
    return path.as_uri()


def luminance(colour):
    """Of "rgb(r, g, b)", from 0 to 1: relative luminance as in WCAG 2.2."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2.2's, from 1 to 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


# Background and text colour of what has a background of its own.
BOXES = """[...document.querySelectorAll('.box, .verdict, dt, .term')].map(e => {
  const style = getComputedStyle(e);
  const own = style.backgroundColor == 'rgba(0, 0, 0, 0)' ? getComputedStyle(document.body) : style;
  return [own.backgroundColor, style.color];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page(scheme, chromium, page):
    tab = chromium.new_page(color_scheme=scheme)
    complaints, requests = [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto(page)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        boxes = tab.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)")
        assert boxes and min(boxes) > 300
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {page}
    back, text = tab.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (luminance(back) < 0.1) == (scheme == "dark")
    assert contrast(back, text) > 7  # WCAG 2.2's AAA
    colours = tab.evaluate("[...document.querySelectorAll('figure text')].map(t => getComputedStyle(t).fill)")
    assert set(colours) == {text}  # the figures' words have the page's colour
    strokes = tab.evaluate(
        "[...document.querySelectorAll('figure use, figure path')].map(e => getComputedStyle(e).stroke)"
    )
    assert text in strokes  # as have their axes
    for on, ink in tab.evaluate(BOXES):
        assert contrast(on, ink) > 4.5  # AA, for small text
    tab.close()


def test_printed(chromium, page):
    tab = chromium.new_page(color_scheme="dark")
    tab.goto(page)
    tab.emulate_media(media="print")
    assert luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
    assert tab.pdf().startswith(b"%PDF")
    tab.close()
