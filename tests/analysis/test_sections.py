"""Sections through the loss, against a quadratic that is known everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import Quadratic, images, label_one, same_state, small_conv, state_of

from fastdml import Cohort
from fastdml.analysis import flat_minima, loss_plane, loss_section
from fastdml.analysis.networks import fixed_batches, score
from fastdml.errors import InputError

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]])
A, B, C = ([0.5, 0.1, -0.2], [-0.3, 0.4, 0.2], [0.1, -0.5, 0.3])


def quadratic(weights):
    return Quadratic(weights, HESSIAN)


def loss_at(weights):
    return 0.5 + weights @ HESSIAN @ weights / 2


def test_line_between_two_quadratics():
    a, b = np.array(A), np.array(B)
    found = loss_section([quadratic(A), quadratic(B)], label_one(), points=5, beyond=0.5)
    np.testing.assert_allclose(found.at, np.arange(-2, 7) / 4, atol=0)
    expected = [loss_at((1 - t) * a + t * b) for t in found.at]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-12)
    assert found.distance == pytest.approx(np.linalg.norm(b - a), rel=1e-12)
    # a convex loss lies below the straight line, which it meets at the ends
    assert found.barrier == pytest.approx(0, abs=1e-12)
    assert found.accuracy.tolist() == [float(loss < math.log(2)) for loss in expected]
    assert found.to_dict()["at"] == found.at.tolist()


def test_barrier_is_the_rise_above_the_straight_line():
    """A concave parabola t (1 - t) between losses that differ."""
    ends = [Quadratic([w], [[-8.0]], centre=0.4, c=3.0) for w in (0.0, 1.0)]
    found = loss_section(ends, label_one(), points=11)
    # -4 (t - 0.4)^2 + 3 is above the line between its ends by 4 t (1 - t): 1 in the middle
    assert found.barrier == pytest.approx(1.0, rel=1e-9)
    assert math.isnan(loss_section(ends, label_one(), peers=[1]).barrier)


def test_random_direction_of_one_network():
    model = quadratic(A)
    found = loss_section(model, label_one(), points=5, reach=2.0, seed=4)
    assert found.peers == ("Quadratic",)
    np.testing.assert_allclose(found.at, [-2, -1, 0, 1, 2])
    assert found.loss[2] == pytest.approx(loss_at(np.array(A)), rel=1e-12)
    # as long as the filter, along which a quadratic is a parabola: third differences vanish
    assert found.distance == pytest.approx(np.linalg.norm(A), rel=1e-6)
    np.testing.assert_allclose(np.diff(found.loss, 3), 0, atol=1e-12)
    other = loss_section(model, label_one(), points=5, reach=2.0, seed=5)
    assert abs(other.loss[0] - found.loss[0]) > 1e-3


def test_plane_through_three_quadratics():
    a, b, c = map(np.array, (A, B, C))
    found = loss_plane([quadratic(w) for w in (A, B, C)], label_one(), points=4)
    u = b - a
    along = (c - a) @ u / (u @ u)
    v = c - a - along * u
    across = np.linalg.norm(v) / np.linalg.norm(u)
    np.testing.assert_allclose(found.points, [[0, 0], [1, 0], [along, across]], rtol=1e-9)
    expected = [[loss_at(a + x * u + y * v / across) for x in found.x] for y in found.y]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-9)
    assert found.x[0] == pytest.approx(min(0, along) - 0.25)
    assert found.y[-1] == pytest.approx(across + 0.25)


def test_plane_of_two_peers_and_an_orthogonal_direction():
    models = [quadratic(A), quadratic(B)]
    found = loss_plane(models, label_one(), points=5, beyond=0.5, seed=2)
    line = loss_section(models, label_one(), points=3, beyond=0.5)
    np.testing.assert_allclose(found.x, line.at)
    np.testing.assert_allclose(found.loss[2], line.loss, rtol=1e-9)  # y = 0
    np.testing.assert_allclose(found.points, [[0, 0], [1, 0]])
    # the third direction is as long as u and orthogonal: of the isotropic loss |w|^2 / 2 the second
    # derivative along y is |u|^2, and there is no mixed term
    round_ = [Quadratic(w, np.eye(3)) for w in (A, B)]
    flat = loss_plane(round_, label_one(), points=3, seed=2).loss
    step = 0.75
    assert flat[0, 1] + flat[2, 1] - 2 * flat[1, 1] == pytest.approx(
        step**2 * found.distance**2, rel=1e-6
    )
    assert flat[0, 0] - flat[0, 2] - flat[2, 0] + flat[2, 2] == pytest.approx(0, abs=1e-9)


def test_plane_of_one_network():
    found = loss_plane(quadratic(A), label_one(), points=3, seed=1)
    line = loss_section(quadratic(A), label_one(), points=3, seed=1)
    np.testing.assert_allclose(found.loss[1], line.loss, rtol=1e-12)
    assert found.points.tolist() == [[0, 0]]


def test_ends_are_the_peers_and_the_middle_needs_statistics_of_its_own():
    """With stored statistics the ends are to the bit what the peers say; estimated afresh, those in
    the middle are the means of the batches' own."""
    a, b = small_conv(1), small_conv(2)
    data = images()
    stored = loss_section([a, b], data, points=3, beyond=0, batch_norm="stored")
    fixed = fixed_batches(data, torch.device("cpu"))
    assert [stored.loss[0], stored.loss[-1]] == [score(m, fixed).loss for m in (a, b)]

    fresh = loss_section([a, b], data, points=3, beyond=0)
    middle = small_conv(1)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        variances = []
        for x, _ in data:
            z = middle[0](x)
            variances.append((z.mean((0, 2, 3)), z.var((0, 2, 3))))
        middle[1].running_mean.copy_(torch.stack([mean for mean, _ in variances]).mean(0))
        middle[1].running_var.copy_(torch.stack([var for _, var in variances]).mean(0))
    assert fresh.loss[1] == pytest.approx(score(middle, fixed).loss, rel=1e-5)
    assert abs(fresh.loss[1] - stored.loss[1]) > 1e-4


