"""The documentation as a site: it is built without warnings and loads nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.docs

# What a browser loads by itself, in contrast to links that a reader may follow.
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)"
    r"|<link\b(?![^>]*rel=[\"']?(?:canonical|prev|next))[^>]*?\bhref=[\"']?([^\"'\s>]+)"
    r"|@import\s+(?:url\()?[\"']?([^\"')\s;]+)|\burl\([\"']?([^\"')]+)"
)


def test_every_page_is_in_the_site(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"kernels", "changelog"}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_the_site_loads_nothing_from_elsewhere(site):
    seen = 0
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for found in LOADED.findall(path.read_text()):
            (address,) = filter(None, found)
            assert not re.match(r"(https?:)?//", address), f"{path.name}: {address}"
            seen += 1
    assert seen > 50


def test_words_of_the_pages_are_found_by_the_search(site):
    index = (site / "search" / "search_index.json").read_text()
    assert "mutual learning" in index.lower()
    assert "retain_graph" in index
