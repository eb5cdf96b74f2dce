"""The report's pages in Chromium: offline and silent, by keyboard, on a narrow screen, in the dark,
on paper."""

from __future__ import annotations

import importlib.util
import json

import pytest
from chromium import CHROMIUM, DRIVER, browser, look, requests
from report_runs import analyses, make_retrieval_run, make_run, predictions

from fastdml import cli
from fastdml.analysis import analyse_predictions
from fastdml.report.html.comparison_page import comparison_page
from fastdml.report.html.run_page import run_page
from fastdml.report.run_files import read_run
from fastdml.train.tasks import classification, reid

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (importlib.util.find_spec("selenium") and CHROMIUM and DRIVER),
        reason="needs selenium, Chromium and chromedriver",
    ),
]
SCORING = classification.SCORING

# Of every text that shows, the contrast of its colour with the background that lies behind it.
CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function rgb(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] > 0.99) return c;
  }
  return [255, 255, 255, 1];
}
function luminance(c) {
  const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest('title, desc, style')) continue;
  if (!element.checkVisibility() || element.closest('.hidden')) continue;
  const style = getComputedStyle(element);
  const colour = element.closest('svg') ? style.fill : style.color;
  const [a, b] = [luminance(rgb(colour)), luminance(behind(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data.trim()]);
}
return found;
"""
# Of every line and bar, the contrast of its stroke or fill with the page.
MARKS = (
    CONTRASTS.split("const found")[0]
    + """
