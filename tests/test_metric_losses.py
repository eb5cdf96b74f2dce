"""Metric losses against loops over anchors in float64; gradients; batches without pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdml import (
    CenterLoss,
    MetricLoss,
    circle_loss,
    distance_mutual_loss,
    triplet_loss,
)
from fastdml.errors import InputError

# ---- the definitions, an anchor at a time ----


def triplet_reference(x: Tensor, y: Tensor, margin: float | None) -> float:
    losses = []
    for a in range(len(x)):
        to = [(x[a] - other).square().sum().sqrt().item() for other in x]
        positives = [to[i] for i in range(len(x)) if i != a and y[i] == y[a]]
        negatives = [to[i] for i in range(len(x)) if y[i] != y[a]]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            losses.append(math.log1p(math.exp(gap)) if margin is None else max(0, gap + margin))
    return sum(losses) / len(losses) if losses else 0.0


def circle_reference(x: Tensor, y: Tensor, m: float, gamma: float) -> float:
    x = x / x.norm(dim=1, keepdim=True)
    losses = []
    for a in range(len(x)):
        s = [float(x[a] @ other) for other in x]
        s_p = [s[i] for i in range(len(x)) if i != a and y[i] == y[a]]
        s_n = [s[i] for i in range(len(x)) if y[i] != y[a]]
        if s_p and s_n:
            p = sum(math.exp(-gamma * max(0, 1 + m - v) * (v - (1 - m))) for v in s_p)
            n = sum(math.exp(gamma * max(0, v + m) * (v - m)) for v in s_n)
            losses.append(math.log(1 + p * n))
    return sum(losses) / len(losses) if losses else 0.0


def distance_mutual_reference(features: list[Tensor]) -> list[float]:
    losses = []
    for k, mine in enumerate(features):
        loss = 0.0
        for other in features[:k] + features[k + 1 :]:
            a, b = ((x[:, None] - x).square().sum(2).sqrt() for x in (mine, other))
            loss += (a - b).square().mean().item() / (len(features) - 1)
        losses.append(loss)
    return losses


def centers_reference(centers: Tensor, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    new = centers.clone()
    for j in range(len(centers)):
        mine = x[y == j]
        new[j] -= alpha * (centers[j] - mine).sum(0) / (1 + len(mine))
    return new


def batch(n=12, d=5, ids=4, seed=0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(ids, (n,), generator=generator)


batches = st.builds(
    batch, n=st.integers(1, 9), d=st.integers(1, 4), ids=st.integers(1, 5), seed=st.integers(0, 999)
)


@given(batches, st.sampled_from([None, 0.0, 0.3, 2.0]))
@settings(max_examples=30, deadline=None)
def test_triplet_is_its_definition(pair, margin):
    x, y = pair
    found = triplet_loss(x, y, margin=margin)
    assert found.item() == pytest.approx(triplet_reference(x, y, margin), rel=1e-6, abs=1e-9)


@given(batches, st.floats(0.05, 0.5), st.floats(1, 20))
@settings(max_examples=30, deadline=None)
def test_circle_is_its_definition(pair, m, gamma):
    x, y = pair
    found = circle_loss(x, y, margin=m, gamma=gamma)
    assert found.item() == pytest.approx(circle_reference(x, y, m, gamma), rel=1e-6, abs=1e-8)


@given(K=st.integers(1, 4), n=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_distance_mutual_is_its_definition(K, n, seed):
    features = [batch(n, d=k + 1, seed=seed + k)[0] for k in range(K)]
    found = distance_mutual_loss(features).tolist()
    assert found == pytest.approx(distance_mutual_reference(features), rel=1e-6, abs=1e-9)


@given(batches, st.sampled_from([0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_centres_follow_equation_4(pair, alpha):
    x, y = pair
    loss = CenterLoss(5, x.shape[1], alpha=alpha).double()
    expected = torch.zeros_like(loss.centers)
    for _ in range(3):
        squares = (x - expected[y]).square().sum(1)
        assert loss(x, y).item() == pytest.approx(squares.mean().item())
        expected = centers_reference(expected, x, y, alpha)
        torch.testing.assert_close(loss.centers, expected)
    loss.eval()(x, y)
    torch.testing.assert_close(loss.centers, expected)  # evaluation leaves them


def test_centres_come_to_their_identities():
    loss = CenterLoss(3, 2)
    x, y = torch.tensor([[1.0, 1], [3, 3], [-5, 2]]), torch.tensor([0, 0, 2], dtype=torch.int32)
    values = [loss(x, y).item() for _ in range(80)]
    torch.testing.assert_close(loss.centers, torch.tensor([[2.0, 2], [0, 0], [-5, 2]]))
    assert values[-1] < 0.1 * values[0]


# ---- gradients ----


IDENTITIES = [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("y", IDENTITIES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: triplet_loss(x, y, margin=None),
        lambda x, y: triplet_loss(x, y, margin=1.5),
        lambda x, y: CenterLoss(5, 4).double().eval()(x, y),
    ],
    ids=["soft", "margin", "center"],
)
def test_gradients(loss, y):
    x = batch(5, 4)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor(y)), x)


@pytest.mark.parametrize("y", IDENTITIES)
def test_gradients_of_the_circle_loss(y):
    """Not by gradcheck, which would move the weights a_p and a_n, constants of the loss."""
    x, y = batch(5, 4)[0].requires_grad_(), torch.tensor(y)
    (found,) = torch.autograd.grad(circle_loss(x, y, gamma=8.0), x)
    torch.testing.assert_close(found, circle_gradient(x, y, 0.25, 8.0))


def circle_gradient(x: Tensor, y: Tensor, m: float, gamma: float) -> Tensor:
    """By finite differences of the definition with its weights held."""

    def value(x: Tensor, held: Tensor) -> float:
        unit, fixed = (t / t.norm(dim=1, keepdim=True) for t in (x, held))
        s, h = unit @ unit.T, fixed @ fixed.T
        losses = []
        for a in range(len(x)):
            p = [i for i in range(len(x)) if i != a and y[i] == y[a]]
            n = [i for i in range(len(x)) if y[i] != y[a]]
            if p and n:
                z_p = -gamma * (1 + m - h[a, p]).relu() * (s[a, p] - 1 + m)
                z_n = gamma * (h[a, n] + m).relu() * (s[a, n] - m)
                losses.append(math.log(1 + float(z_p.exp().sum() * z_n.exp().sum())))
        return sum(losses) / len(losses) if losses else 0.0

    x = x.detach()
    grad = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(x.shape[1]):
            step = torch.zeros_like(x)
            step[i, j] = 1e-6
            grad[i, j] = (value(x + step, x) - value(x - step, x)) / 2e-6
    return grad


def test_mutual_distances_teach_one_way():
    """A peer's loss moves that peer alone: the others' matrices are constants."""
    features = [batch(6, d)[0].requires_grad_() for d in (2, 3, 4)]
    grads = torch.autograd.grad(distance_mutual_loss(features)[1], features, allow_unused=True)
    assert grads[0] is None or not grads[0].any()
    assert grads[2] is None or not grads[2].any()
    constant = [x.detach() for x in features]

    def mine(x):
        return distance_mutual_loss([constant[0], x, constant[2]])[1]

    assert torch.autograd.gradcheck(mine, features[1])
    torch.testing.assert_close(torch.autograd.grad(mine(features[1]), features[1])[0], grads[1])


# ---- what a batch can be ----

LOSSES = {
    "triplet": {"triplet": 1.0},
    "soft": {"triplet": 1.0, "margin": None},
    "circle": {"circle": 1.0},
    "center": {"center": 1.0},
    "mutual": {"distance_mutual": 1.0},
    "all": {"triplet": 1.0, "circle": 0.5, "center": 0.1, "distance_mutual": 2.0},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "y", [[3, 3, 3, 3], [0, 1, 2, 3], [0, 0, 0, 1], [2], [0, 0]], ids=lambda y: "".join(map(str, y))
)
def test_every_batch_has_finite_losses(name, y):
    """One identity, identities with one image, equal images, one image, dead features."""
    y, n = torch.tensor(y), len(y)
    x = batch(n, 6, dtype=torch.float32)[0]
    for features in (x, x[:1].expand(n, 6), torch.zeros(n, 6), 1e4 * x, 1e4 + 1e-3 * x):
        loss = MetricLoss(num_classes=4, dims=(6, 6), **LOSSES[name])
        values, grads = loss.value_and_grad([features, -2 * features], y)
        assert values.isfinite().all()
        assert all(g.isfinite().all() for g in grads)
        assert all(b.isfinite().all() for b in loss.tensors())
        if name in ("triplet", "soft", "circle") and (len(set(y.tolist())) in (1, n)):
            assert not values.any()
            assert not any(g.any() for g in grads)


@pytest.mark.parametrize("name", ["triplet", "soft", "circle", "mutual", "center"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_seen_and_spoils_no_centre(name, bad):
    x, y = batch(dtype=torch.float32)
    x[3, 2] = bad
    loss = MetricLoss(num_classes=4, dims=(5, 5), **LOSSES[name])
    values, _ = loss.value_and_grad([x, batch(seed=1, dtype=torch.float32)[0]], y)
    assert not values[0].isfinite()
    assert all(b.isfinite().all() for b in loss.tensors())
    if name != "mutual":
        assert values[1].isfinite()


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_is_as_good_as_torchs(offset):
    """Also where all features share a large mean, as after a ReLU and average pooling."""
    x, y = batch(32, 64, ids=8)
    x = offset + x
    exact = triplet_loss(x, y, margin=None)
    ours = triplet_loss(x.float(), y, margin=None)
    assert abs(ours.item() - exact.item()) < 1e-5 * exact.item()
    both = [x, 0.5 * x.flip(1) + 1]
    exact = distance_mutual_loss(both)
    ours = distance_mutual_loss([f.float() for f in both])
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_half_precision_features_and_autocast_compute_in_float32():
    x, y = batch(16, 8, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        loss = MetricLoss(num_classes=4, dims=(8,), **LOSSES["all"])
        values, (grad,) = loss.value_and_grad([low], y)
        assert grad.dtype == dtype
        assert values.dtype == torch.float32
        again = MetricLoss(num_classes=4, dims=(8,), **LOSSES["all"])
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(again(list(low[None]), y), values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again.tensors()[0], loss.tensors()[0])


def test_the_order_of_the_images_does_not_matter():
    x, y = batch(16, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    one, two = (MetricLoss(num_classes=4, dims=(8, 8), **LOSSES["all"]).double() for _ in range(2))
    a, (g, _) = one.value_and_grad([x, x.tanh()], y)
    b, (h, _) = two.value_and_grad([x[order], x.tanh()[order]], y[order])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(g[order], h)
    for c, d in zip(one.tensors(), two.tensors(), strict=True):
        torch.testing.assert_close(c, d)


# ---- the weighted sum ----


def test_metric_loss_is_the_weighted_sum_of_each_peer():
    x, y = batch(12, 6)
    features = [x, x[:, :3].exp()]
    loss = MetricLoss(num_classes=4, dims=(6, 3), **LOSSES["all"]).double()
    mutual = distance_mutual_loss(features)
    expected = torch.stack([
        triplet_loss(f, y) + 0.5 * circle_loss(f, y) + 0.1 * f.square().sum(1).mean() + 2 * m
        for f, m in zip(features, mutual, strict=True)
    ])  # fmt: skip
    values, grads = loss.value_and_grad(features, y)
    torch.testing.assert_close(values, expected)
    leaves = [f.clone().requires_grad_() for f in features]
    fresh = MetricLoss(num_classes=4, dims=(6, 3), **LOSSES["all"]).double()
    fresh(leaves, y).sum().backward()
    for leaf, grad in zip(leaves, grads, strict=True):
        assert torch.equal(leaf.grad, grad)
    for old, new in zip(fresh.tensors(), loss.tensors(), strict=True):
        assert torch.equal(old, new)
        assert old.any()


def test_some_peers_alone():
    x, y = batch(12, 6)
    whole, part = (
        MetricLoss(num_classes=4, dims=(6, 6), **LOSSES["all"]).double() for _ in range(2)
    )
    values, grads = whole.value_and_grad([x, x.tanh()], y)
    mine, own = part.value_and_grad([x, x.tanh()], y, [1])
    assert mine[0] == 0
    assert not own[0].any()
    assert torch.equal(mine[1], values[1])
    assert torch.equal(own[1], grads[1])
    assert not part.tensors()[0].any()
    assert torch.equal(part.tensors()[1], whole.tensors()[1])


def test_centres_are_state():
    x, y = batch(12, 6)
    one, two = (MetricLoss(num_classes=4, dims=(6, 6), **LOSSES["all"]) for _ in range(2))
    one.value_and_grad([x, x], y)
    assert [t.shape for t in one.tensors()] == [(4, 6), (4, 6)]
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
    assert MetricLoss(num_classes=4, dims=(6,), triplet=1.0).tensors() == []


def test_compiles_without_graph_breaks():
    x, y = batch(12, 6, dtype=torch.float32)
    loss = MetricLoss(num_classes=4, dims=(6, 6), **LOSSES["all"]).eval()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled([x, x.tanh()], y), loss([x, x.tanh()], y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: triplet_loss(x[0], y), r"features of shapes \[\(5,\)\]: give each as \(N, D"),
        (lambda x, y: triplet_loss(x[:0], y[:0]), r"features of shapes \[\(0, 5\)\]"),
        (lambda x, y: circle_loss(x, y[:3]), r"labels of shape \(3,\) and torch.int64: give \(12,"),
        (lambda x, y: triplet_loss(x, y.float()), r"labels of shape \(12,\) and torch.float32"),
        (lambda x, y: distance_mutual_loss([]), r"features of shapes \[\]"),
        (lambda x, y: distance_mutual_loss([x, x[:3]]), "of the same N images"),
        (lambda x, y: CenterLoss(4, 6)(x, y), r"\(12, 5\): the centres have 6 dimensions"),
        (lambda x, y: metric(dims=(6, 5), triplet=1.0)([x, x], y), r"is for widths \(6, 5\)"),
        (lambda x, y: metric(dims=(5,), triplet=1.0)([x, x], y), r"is for widths \(5,\)"),
        (lambda x, y: metric(), "needs a weight above 0: triplet, center, circle, distance_mutual"),
        (lambda x, y: metric(triplet=-1.0), r"the weight triplet must be 0 or more, not -1\.0"),
        (lambda x, y: metric(triplet=1.0, margin=-0.1), r"margin must be 0 or more, or None"),
        (lambda x, y: metric(circle=math.nan), "the weight circle must be 0 or more, not nan"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(*batch())
    assert "\n" not in str(caught.value)


def metric(dims=(5, 5), **options) -> MetricLoss:
    return MetricLoss(num_classes=4, dims=dims, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name):
    x, y = batch(16, 8, dtype=torch.float32)
    loss = MetricLoss(num_classes=4, dims=(8, 8), **LOSSES[name])
    expected, (expected_grad, _) = loss.value_and_grad([x, x.tanh()], y)
    state = [t.clone() for t in loss.tensors()]
    loss = MetricLoss(num_classes=4, dims=(8, 8), **LOSSES[name]).cuda()
    features, labels = [x.cuda(), x.tanh().cuda()], y.cuda()
    loss.value_and_grad(features, labels)  # libraries start
    loss.load_state_dict({k: torch.zeros_like(v) for k, v in loss.state_dict().items()})
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, (grad, _) = loss.value_and_grad(features, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(loss.tensors(), state, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-5)
