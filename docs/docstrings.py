"""Docstrings as Markdown, for the API reference: an argument that begins a line becomes an item of
a list, and stars are stars.

In a docstring of this project a paragraph may be a list of arguments or attributes, each on a line
of its own (`labels: (N,) int64 or int32.`) with its further lines below. `help` shows it as it is.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^([a-zA-Z_]\w*(?:, \w+)*): ")
CODE = re.compile(r"(`[^`]*`)")


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and not obj.is_module:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if not ITEM.match(lines[0]):
        return text if text.startswith("    ") else _plain(text)  # indented: code
    out: list[str] = []
    for line in lines:
        item = ITEM.match(line)
        if item:
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            out.append(f"- {names}: {_plain(line[item.end() :])}")
        else:
            out.append(f"    {_plain(line.strip())}")
    return "\n".join(out)


def _plain(text: str) -> str:
    """The text with what Markdown would take for emphasis or HTML, outside of code, escaped."""
    parts = CODE.split(text)
    parts[::2] = [p.replace("*", "\\*").replace("<", "&lt;") for p in parts[::2]]
    return "".join(parts)
