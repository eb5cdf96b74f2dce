"""Plots of the analyses of networks show the numbers of their results."""

from __future__ import annotations

import matplotlib.figure
import numpy as np
import pytest
from toy_networks import Quadratic, label_one

from fastdml.analysis import (
    KernelAlignment,
    Posterior,
    flat_minima,
    loss_plane,
    loss_section,
    plot_flat_minima,
    plot_kernel_alignment,
    plot_loss_plane,
    plot_loss_section,
    plot_posterior,
)
from fastdml.errors import InputError

MODELS = [Quadratic(w, np.eye(2)) for w in ([0.5, 0.1], [-0.3, 0.4], [0.2, -0.6])]


@pytest.fixture
def axes():
    return matplotlib.figure.Figure().subplots()


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_flat_minima(axes, tmp_path):
    for draws in (1, 3):  # one has no spread
        found = flat_minima(MODELS[:2], label_one(), scales=[0.1, 0.3], draws=draws)
        plot_flat_minima(found, axes)
    drawn = [container.lines[0].get_ydata() for container in axes.containers]
    np.testing.assert_allclose(drawn[2:], found.increase)
    assert texts(axes)[-2:] == ["Quadratic-1", "Quadratic-2"]
    assert plot_flat_minima(found, tmp_path / "a.svg").read_bytes().startswith(b"<?xml")


def test_posterior(axes):
    found = Posterior(("a", "b", "ensemble"), np.array([0.5, 1, 2]), np.eye(3), 7)
    plot_posterior(found, axes)
    assert [line.get_ydata().tolist() for line in axes.lines] == np.eye(3).tolist()
    assert texts(axes) == ["a, 0.50 nats", "b, 1.00 nats", "ensemble, 2.00 nats"]


def test_sections(axes):
    found = loss_section(MODELS[:2], label_one(), points=3)
    plot_loss_section(found, axes)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), found.loss)
    assert [text.get_text() for text in axes.texts] == ["Quadratic-1", "Quadratic-2"]
    np.testing.assert_allclose(axes.figure.axes[1].lines[0].get_ydata(), 100 * found.accuracy)


def test_planes(axes):
    found = loss_plane(MODELS, label_one(), points=3)
    plot_loss_plane(found, axes)
    points = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines]
    np.testing.assert_allclose(points, found.points)
    assert len(axes.texts) == 3


def test_kernel_alignment(axes):
    values = np.array([np.eye(2), [[1, 0.25], [0.25, 1]]])
    found = KernelAlignment(("a", "b"), ("first", "last"), values, 9, True)
    plot_kernel_alignment(found, axes)
    np.testing.assert_allclose(axes.images[0].get_array(), values[1])
    assert "0.25" in [text.get_text() for text in axes.texts]
    plot_kernel_alignment(found, axes, layer="first")
    np.testing.assert_allclose(axes.images[1].get_array(), values[0])
    with pytest.raises(InputError, match="no layer"):
        plot_kernel_alignment(found, axes, layer="middle")
