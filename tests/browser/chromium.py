"""Debian's Chromium, headless, driven by selenium: a page of a file, its console, its requests."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1200,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser itself reaches nobody either
)  # fmt: skip


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A browser with a fresh profile in that folder, which logs its console and its network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    start = {"session.restore_on_startup": 4, "session.startup_urls": ["about:blank"]}
    options.add_experimental_option("prefs", start)  # else its own page of new tabs, and requests
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        driver.get("about:blank")
        requests(driver)  # those of its start
        yield driver
    finally:
        driver.quit()


def look(
    driver: Any,
    *,
    width: int = 1200,
    height: int = 900,
    dark: bool = False,
    motion: bool = False,
    media: str = "",
) -> None:
    """Gives the page this many pixels, preferences for dark or light and for motion, and a medium
    ("print"). Without motion it scrolls at once, so that nothing needs waiting for."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    moves = {"name": "prefers-reduced-motion", "value": "no-preference" if motion else "reduce"}
    features = {"media": media, "features": [scheme, moves]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)


def requests(driver: Any) -> list[str]:
    """The addresses that were asked for since the last call, but for data: within the page."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


def screenshot(driver: Any, path: Path) -> None:
    """The whole page, not only what is in the window."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    found = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    path.write_bytes(base64.b64decode(found["data"]))
