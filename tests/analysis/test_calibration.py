"""Calibration against closed forms, torch and known mixtures, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml.analysis.calibration import (
    HIGHEST,
    LOWEST,
    calibration_scores,
    fit_temperature,
    peers_temperature_scaling,
    plot_reliability,
    plot_temperature_scaling,
    temperature_scaling,
)
from fastdml.errors import InputError
from fastdml.report.statistics import reliability


def sample(n=400, c=5, scale=3.0, seed=0):
    """Logits, and labels drawn from their own softmax: calibrated at temperature 1."""
    random = np.random.default_rng(seed)
    z = scale * random.standard_normal((n, c))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) < random.random((n, 1))).sum(axis=1)
    return z, labels


class TestReliability:
    def test_a_known_mixture(self):
        """300 images at 0.9 of which 70 % are right, 100 at 0.55 of which 60 % are."""
        confidence = np.r_[np.full(300, 0.9), np.full(100, 0.55)]
        right = np.r_[np.arange(300) < 210, np.arange(100) < 60]
        for equal_mass in (False, True):
            of = reliability(confidence, right, bins=10, equal_mass=equal_mass)
            assert of.ece == pytest.approx(0.75 * 0.2 + 0.25 * 0.05)
            assert of.mce == pytest.approx(0.2)
            assert sorted(of.images[of.images > 0]) == [100, 300]
        plain = of.to_dict()
        assert plain["images"] == of.images.tolist()
        assert len(plain["edges"]) == 11

    @given(
        values=st.lists(st.floats(0.01, 1), min_size=1, max_size=60),
        bins=st.integers(1, 12),
        equal_mass=st.booleans(),
        seed=st.integers(0, 9),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_image_is_in_the_bin_of_its_confidence(self, values, bins, equal_mass, seed):
        confidence = np.array(values)
        right = np.random.default_rng(seed).random(len(values)) < confidence
        of = reliability(confidence, right, bins=bins, equal_mass=equal_mass)
        assert of.images.sum() == len(values)
        assert 0 <= of.ece <= of.mce + 1e-15 <= 1 + 1e-15
        for m, (low, high) in enumerate(zip(of.edges[:-1], of.edges[1:], strict=True)):
            inside = (confidence > low - 1e-12) & (confidence <= high + 1e-12)
            assert of.images[m] <= inside.sum()
        order = np.random.default_rng(seed).permutation(len(values))
        again = reliability(confidence[order], right[order], bins=bins, equal_mass=equal_mass)
        assert again.images.tolist() == of.images.tolist()

    def test_equal_mass_has_as_many_in_each(self):
        confidence = np.random.default_rng(0).uniform(0.8, 1, 1000)
        of = reliability(confidence, confidence > 0.9, bins=10, equal_mass=True)
        assert of.images.tolist() == [100] * 10

    def test_no_probabilities(self):
        of = reliability(np.array([0.9, math.nan]), np.array([True, True]))
        assert math.isnan(of.ece)
        assert of.images.sum() == 1


class TestScores:
    def test_closed_forms(self):
        """p = (3/4, 1/4) for four images, labels 0, 0, 0, 1: calibrated, NLL = entropy."""
        z = np.log(np.tile([0.75, 0.25], (4, 1))) + 7.0
        of = calibration_scores(z, [0, 0, 0, 1])
        entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        assert of.nll == pytest.approx(entropy, rel=1e-14)
        assert of.entropy == pytest.approx(entropy, rel=1e-14)
        assert of.brier == pytest.approx(0.75 * 2 * 0.25**2 + 0.25 * 2 * 0.75**2, rel=1e-14)
        assert (of.accuracy, of.confidence) == (0.75, pytest.approx(0.75))
        assert of.reliability.ece == pytest.approx(0, abs=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_of_tensors_as_torch_has_them(self, dtype):
        z, y = (torch.tensor(part) for part in sample())
        z = z.to(dtype).requires_grad_()
        of = calibration_scores(z, y)
        log_p = z.detach().double().log_softmax(1)
        assert of.nll == pytest.approx(float(torch.nn.functional.nll_loss(log_p, y)), rel=1e-12)
        hot = torch.nn.functional.one_hot(y, 5)
        assert of.brier == pytest.approx(float(((log_p.exp() - hot) ** 2).sum(1).mean()))
        assert of.entropy == pytest.approx(float(-(log_p.exp() * log_p).sum(1).mean()))

    def test_what_has_no_probabilities_is_not_hidden(self):
        z, y = sample(n=6)
        for bad in (math.nan, math.inf):
            z[2, 1] = bad
            of = calibration_scores(z, y)
            assert math.isnan(of.nll)
            assert math.isnan(of.entropy)
            assert of.accuracy <= 5 / 6
        z[2] = -math.inf
        assert math.isnan(calibration_scores(z, y).nll)
        z[2] = [0, -math.inf, 0, 0, 0]  # a class that is ruled out, and still four
        y[2] = 0
        assert calibration_scores(z[2:3], y[2:3]).entropy == pytest.approx(math.log(4))

    def test_mistakes(self):
        for logits, labels, said in (
            (np.zeros(3), [0, 1, 2], r"\(N, C\) and labels"),
            (np.zeros((2, 3)), [0], "not"),
            (np.zeros((2, 3)), [0, 3], r"within 0\.\.2"),
            (np.zeros((2, 3)), [0.0, 1.0], "whole numbers"),
        ):
            with pytest.raises(InputError, match=said):
                calibration_scores(logits, labels)


class TestTemperature:
    @pytest.mark.parametrize("true", [0.1, 0.5, 1.0, 2.5, 30.0])
    def test_of_a_known_mixture(self, true):
        """Four images of p = (3/4, 1/4), three of them right: log p times T is fitted by T."""
        z = true * np.log(np.tile([0.75, 0.25], (4, 1)))
        assert fit_temperature(z, [0, 0, 0, 1]) == pytest.approx(true, rel=1e-9)

    @given(scale=st.floats(0.2, 6), c=st.integers(2, 7), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_no_other_temperature_is_better(self, scale, c, seed):
        z, y = sample(60, c, scale, seed)
        best = fit_temperature(3 * z, y)
        lowest = calibration_scores(3 * z / best, y).nll
        for other in np.geomspace(LOWEST, HIGHEST, 60):
            assert lowest <= calibration_scores(3 * z / other, y).nll + 1e-12

    def test_the_ends(self):
        z = np.array([[2.0, 0.0], [0.0, 1.0]])
        assert fit_temperature(z, [0, 1]) == LOWEST  # all right: the surer the better
        assert fit_temperature(z, [1, 0]) == HIGHEST  # all wrong: the less sure the better
        assert fit_temperature(100 * z, [0, 1]) == LOWEST  # where every probability is 0 or 1
        assert fit_temperature(np.zeros((3, 2)), [0, 1, 1]) == 1

    def test_a_class_that_is_ruled_out_changes_nothing(self):
        z, y = sample(100)
        wider = np.column_stack([3 * z, np.full(100, -math.inf)])
        assert fit_temperature(wider, y) == pytest.approx(fit_temperature(3 * z, y), rel=1e-12)

    def test_what_no_temperature_fits(self):
        z = np.zeros((2, 3))
        z[0, 0] = -math.inf
        with pytest.raises(InputError, match="1 of 2 labels have probability 0"):
            fit_temperature(z, [0, 1])
        z[0, 0] = math.nan
        with pytest.raises(InputError, match="1 of 2 images: they are NaN"):
            fit_temperature(z, [0, 1])

    def test_each_half_is_scaled_by_the_other(self):
        """An image whose label is changed leaves the temperature of its own half as it was."""
        z, y = sample(400)
        found = temperature_scaling(2 * z, y, seed=3)
        assert found.temperatures == pytest.approx((2, 2), rel=0.25)
        assert found.after.nll < found.before.nll
        assert found.after.reliability.ece < found.before.reliability.ece
        assert found.after.accuracy == found.before.accuracy
        other = y.copy()
        place = np.random.default_rng(3).permutation(400)[0]  # of the first half
        other[place] = (y[place] + 1) % 5
        changed = temperature_scaling(2 * z, other, seed=3)
        assert changed.temperatures[0] == found.temperatures[0]
        assert changed.temperatures[1] != found.temperatures[1]

    def test_fitted_on_images_that_are_given(self):
        z, y = sample(400)
        found = temperature_scaling(2 * z[:200], y[:200], fit=(2 * z[200:], y[200:]))
        (temperature,) = found.temperatures
        assert temperature == fit_temperature(2 * z[200:], y[200:])
        expected = calibration_scores(2 * z[:200] / temperature, y[:200])
        assert str(found.after.to_dict()) == str(expected.to_dict())
        with pytest.raises(InputError, match="one image has no other half"):
            temperature_scaling(z[:1], y[:1])

    def test_peers_and_their_ensemble(self):
        z, y = sample(300)
        other = np.roll(z, 1, axis=1)
        found = peers_temperature_scaling([2 * z, torch.tensor(other)], y, ["a", "b"])
        assert found.peers == ("a", "b", "ensemble")
        assert found.images == 300
        assert found.temperatures.shape == (3, 2)
        mean = (np.exp(np.stack([2 * z, other])) / np.exp(np.stack([2 * z, other])).sum(
            2, keepdims=True)).mean(0)  # fmt: skip
        assert found.nll[2] == pytest.approx(-np.log(mean[np.arange(300), y]).mean())
        assert found.scaled_ece[0] == pytest.approx(
            temperature_scaling(2 * z, y).after.reliability.ece
        )
        assert peers_temperature_scaling([z], y, ["a"]).peers == ("a",)
        assert found.to_dict()["peers"] == ["a", "b", "ensemble"]


@pytest.mark.parametrize(
    ("confidence", "right", "said"),
    [
        ([97.0, 50.0], [True, False], "confidence must be within 0 to 1, not 0 to 97"),
        ([-0.5, 0.5], [True, False], "within 0 to 1, not -0.5 to 1"),
        ([0.9, 0.5], [7, 0], "right must be true or false of each image"),  # predicted classes
    ],
)
def test_percent_and_predicted_classes_are_not_taken_for_shares_and_hits(confidence, right, said):
    with pytest.raises(InputError, match=said):
        reliability(np.array(confidence), np.array(right))


def test_a_probability_that_rounding_leaves_above_1_is_in_the_last_bin():
    of = reliability(np.array([1.0000002], np.float32), np.array([1]))
    assert of.images[-1] == 1


def test_plots(tmp_path):
    found = temperature_scaling(*sample(100))
    assert plot_reliability(found.before.reliability, tmp_path / "a.svg").stat().st_size
    text = plot_temperature_scaling(found, tmp_path / "b.svg").read_text()
    assert text.startswith("<?xml")
