"""Gains by group, against intervals of pairs, and on peers that are alike but for their luck."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from report_runs import predictions_of

from fastdml.analysis.gains import (
    gains_by_class,
    gains_by_confidence,
    gains_by_group,
    gains_by_noise,
    gains_by_noise_level,
    plot_gains,
)
from fastdml.errors import InputError
from fastdml.report.statistics import Z95, paired_interval


def hits(K=2, N=400, share=0.6, seed=0):
    return np.random.default_rng(seed).random((K, N)) < share


class TestByGroup:
    def test_of_one_peer_it_is_the_paired_interval_of_each_group(self):
        before, after = hits(1), hits(1, seed=1)
        group = np.random.default_rng(2).integers(0, 3, 400)
        found = gains_by_group(before, after, group, list("abc"))
        for m in range(3):
            was, now = before[0, group == m], after[0, group == m]
            assert (found.low[m], found.high[m]) == pytest.approx(paired_interval(now, was))
            assert found.gain[m] == pytest.approx(now.mean() - was.mean())
            assert found.gained[m] == (now & ~was).sum()
            assert found.lost[m] == (was & ~now).sum()
            assert found.images[m] == len(was)

    def test_of_several_peers_it_is_that_of_their_mean(self):
        before, after = hits(3), hits(3, seed=1)
        found = gains_by_group(before, after, np.zeros(400, int), ["all"])
        expected = paired_interval(after.mean(axis=0), before.mean(axis=0))
        assert (found.low[0], found.high[0]) == pytest.approx(expected)
        assert found.gained[0] - found.lost[0] == after.sum() - before.sum()

    def test_answers_about_an_image_are_not_independent(self):
        """Three peers that answer alike know no more than one."""
        before, after = (np.repeat(hits(1, seed=s), 3, axis=0) for s in (0, 1))
        three = gains_by_group(before, after, np.zeros(400, int), ["all"])
        one = gains_by_group(before[:1], after[:1], np.zeros(400, int), ["all"])
        assert (three.low[0], three.high[0]) == pytest.approx((one.low[0], one.high[0]))

    def test_images_in_a_group_of_their_own_for_each_peer(self):
        """The formula of a ratio, by hand: of three images two, one and none of the answers."""
        before = np.array([[0, 0, 1], [1, 1, 0]], bool)
        after = np.array([[1, 1, 1], [1, 0, 0]], bool)
        group = np.array([[0, 0, 1], [0, -1, 1]])
        found = gains_by_group(before, after, group, ["first", "second"])
        assert found.images.tolist() == [2, 1]
        assert found.before.tolist() == [pytest.approx(1 / 3), 0.5]
        assert found.after.tolist() == [1, 0.5]
        gain = 2 / 3
        apart = (1 - 2 * gain) ** 2 + (1 - gain) ** 2  # of each image's sum from what it should be
        half = Z95 * math.sqrt(2 / 1 * apart) / 3
        assert (found.low[0], found.high[0]) == pytest.approx((gain - half, gain + half))
        assert math.isnan(found.low[1])  # of one image nothing can be told
        assert found.gained.tolist() == [2, 0]
        assert found.lost.tolist() == [0, 0]

    def test_a_group_without_images(self, tmp_path):
        found = gains_by_group(hits(), hits(), np.zeros(400, int), ["all", "none"])
        assert math.isnan(found.before[1])
        assert found.to_dict()["images"] == [400, 0]
        assert plot_gains(found, tmp_path / "gains.png").is_file()

    def test_no_answer_that_changed_is_no_certainty(self):
        found = gains_by_group(hits(), hits(), np.zeros(400, int), ["all"])
        assert found.gain[0] == 0
        assert math.isnan(found.low[0])

    def test_mistakes(self):
        with pytest.raises(InputError, match=r"not \[2, 400\], \[2, 400\] and \[3\]"):
            gains_by_group(hits(), hits(), np.zeros(3, int), ["all"])


def peers(skill, seed, K=2, N=20_000):
    """Peers whose chance to be right of an image, and confidence, is its ease and luck of their
    own, added up: all are alike but for that luck."""
    ease = np.random.default_rng(99).normal(1.0, 1.5, N)
    random = np.random.default_rng(seed)
    mind = ease + skill + random.normal(0, 1.0, (K + 1, N))
    sure = 1 / (1 + np.exp(-np.abs(mind)))
    return predictions_of((mind < 0).astype(int), np.zeros(N, int), sure, num_classes=2)


class TestOfRuns:
    def test_by_class(self):
        alone, mutual = peers(0, 1, N=400), peers(0.5, 2, N=400)
        label = np.random.default_rng(0).integers(0, 2, 400).astype(np.int32)
        alone, mutual = (dataclasses.replace(p, label=label) for p in (alone, mutual))
        found = gains_by_class(alone, mutual)
        assert found.groups == ("0", "1")
        assert found.images.tolist() == np.bincount(label).tolist()
        of = label == 1
        assert found.after[1] == pytest.approx((mutual.top[:2, of] == 1).mean())

    def test_by_confidence_peers_that_are_alike_gain_nothing(self):
        """Grouped by a peer's own confidence they would: it was unsure by its luck."""
        alone, other = peers(0, 1), peers(0, 2)
        found = gains_by_confidence(alone, other, bins=10)
        there = found.images > 100
        assert there.sum() >= 4
        inside = (found.low <= 0) & (found.high >= 0)
        assert inside[there].sum() >= there.sum() - 1
        own = np.ceil(alone.confidence[:2] * 10).astype(int) - 1
        right = [p.top[:2] == 0 for p in (alone, other)]
        biased = gains_by_group(*right, own, found.groups)
        assert biased.low[5] > 0
        assert biased.high[9] < 0

    def test_by_confidence_gains_are_where_they_were_made(self):
        alone, mutual = peers(0, 1), peers(0.5, 1)
        found = gains_by_confidence(alone, mutual)
        there = found.images > 100
        assert (found.gain[there] > 0).all()
        assert found.images.sum() >= 20_000  # an image may be in two groups
        assert found.gain[5] > found.gain[9]
        assert found.groups[9] == "90–100 %"

    def test_by_confidence_of_a_lone_peer_and_without_probabilities(self):
        top, label = np.array([[0, 1, -1]] * 2), [0, 0, 0]
        alone = predictions_of(top, label, [[0.95, 0.5, math.nan]] * 2)
        found = gains_by_confidence(alone, predictions_of(np.zeros((2, 3)), label, num_classes=2))
        assert found.images.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]

    def test_by_noise(self):
        alone, mutual = peers(0, 1, N=100), peers(0.5, 2, N=100)
        noisy = np.arange(100) < 30
        found = gains_by_noise(alone, mutual, noisy)
        assert found.images.tolist() == [70, 30]
        assert found.before[1] == pytest.approx((alone.top[:2, noisy] == 0).mean())
        for bad in (noisy.astype(int), noisy[:50]):
            with pytest.raises(InputError, match="noisy must be 100 values of true and false"):
                gains_by_noise(alone, mutual, bad)

    def test_by_level_of_noise(self):
        runs = {0.4: (peers(-1, 3), peers(-0.5, 4)), 0.0: (peers(0, 1), peers(0.1, 2))}
        found = gains_by_noise_level(runs)
        assert found.groups == ("0 %", "40 %")
        assert found.gain[1] > found.gain[0]
        assert found.images.tolist() == [20_000, 20_000]

    def test_what_cannot_be_compared(self):
        alone = peers(0, 1, N=50)
        others = (
            peers(0, 1, N=40),
            peers(0, 1, K=1, N=50),
            dataclasses.replace(alone, weights="best"),
            dataclasses.replace(alone, label=1 - alone.label),
        )
        for mutual in others:
            with pytest.raises(InputError, match="cannot be compared"):
                gains_by_class(alone, mutual)