def test_extrapolated_variances_are_no_nan():
    a, b = small_conv(1), small_conv(2)
    with torch.no_grad():
        b[1].running_var.fill_(1e-3)
    found = loss_section([a, b], images(), points=2, beyond=1.0, batch_norm="stored")
    assert np.isfinite(found.loss).all()


def test_dropout_stays_off_and_everything_comes_back():
    torch.manual_seed(0)
    models = [nn.Sequential(*small_conv(k), nn.Dropout(0.9)).train() for k in range(3)]
    before = [state_of(m) for m in models]
    first, again = (loss_plane(models, images(), points=2) for _ in range(2))
    np.testing.assert_array_equal(first.loss, again.loss)
    assert all(same_state(m, was) for m, was in zip(models, before, strict=True))
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    models[0][0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss_section(models, images(), points=3)
    assert same_state(models[0], before[0])


def test_peers_of_a_cohort_by_name():
    cohort = Cohort(["resnet8", "resnet8", "mobilenet"], 4)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.arange(4))]
    found = loss_section(cohort, data, peers=["resnet8-2", "resnet8-1"], points=2, beyond=0)
    assert found.peers == ("resnet8-2", "resnet8-1")
    direct = flat_minima(cohort[1], data, scales=[0.1], draws=1).loss[0, 0]
    stored = loss_section(cohort, data, peers=[1, 0], points=2, beyond=0, batch_norm="stored")
    assert stored.loss[0] == direct
    with pytest.raises(InputError, match="different architectures"):
        loss_plane(cohort, data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peers": [0, 0]}, "different ones"),
        ({"peers": [0, 1, 0]}, "1 to 2"),
        ({"peers": [2]}, "no peer 2"),
        ({"points": 1}, "points"),
        ({"beyond": -0.1}, "beyond"),
        ({"reach": 0}, "reach"),
        ({"batch_norm": "frozen"}, "frozen"),
    ],
)
def test_options_that_mean_nothing(options, words):
    with pytest.raises(InputError, match=words):
        loss_section([quadratic(A), quadratic(B)], label_one(), **options)


def test_places_that_span_nothing():
    with pytest.raises(InputError, match="same weights"):
        loss_section([quadratic(A), quadratic(A)], label_one())
    between = (np.array(A) + np.array(B)) / 2
    with pytest.raises(InputError, match="one line"):
        loss_plane([quadratic(w) for w in (A, B, between)], label_one())


class TwoLayers(nn.Module):
    def __init__(self, order="ab", tied=False):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.b(self.a(x).relu()).relu())


def activated(by):
    return nn.Sequential(nn.Linear(6, 9), by, nn.Linear(9, 3))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TwoLayers("ab"), TwoLayers("ba")),
        (TwoLayers(tied=True), TwoLayers()),
        (activated(nn.ReLU()), activated(nn.Tanh())),
    ],
    ids=["another order of layers", "a weight in common", "another activation"],
)
def test_networks_that_shapes_of_weights_do_not_tell_apart(first, second):
    """At 1 the loss would not be the second network's own."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3)]
    before = state_of(first)
    with pytest.raises(InputError, match="different architectures"):
        loss_section([first, second], data)
    assert same_state(first, before)


class AlwaysDropped(nn.Linear):
    """As people forget it: F.dropout is on unless training=self.training says otherwise."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


def test_networks_whose_evaluation_is_random_are_told_so():
    """Not that they are of different architectures; a single one, too."""
    models = [AlwaysDropped(6, 3), AlwaysDropped(6, 3)]
    data = [(torch.randn(8, 6), torch.arange(8) % 3)]
    before = [state_of(model) for model in models]
    for call in (loss_section, loss_plane):
        for given in (models, models[0]):
            with pytest.raises(InputError, match=r"other answers to the same inputs .* F\.dropout"):
                call(given, data)
    assert all(same_state(m, was) for m, was in zip(models, before, strict=True))


def test_single_images():
    """A layer gets one value a channel of each, which has no variance."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    data = [(torch.randn(1, 6), torch.zeros(1, dtype=torch.int64))] * 2
    with pytest.raises(InputError, match=r'batches of 1 are too small .* batch_norm="stored"'):
        loss_section(models, data)
    assert np.isfinite(loss_section(models, data, batch_norm="stored").loss).all()


def test_an_answer_that_is_nan_is_wrong():
    found = score(nn.Identity(), [(torch.tensor([[math.nan, 1], [2, 1]]), torch.tensor([0, 0]))])
    assert found.accuracy == 0.5
    assert math.isnan(found.loss)
