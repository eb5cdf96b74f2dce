"""A batch in parts gives the whole batch's gradients, losses and statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.loss import MutualLoss

C, N, IGNORED = 5, 12, -100


def peers_of(K: int) -> list[nn.Module]:
    peers = []
    for k in range(K):
        torch.manual_seed(k)
        peers.append(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double())
    return peers


def batch(labelled) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(C, (N,), generator=generator)
    return x, torch.where(torch.tensor(labelled), y, IGNORED)


def one_step(parts, labelled, K=2, execution="eager", **options):
    """Losses, statistics, and how far each weight went."""
    cohort = Cohort(peers_of(K), C)
    before = [w.detach().clone() for w in cohort.parameters()]
    optimizer = make_optimizer(cohort, lr=1.0, momentum=0.0)
    step = make_step(cohort, MutualLoss(**options), optimizer, amp="off", accumulate=parts,
                     execution=execution)  # fmt: skip
    output = step(*batch(labelled))
    moved = [b - w.detach() for w, b in zip(cohort.parameters(), before, strict=True)]
    return [output.losses, *output.stats, *moved]


ROWS = {
    "all": [True] * N,
    "half of them": [False] * 6 + [True] * 6,
    "two": [False] * 3 + [True] + [False] * 7 + [True],
    "none": [False] * N,
    "all but one": [True] * 11 + [False],
}
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 3.0, "kl_weight": 0.5, "ce_weight": 2.0},
    "label smoothing": {"label_smoothing": 0.2},
    "class weights": {"class_weight": WEIGHT},
    "smoothed class weights": {"class_weight": WEIGHT, "label_smoothing": 0.3},
    "mimic": {"mimic_ignored": True},
    "mimic with class weights": {"mimic_ignored": True, "class_weight": WEIGHT, "temperature": 2.0},
    "best teacher": {"gate": "best"},
    "tensors": {"kl_weight": torch.tensor(0.5), "ce_weight": torch.tensor(0.25)},
    "without CE": {"ce_weight": 0.0, "mimic_ignored": True},
    "sum": {"reduction": "sum"},
    "a loss a row": {"reduction": "none"},
}


@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", OPTIONS)
def test_parts_are_the_whole_batch(options, rows, parts):
    expected = one_step(1, ROWS[rows], **OPTIONS[options])
    found = one_step(parts, ROWS[rows], **OPTIONS[options])
    if options == "smoothed class weights":  # see `GlobalMeans`
        del found[1], expected[1]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.booleans(), min_size=N, max_size=N),
    parts=st.sampled_from([2, 4, 6]),
    K=st.integers(1, 3),
    mimic=st.booleans(),
    weights=st.booleans(),
)
def test_any_rows_may_lack_a_label(rows, parts, K, mimic, weights):
    options = {"mimic_ignored": mimic, "class_weight": WEIGHT if weights else None}
    expected, found = (one_step(n, rows, K, **options) for n in (1, parts))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("execution", ["eager", "threads", "stacked"])
@pytest.mark.parametrize("rows", ["half of them", "two"])
def test_every_execution_against_plain_torch(execution, rows):
    ours = one_step(4, ROWS[rows], execution=execution)
    peers = peers_of(2)
    x, y = batch(ROWS[rows])
    logits = [p(x) for p in peers]
    losses = []
    for k in range(2):
        own, other = (logits[j][y != IGNORED] for j in (k, 1 - k))
        kl = F.kl_div(own.log_softmax(1), other.detach().softmax(1), reduction="batchmean")
        losses.append(F.cross_entropy(logits[k], y, ignore_index=IGNORED) + kl)
    sum(losses).backward()
    torch.testing.assert_close(ours[0], torch.stack(losses).detach(), rtol=1e-10, atol=1e-12)
    grads = [w.grad for p in peers for w in p.parameters()]
    for moved, grad in zip(ours[-len(grads) :], grads, strict=True):
        torch.testing.assert_close(moved, grad, rtol=1e-6, atol=1e-8)


def test_of_powers_of_two_the_bits_stay():
    """Where all rows have a label, scaling by a power of two rounds nothing."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randint(C, (32,))
    grads = []
    for whole in (True, False):
        cohort = Cohort([p.float() for p in peers_of(2)], C)
        if whole:
            optimizer = make_optimizer(cohort, lr=1.0, momentum=0.0)
            step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager",
                             accumulate=4)  # fmt: skip
            before = [w.detach().clone() for w in cohort.parameters()]
            step(x, y)
            grads.append([b - w for w, b in zip(cohort.parameters(), before, strict=True)])
        else:
            for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
                outputs = [p(a) for p in cohort.peers]
                _, _, found = MutualLoss().value_and_grad([z.detach() for z in outputs], b)
                torch.autograd.backward(outputs, [g / 4 for g in found])
            before = [w.detach().clone() for w in cohort.parameters()]
            torch.optim.SGD(cohort.parameters(), 1.0).step()
            grads.append([b - w for w, b in zip(cohort.parameters(), before, strict=True)])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
