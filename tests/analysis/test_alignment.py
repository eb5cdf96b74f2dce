"""Centred kernel alignment, against what it must not see and against its definitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import images, small_conv

from fastdml import Cohort, ReidHead
from fastdml.analysis import kernel_alignment, linear_cka
from fastdml.analysis.alignment import _kernel, _pairs
from fastdml.errors import InputError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 5)) + 3, RNG.normal(size=(12, 7))
Y[:, :3] += X[:, :3]


def rotation(size):
    return np.linalg.qr(RNG.normal(size=(size, size)))[0]


@pytest.mark.parametrize("debiased", [False, True])
def test_what_it_does_not_see(debiased):
    value = linear_cka(X, Y, debiased=debiased)
    changed = linear_cka(2.5 * X @ rotation(5) - 7, 0.1 * Y @ rotation(7) + 1, debiased=debiased)
    assert changed == pytest.approx(value, rel=1e-10)
    assert linear_cka(Y, X, debiased=debiased) == pytest.approx(value, rel=1e-12)
    assert linear_cka(X, X @ rotation(5), debiased=debiased) == pytest.approx(1, rel=1e-12)
    assert 0.05 < value < 0.95


def test_definition_of_kornblith():
    """|Y'X|^2 / (|X'X| |Y'Y|) of centred features; of two columns the squared correlation."""
    x, y = X - X.mean(0), Y - Y.mean(0)
    norm = np.linalg.norm
    expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    assert linear_cka(X, Y) == pytest.approx(expected, rel=1e-12)
    column = linear_cka(X[:, :1], Y[:, :1])
    assert column == pytest.approx(np.corrcoef(X[:, 0], Y[:, 0])[0, 1] ** 2, rel=1e-12)


def test_by_hand():
    """Features 1, -1, 0, 0 and 1, -1, 1, -1: correlation 2 / sqrt(2 x 4), squared 1/2."""
    x, y = [[1.0], [-1], [0], [0]], [[1.0], [-1], [1], [-1]]
    assert linear_cka(x, y) == pytest.approx(0.5, rel=1e-12)
    # debiased, n = 4, K = xx' and L = yy' with diagonals of 0: tr(KL) = 2; the sums of their rows
    # are (-1, -1, 0, 0) and (-1, -1, -1, -1). HSIC(x, y) = (2 + 8/6 - 2)/4 = 1/3, HSIC(x, x) =
    # (2 + 4/6 - 2)/4 = 1/6, HSIC(y, y) = (12 + 16/6 - 4)/4 = 8/3
    expected = (1 / 3) / np.sqrt(1 / 6 * 8 / 3)
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected, rel=1e-12)


def test_mean_over_all_batches_is_that_of_all_images():
    """The debiased criterion is a U-statistic of four images: its mean over all batches of a size
    is exactly its value on all images."""
    n, size = 7, 5
    x, y = torch.tensor(X[:n]), torch.tensor(Y[:n])
    whole = _pairs([_kernel(x, True), _kernel(y, True)], True)
    chosen = [list(c) for c in combinations(range(n), size)]
    parts = [_pairs([_kernel(x[c], True), _kernel(y[c], True)], True) for c in chosen]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-10, atol=1e-10)


class Columns(nn.Module):
    """Logits from a linear layer on some columns of its input."""

    def __init__(self, at, width):
        super().__init__()
        self.at = at
        self.head = nn.Linear(width, 3).double()

    def forward(self, x):
        return self.head(x[:, self.at])


def test_features_of_networks_over_batches():
    """What their last linear layers get; of equal batches the mean over these."""
    both = torch.tensor(np.concatenate([X, Y], 1))
    labels = torch.zeros(12, dtype=torch.int64)
    models = [Columns(slice(0, 5), 5), Columns(slice(5, 12), 7)]
    for debiased in (False, True):
        found = kernel_alignment(models, [(both, labels)], debiased=debiased)
        assert found.alignment[0, 0, 1] == pytest.approx(linear_cka(X, Y, debiased=debiased))
        np.testing.assert_allclose(found.alignment[0].diagonal(), 1)
    assert found.layers == ("features",)
    cut = list(zip(both.split(6), labels.split(6), strict=True))
    plain = kernel_alignment(models, cut, debiased=False)
    assert plain.alignment[0, 0, 1] == pytest.approx(linear_cka(X, Y))
    halves = [
        _pairs([_kernel(torch.tensor(f[i : i + 6]), True) for f in (X, Y)], True) for i in (0, 6)
    ]
    mean = sum(halves) / 2
    batched = kernel_alignment(models, cut)
    expected = mean[0, 1] / (mean[0, 0] * mean[1, 1]).sqrt()
    assert batched.alignment[0, 0, 1] == pytest.approx(float(expected))
    short = [*cut, (both[:3], labels[:3])]
    assert kernel_alignment(models, short).images == 12
    assert found.to_dict()["alignment"] == found.alignment.tolist()


def test_layers_by_name_and_networks_left_alone():
    models = [small_conv(0).train(), small_conv(1)]
    before = [len(m._forward_hooks) for model in models for m in model.modules()]
    found = kernel_alignment(models, images(), layers=["0", ["2", "5"]], debiased=False)
    assert found.layers == ("0", "2 / 5")
    assert found.alignment.shape == (2, 2, 2)
    x = torch.cat([inputs for inputs, _ in images()])
    with torch.no_grad():
        a, b = (model[0](x).flatten(1) for model in models)
    assert found.alignment[0, 0, 1] == pytest.approx(linear_cka(a, b), rel=1e-6)
    assert [m.training for m in models] == [True, False]
    assert [len(m._forward_hooks) for model in models for m in model.modules()] == before


def test_peers_with_a_head_are_compared_by_what_they_embed():
    cohort = Cohort(["resnet8", "resnet8"], 4, head=ReidHead()).eval()
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = kernel_alignment(cohort, [(x, torch.arange(6) % 4)], debiased=False)
    with torch.no_grad():
        expected = linear_cka(*cohort.embed(x))
    assert found.alignment[0, 0, 1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["7"]}, "no module '7'; its named_modules"),
        ({"layers": "0"}, "list of names"),
        ({"layers": [["0"]]}, "1 modules for 2"),
    ],
)
def test_layers_that_are_not_there(options, words):
    with pytest.raises(InputError, match=words):
        kernel_alignment([small_conv(), small_conv(1)], images(), **options)


def test_features_that_cannot_be_compared():
    with pytest.raises(InputError, match="name layers"):
        kernel_alignment(nn.Flatten(), images())
    with pytest.raises(InputError, match="same images"):
        linear_cka(X, Y[:5])
    with pytest.raises(InputError, match="needs 4 images"):
        linear_cka(X[:3], Y[:3], debiased=True)
    with pytest.raises(InputError, match="batch of 4"):
        kernel_alignment(small_conv(), images(rows=3))
    assert np.isnan(linear_cka(np.ones((5, 2)), X[:5]))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("n", [7, 9])
def test_a_feature_that_is_the_same_for_all_images(n, debiased):
    """Has no alignment with anything, itself included; and beside others it changes nothing."""
    same, other = np.full((n, 3), 0.1), RNG.normal(size=(n, 4))
    assert np.abs(same - same.mean(0)).max() > 0  # which centring alone does not show
    assert np.isnan(linear_cka(same, other, debiased=debiased))
    assert np.isnan(linear_cka(same, same, debiased=debiased))
    beside = np.concatenate([1e9 * same, other], 1)
    value = linear_cka(other, X[:n], debiased=debiased)
    assert linear_cka(beside, X[:n], debiased=debiased) == pytest.approx(value, rel=1e-10)
