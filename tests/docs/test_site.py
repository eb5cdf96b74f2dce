"""The documentation as a site: it is built without warnings and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="the site is built by mkdocs-material, which is absent")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    return out


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
