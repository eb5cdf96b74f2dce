"""Plots of analyses, into a file or into the axes of a figure of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdml.errors import InputError
from fastdml.paths import expanded
from fastdml.report.plots import in_style, new_figure, save_figure

FORMATS = ("png", "pdf", "svg")


def drawn(where: Any, draw: Callable[[Any], None], height: float = 2.2) -> Path | None:
    """Calls `draw` with matplotlib axes: those given as `where`, or those of a new figure that is
    then written to the path `where`, which is returned. height: of that figure, in inches. Raises
    InputError for a path that names no format of pictures, or where it cannot write."""
    if hasattr(where, "plot"):
        draw(where)
        return None
    path = expanded(where)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"{path}: give a name that ends in .png, .pdf or .svg")
    with in_style():
        figure, axes = new_figure(height, 1, 1)
        draw(axes[0, 0])
        return save_figure(figure, path.with_suffix(""), [kind])[0]
