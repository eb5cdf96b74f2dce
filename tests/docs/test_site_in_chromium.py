"""The built site in Chromium, opened as files: nothing is fetched, the search finds, and a narrow
screen shows whole pages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from chromium import CHROMIUM, DRIVER, browser, look, requests

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (importlib.util.find_spec("selenium") and CHROMIUM and DRIVER),
        reason="needs selenium, Chromium and chromedriver",
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def pages(site: Path) -> list[Path]:
    """All but the one for what a server does not find, which names the server's root."""
    return sorted(page for page in site.glob("*.html") if page.name != "404.html")


def complaints(driver) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_page_opens_without_a_network(driver, site, dark):
    look(driver, dark=dark)
    for page in pages(site):
        driver.get(page.as_uri())
        asked = requests(driver)
        assert asked, page.name
        assert all(url.startswith("file:") for url in asked), (page.name, asked)
        assert not complaints(driver), page.name
        scheme = driver.execute_script("return document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")


def test_a_narrow_screen_shows_whole_pages(driver, site):
    look(driver, width=360, height=700)
    for page in pages(site):
        driver.get(page.as_uri())
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360, page.name


def test_the_search_finds_words_without_a_server(driver, site):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    look(driver)
    driver.get((site / "index.html").as_uri())
    field = driver.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("retain_graph")
    found = WebDriverWait(driver, 30).until(
        lambda d: d.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    assert any("loss.html" in link.get_attribute("href") for link in found)
    assert not complaints(driver)
