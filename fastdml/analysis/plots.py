"""Plots of analyses, into a file or into the axes of a figure of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdml.errors import InputError
from fastdml.paths import expanded
from fastdml.report.plots import in_style, new_figure, save_figure

FORMATS = ("png", "pdf", "svg")
NAMES = 40  # beside a heat map, at most
NUMBERS = 12  # rows or columns of one, at most, for its cells to have room for numbers


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


def heat_map(
    axes: Any, matrix: Any, rows: Sequence[str], columns: Sequence[str], number: str
) -> None:
    """Draws (R, C) values from 0 to the largest, NaN grey; where there is room with their numbers,
    in this format, and all names."""
    image = axes.imshow(matrix, vmin=0, cmap="viridis", aspect="auto")
    axes.grid(False)
    axes.set_facecolor("0.9")
    for ticks, names in ((axes.set_yticks, rows), (axes.set_xticks, columns)):
        every = range(0, len(names), -(-len(names) // NAMES))
        ticks(every, [names[k] for k in every])
    if len(columns) > 3:
        axes.tick_params(axis="x", rotation=90)
    if max(len(rows), len(columns)) <= NUMBERS:
        top = image.get_clim()[1]
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                colour = "black" if value > 0.6 * top else "white"
                axes.text(j, i, number.format(value), ha="center", va="center", color=colour)
