"""Agreement, confusion and divergence, against scikit-learn and on errors that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import predictions_of

from fastdml.analysis.agreement import agreement_of, peer_agreement, plot_agreement
from fastdml.analysis.confusion import confusion_matrix, plot_confusion
from fastdml.analysis.divergence import pairwise_kl, plot_pairwise_kl
from fastdml.errors import InputError
from fastdml.report.metrics_log import MetricsLog, to_json


class TestAgreement:
    def test_kappa_is_scikit_learns(self):
        metrics = pytest.importorskip("sklearn.metrics")
        random = np.random.default_rng(0)
        label = random.integers(0, 5, 300)
        top = np.where(random.random((3, 300)) < 0.6, label, random.integers(0, 5, (3, 300)))
        found = peer_agreement(top, label, list("abc"))
        for i in range(3):
            for j in range(3):
                expected = metrics.cohen_kappa_score(top[i], top[j])
                assert found.kappa[i, j] == pytest.approx(expected, abs=1e-12)
                assert found.same[i, j] == (top[i] == top[j]).mean()

    def test_errors_that_are_known(self):
        """Ten images of class 0. Peer 1 errs on four, peer 2 on five, two in common, one alike."""
        top = [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 2, 0, 0, 1, 1, 1, 0, 0, 0]]
        found = peer_agreement(top, np.zeros(10, int), ["a", "b"], disagreement=[0.1] * 10)
        assert found.both_wrong == pytest.approx(np.array([[0.4, 0.2], [0.2, 0.5]]))
        assert found.overlap[0, 1] == pytest.approx(0.2 / (0.4 * 0.5))  # independent of each other
        assert found.overlap[0, 0] == pytest.approx(1 / 0.4)
        assert found.same_error[0, 1] == pytest.approx(0.5)
        assert found.same[0, 1] == pytest.approx(0.4)
        assert found.any_right == pytest.approx(0.8)
        assert found.jsd == pytest.approx(0.1)
        assert found.images == 10

    def test_peers_that_err_independently_overlap_by_chance(self):
        random = np.random.default_rng(1)
        top = (random.random((2, 200_000)) < 0.3).astype(int)
        found = peer_agreement(top, np.zeros(200_000, int), ["a", "b"])
        assert found.overlap[0, 1] == pytest.approx(1, abs=0.03)
        assert found.kappa[0, 1] == pytest.approx(0, abs=0.01)
        assert math.isnan(found.jsd)

    @given(seed=st.integers(0, 99), K=st.integers(1, 4), N=st.integers(1, 30))
    @settings(max_examples=30, deadline=None)
    def test_what_holds_for_any_peers(self, seed, K, N):
        random = np.random.default_rng(seed)
        top, label = random.integers(-1, 4, (K, N)), random.integers(0, 4, N)
        found = peer_agreement(top, label, [str(k) for k in range(K)])
        for name in ("same", "kappa", "both_wrong", "overlap", "same_error"):
            matrix = getattr(found, name)
            assert matrix.shape == (K, K)
            assert np.allclose(matrix, matrix.T, equal_nan=True)
        assert found.both_wrong.diagonal() == pytest.approx((top != label).mean(axis=1))
        assert (found.kappa[~np.isnan(found.kappa)] <= 1 + 1e-12).all()
        assert (found.same.diagonal() == (top >= 0).mean(axis=1)).all()

    def test_peers_that_never_err_have_no_overlap(self):
        found = peer_agreement([[0, 1], [0, 1]], [0, 1], ["a", "b"])
        assert np.isnan(found.overlap).all()
        assert np.isnan(found.same_error).all()
        assert (found.kappa == 1).all()
        assert "null" in to_json(found.to_dict())

    def test_of_a_runs_predictions(self, tmp_path):
        found = agreement_of(predictions_of([[0, 1], [0, 0], [1, 1]], [0, 1]))
        assert found.peers == ("peer 1", "peer 2")  # the ensemble is no peer
        assert found.same[0, 1] == 0.5
        assert found.jsd == 0
        assert plot_agreement(found, tmp_path / "a.png").is_file()

    def test_mistakes(self):
        with pytest.raises(InputError, match=r"not \[2, 3\], \[3\] and 1"):
            peer_agreement(np.zeros((2, 3), int), np.zeros(3, int), ["a"])
        answers, names = np.zeros((2, 2), int), ("a", "b")
        with pytest.raises(InputError, match="labels must be whole numbers, 0 or more"):
            peer_agreement(answers, np.array([0, -1]), names)  # which no answer would be right of
        with pytest.raises(InputError, match="predicted must be whole numbers"):
            peer_agreement(answers + 0.5, np.array([0, 1]), names)


class TestConfusion:
    def test_is_scikit_learns(self, tmp_path):
        metrics = pytest.importorskip("sklearn.metrics")
        random = np.random.default_rng(2)
        label, said = random.integers(0, 6, 200), random.integers(0, 6, 200)
        found = confusion_matrix(label, said, 6, pairs=3)
        assert found.counts.tolist() == metrics.confusion_matrix(label, said).tolist()
        shares = metrics.confusion_matrix(label, said, normalize="true")
        assert found.shares == pytest.approx(shares)
        off = sorted(found.counts[~np.eye(6, dtype=bool)], reverse=True)
        assert [pair.images for pair in found.most_confused] == off[:3]
        assert found.classes == ("0", "1", "2", "3", "4", "5")
        plain = found.to_dict()
        assert plain["most_confused"][0][2] == off[0]
        assert plot_confusion(found, tmp_path / "a.png").is_file()

    def test_no_answer_and_no_images(self):
        found = confusion_matrix([0, 0, 1], [0, -1, 0], 3, classes=["a", "b", "c"])
        assert found.counts.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
        assert found.shares[0].tolist() == [0.5, 0, 0]
        assert np.isnan(found.shares[2]).all()
        assert [tuple(pair) for pair in found.most_confused] == [(1, 0, 1, 1.0)]

    def test_mistakes(self):
        for label, said, classes, told in (
            ([0], [0, 1], (), "must be"),
            ([0, 1], [0, 2], (), "predicted go to 2, but num_classes is 2"),
            ([0, -1], [0, 1], (), "labels must be whole numbers, 0 or more"),
            ([0, 1], [0.0, 1.0], (), "predicted must be whole numbers, -1 or more"),
            ([0, 1], [0, 1], ("a",), "2 names"),
        ):
            with pytest.raises(InputError, match=told):
                confusion_matrix(label, said, 2, classes=classes)


class TestDivergence:
    def test_of_a_log(self, tmp_path):
        with MetricsLog(tmp_path, ["a", "b"], tensorboard=False) as log:
            for epoch in (1, 2):
                log.log("train", 2 * epoch - 1, epoch - 0.5, pairwise_kl=[[0.0, 9.0], [9.0, 0.0]])
                log.log("epoch", 2 * epoch, epoch, pairwise_kl=[[0.0, 1 / epoch], [3.0, 0.0]])
                log.log("test", 2 * epoch, epoch, top1=[0.5, 0.5])
        found = pairwise_kl(tmp_path)
        assert found.epochs.tolist() == [1, 2]
        assert found.kl[:, 0, 1].tolist() == [1, 0.5]
        assert found.mean.tolist() == [2, 1.75]
        assert np.isnan(found.kl[:, 1, 1]).all()
        picture = plot_pairwise_kl({"mutual": found}, tmp_path / "kl.svg")
        assert picture.is_file()

    def test_without_pairs(self, tmp_path):
        with MetricsLog(tmp_path, ["a"], tensorboard=False) as log:
            log.log("epoch", 1, 1, ce=[1.0], pairwise_kl=[[0.0]])
        with pytest.raises(InputError, match="no divergence of two peers"):
            pairwise_kl(tmp_path)
