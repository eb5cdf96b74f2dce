"""What mkdocs asks while it builds the site: pages that stand elsewhere in the repository, and
links to them.

The pages are written for a code host, where a link is a path in the repository. In the site a link
to a page that is part of it leads there; an example that is linked to, or a picture of results/,
is copied beside the pages; another link becomes plain text, such as one to a folder, as a site has
no folders to show.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # pages of the site by their path in the repository
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
NAMED = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)  # a row of a table of names in api.md
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r'(<img src=")([^"]+)(")')
BLOCK = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "examples").iterdir()):
        if path.is_file():
            files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "results").rglob("*.png")):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    written = {place: source for source, place in ELSEWHERE.items()}
    source = written.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = BLOCK.split(markdown)  # every second part is a block of code
    parts[::2] = [LINK.sub(lambda m: _link(m[1], m[2], source, page, files), p) for p in parts[::2]]
    parts[::2] = [PICTURE.sub(lambda m: _picture(m, source), part) for part in parts[::2]]
    text = "".join(parts)
    return _reference(text) if page.file.src_uri == "api.md" else text


def _link(text: str, link: str, source: str, page: Any, files: Files) -> str:
    """A link of the page that is written in the file `source`, as the site has it."""
    target, mark, anchor = link.partition("#")
    if not target or re.match(r"[a-z]+:", target):
        return f"[{text}]({link})"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    place = ELSEWHERE.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(place) is None:
        if not (ROOT / path).exists():
            return f"[{text}]({link})"  # for mkdocs to complain about
        return text
    here = posixpath.dirname(page.file.src_uri)
    return f"[{text}]({os.path.relpath(place, here or '.')}{mark}{anchor})"


def _picture(found: re.Match[str], source: str) -> str:
    """A picture of results/ as the site has it, whose pages are beside that folder."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
    return f"{found[1]}{path}{found[3]}" if path.startswith("results/") else found[0]


def _reference(markdown: str) -> str:
    """api.md with the documentation of each name below the tables, and links from there to it."""
    parts = re.split(r"^## (fastdml\S*)$", markdown, flags=re.MULTILINE)
    out = [parts[0]]
    for module, text in zip(parts[1::2], parts[2::2], strict=True):
        names = NAMED.findall(text)
        linked = NAMED.sub(rf"| [`\1`][{module}.\1] |", text)
        blocks = "\n\n".join(f"::: {module}.{name}" for name in names)
        out += [f"## {module}", linked, f"{blocks}\n\n"]
    return "".join(out)