return [...document.querySelectorAll('.line, .mark, .diagonal, .bars span')]
  .map(e => { const s = getComputedStyle(e);
    let c = e.matches('.bars span') ? s.backgroundColor : s.stroke == 'none' ? s.fill : s.stroke;
    const [a, b] = [luminance(rgb(c)), luminance(behind(e.parentElement))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
"""
)
FOCUSED = """
const e = document.activeElement; if (e === document.body) return null;
const style = getComputedStyle(e), box = e.getBoundingClientRect();
return {tag: e.tagName, text: e.textContent.trim().slice(0, 40),
        label: e.getAttribute('aria-label'),
        outline: style.outlineStyle + ' ' + parseFloat(style.outlineWidth),
        top: box.top + scrollY, left: box.left, seen: box.bottom > 0 && box.top < innerHeight};
"""
WIDE = """
return [...document.querySelectorAll('body *')].filter(e =>
  !e.closest('.scroll, svg, .hidden, .skip') && e.checkVisibility()
  && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 120));
"""

CUT_OFF = """
const over = [...document.querySelectorAll('th, td')].filter(e => e.checkVisibility()
  && !e.closest('.bars') && e.scrollWidth > e.clientWidth + 1);
if (over.length) return over[0].outerHTML;
return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1
  && getComputedStyle(e).overflowX != 'auto').length;
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a real run, of runs made by hand that are odd, and of several runs."""
    folder = tmp_path_factory.mktemp("pages")
    options = "--independent --epochs 2 --subset 320 --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder / "digits")]) == 0
    found = {}

    def write(name: str, text: str) -> None:
        found[name] = folder / f"{name}.html"
        found[name].write_text(text)

    def single(run, name: str, **options) -> None:
        write(name, run_page(read_run(run), SCORING, defaults={"epochs": 20}, **options))

    read = read_run(folder / "digits")
    told = analyse_predictions(read.predictions, read.independent.predictions)
    both = {**told, **analyses(read.peers)}
    single(folder / "digits", "digits", analyses=both, alone=both)
    names = ['<b>"bold"</b>', "x" * 120, "مرحبا بالعالم", "resnet8 with a name of many words in it"]
    classes = [f"{name} {k}" for k in range(12) for name in ("class", "y" * 60, "日本語の分類")]
    odd = predictions(K=4, N=900, C=36, peers=names, classes=classes)
    told = {**analyse_predictions(odd), **analyses(names)}
    single(make_run(folder / ("z" * 100), odd, epochs=30), "odd", analyses=told)
    many = predictions(K=2, N=4000, C=200)
    single(make_run(folder / "many", many), "many")
    single(make_run(folder / "unfinished", ended=False, keep=False), "unfinished")
    reid_run = read_run(make_retrieval_run(folder / "reid"))
    write("reid", run_page(reid_run, reid.SCORING))
    runs = [make_run(folder / f"seed{k}", predictions(seed=k), seed=k) for k in range(3)]
    runs.append(make_run(folder / ("long" * 20), predictions(), lr=0.5))
    write("several", comparison_page([read_run(run) for run in runs], [SCORING] * 4))
    return found


PAGES = ("digits", "odd", "many", "unfinished", "reid", "several")


@pytest.fixture(params=PAGES)
def page(request, driver, pages):
    look(driver)
    driver.get_log("browser")
    requests(driver)
    driver.get(pages[request.param].as_uri())
    return pages[request.param]


def test_nothing_is_asked_for_and_nothing_complains(driver, page):
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert requests(driver) == [page.as_uri()]
    assert driver.get_log("browser") == []
    assert driver.execute_script("return document.scripts.length") == 0
    broken = "return [...document.images].filter(i => !i.naturalWidth).length"
    assert driver.execute_script(broken) == 0


def test_nothing_from_elsewhere_would_be_loaded(driver, pages, tmp_path):
    """Even if a name became an element: the page forbids it, which the console says."""
    text = pages["digits"].read_text()
    evil = "<img src='https://example.org/x.png'><script>document.title = 'evil'</script>"
    path = tmp_path / "evil.html"
    path.write_text(text.replace("</main>", f"{evil}</main>"))
    requests(driver)
    driver.get(path.as_uri())
    assert "Content Security Policy" in json.dumps(driver.get_log("browser"))
    assert driver.title != "evil"
    assert [u for u in requests(driver) if u.startswith("http")] in (
        [],
        ["https://example.org/x.png"],
    )


def test_no_id_twice_and_everything_has_a_name(driver, page):
    ids = driver.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = ("link", "image", "region", "table", "heading", "DisclosureTriangle", "navigation")
    seen = set()
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in named and not node.get("ignored"):
            seen.add(role)
            assert node.get("name", {}).get("value", "").strip(), node
    assert {"link", "table", "heading", "region"} <= seen


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_marks_stand_out(driver, page, dark):
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    look(driver, dark=dark)
    found = driver.execute_script(CONTRASTS)
    assert len(found) > 50
    assert min(found) >= [4.5], min(found)
    marks = driver.execute_script(MARKS)
    assert all(mark >= 3 for mark in marks)
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("width", [320, 600])
def test_no_sideways_scrolling_of_the_page(driver, page, width):
    look(driver, width=width, height=700)
    for opened in (False, True):
        driver.execute_script(
            "document.querySelectorAll('details').forEach(d => d.open = arguments[0])", opened
        )
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script(WIDE) == []
    assert driver.execute_script(CUT_OFF) == 0


def test_by_keyboard(driver, page):
    """Tab goes through links, tables that scroll and details from top to bottom, each with a
    visible outline; Enter opens what is closed."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> dict | None:
        ActionChains(driver).send_keys(key).perform()
        return driver.execute_script(FOCUSED)

    first = press(Keys.TAB)
    assert first["text"] == "Skip to the result"
    assert first["seen"]
    assert first["top"] >= 0
    press(Keys.ENTER)
    assert driver.execute_script("return document.activeElement.id") == "main"
    wanted = "return document.querySelectorAll('a, summary, .scroll').length"
    hidden = (
        "return [...document.querySelectorAll('.scroll')].filter(e => !e.checkVisibility()).length"
    )
    count = driver.execute_script(wanted) - driver.execute_script(hidden)
    driver.get(page.as_uri())
    stops = []
    while len(stops) <= count and (stop := press(Keys.TAB)):
        stops.append(stop)
        assert stop["outline"] == "solid 3", stop
        assert stop["seen"], stop
    assert len(stops) == count
    assert {"A", "SUMMARY", "DIV"} >= {stop["tag"] for stop in stops}
    assert all(stop["label"] for stop in stops if stop["tag"] == "DIV")
    rows = [stop["top"] for stop in stops if stop["tag"] == "DIV"]
    assert rows == sorted(rows)
    driver.execute_script("document.querySelector('summary').focus()")
    press(Keys.ENTER)
    assert driver.execute_script("return document.querySelector('details').open")


def test_values_under_the_pointer(driver, pages):
    driver.get(pages["digits"].as_uri())
    titles = driver.execute_script(
        "return [...document.querySelectorAll('.strip title')].map(e => e.textContent)"
    )
    assert any(title.startswith("epoch 2\nresnet8-1, mutual: ") for title in titles)
    strip = "const s = document.querySelector('.strip'); s.scrollIntoView({behavior: 'instant'});"
    box = driver.execute_script(f"{strip} return s.getBoundingClientRect().toJSON()")
    where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **where})
    hit = "return document.elementFromPoint(arguments[0], arguments[1]).classList[0]"
    assert driver.execute_script(hit, where["x"], where["y"]) == "strip"
    shown = "return getComputedStyle(document.querySelector('.strip')).fill"
    assert driver.execute_script(shown) != "rgba(0, 0, 0, 0)"


def test_on_paper(driver, page):
    look(driver, width=794, height=1123, media="print", dark=True)
    assert not driver.execute_script("return document.querySelector('nav').checkVisibility()")
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert driver.execute_script(paper) == "rgb(255, 255, 255)"
    assert min(driver.execute_script(CONTRASTS)) >= [4.5]
    pdf = driver.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert pdf.startswith("JVBERi")  # %PDF


def test_no_motion_for_those_who_want_none(driver, pages):
    driver.get(pages["digits"].as_uri())
    scroll = "return getComputedStyle(document.documentElement).scrollBehavior"
    for motion, behavior in ((False, "auto"), (True, "smooth")):
        look(driver, motion=motion)
        assert driver.execute_script(scroll) == behavior
