"""Plots of analyses go into a file, whole or not at all, or into axes that somebody gives."""

from __future__ import annotations

import matplotlib.figure
import matplotlib.image
import pytest

from fastdml.analysis.plots import drawn
from fastdml.errors import InputError


def line(axes) -> None:
    axes.plot([0, 1], [0, 1])


def test_a_file_of_each_format(tmp_path):
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for kind, start in starts.items():
        path = tmp_path / f"a.b.{kind}"
        assert drawn(path, line) == path
        assert path.read_bytes().startswith(start)
    height, width = matplotlib.image.imread(tmp_path / "a.b.png").shape[:2]
    assert (height, width) == (660, 1020)
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / f"a.b.{kind}" for kind in starts)


def test_axes_of_ones_own_are_drawn_into():
    axes = matplotlib.figure.Figure().subplots()
    assert drawn(axes, line) is None
    assert len(axes.lines) == 1


def test_a_path_that_is_no_picture(tmp_path):
    for name in ("curve", "curve.txt"):
        with pytest.raises(InputError, match=r"ends in \.png, \.pdf or \.svg"):
            drawn(tmp_path / name, line)
    with pytest.raises(InputError, match="cannot write"):
        drawn(tmp_path / "no" / "such.png", line)
