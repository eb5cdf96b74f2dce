"""The loss of peers in groups against the losses of each group by itself."""

from __future__ import annotations

import pickle

import pytest
import torch
from fastdml_kernels.reference import mutual_loss_reference

from fastdml.grouped_loss import GroupedLoss
from fastdml.loss import MutualLoss

N, C = 24, 7
OPTIONS = [
    {},
    {"temperature": 2.0, "kl_weight": 0.5, "label_smoothing": 0.1},
    {"target": "ensemble"},
    {"target": "ensemble_logits", "temperature": 3.0},
    *({"gate": gate} for gate in ("correct", "best", "confidence", "entropy")),
    {"divergence": "reverse"},
    {"divergence": "jsd", "jsd_beta": 0.3},
    {"mimic_ignored": True, "gate": "entropy"},
    {"reduction": "none"},
    {"class_weight": torch.linspace(0.5, 2, C)},
]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(K: int, seed: int = 0, device: str = "cpu"):
    torch.manual_seed(seed)
    logits = [torch.randn(N, C).to(device) for _ in range(K)]
    labels = torch.randint(0, C, (N,)).to(device)
    labels[::5] = -100
    return logits, labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("groups", "size", "weighted"), [(3, 2, False), (2, 3, True)])
def test_each_group_has_the_bits_of_a_cohort_of_its_own(options, groups, size, weighted, device):
    logits, labels = problem(groups * size, device=device)
    weight = (torch.rand(N) * (torch.arange(N) % 4 > 0)).to(device) if weighted else None
    loss = GroupedLoss(groups, groups * size, **options).to(device)
    own = MutualLoss(**options).to(device)
    losses, stats, grads = loss.value_and_grad(logits, labels, weight)
    hits = []
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        one, found, found_grads = own.value_and_grad(logits[part], labels, weight)
        assert torch.equal(losses[part], one)
        assert all(map(torch.equal, grads[part], found_grads))
        for name in ("ce", "kl", "entropy", "correct"):
            assert torch.equal(getattr(stats, name)[part], getattr(found, name))
        assert torch.equal(stats.pairwise_kl[part, part], found.pairwise_kl)
        hits.append(found.ensemble_correct)
    assert torch.equal(stats.ensemble_correct, torch.stack(hits).mean())
    apart = ~torch.block_diag(*[torch.ones(size, size, device=device)] * groups).bool()
    assert stats.pairwise_kl[apart].isnan().all()
    assert stats.packed[stats.layout.used :].eq(0).all()


@pytest.mark.parametrize("options", [*OPTIONS[:4], {"gate": "confidence"}], ids=str)
def test_it_is_the_loss_with_weights_of_peers_that_are_0_between_groups(options):
    groups, size = 2, 3
    logits, labels = problem(groups * size)
    weights = torch.block_diag(*[torch.full((size, size), 1 / (size - 1))] * groups)
    expected, _ = mutual_loss_reference(
        logits, labels, MutualLoss(**options).options, peer_weights=weights,
        **{n: v for n, v in options.items() if n in ("temperature", "kl_weight")},
    )  # fmt: skip
    losses, _, _ = GroupedLoss(groups, groups * size, **options).value_and_grad(logits, labels)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_teachers_teach_every_group(stacked):
    groups, size, teachers = 2, 2, 1
    K = groups * size
    logits, labels = problem(K + teachers)
    for k, z in enumerate(logits):
        z.requires_grad_(k < K)
    loss, own = GroupedLoss(groups, K, teachers), MutualLoss()
    losses, stats, grads = loss.value_and_grad(logits, labels)
    assert len(losses) == len(grads) == K + teachers
    assert grads[K] is None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        one, found, found_grads = own.value_and_grad([*logits[part], *logits[K:]], labels)
        assert torch.equal(losses[part], one[:size])
        assert all(map(torch.equal, grads[part], found_grads[:size]))
        assert torch.equal(stats.pairwise_kl[K:, part], found.pairwise_kl[size:, :size])
    if stacked:  # without teachers: one tensor in, one out
        whole, loss = torch.stack([z.detach() for z in logits[:K]]), GroupedLoss(groups, K)
        losses, _, (grad,) = loss.value_and_grad(whole, labels)
        one, _, apart = loss.value_and_grad([*whole], labels)
        assert torch.equal(losses, one)
        assert torch.equal(grad, torch.stack(apart))


def test_called_as_a_module_it_has_the_gradients_of_each_group():
    logits, labels = problem(4)
    logits = [z.requires_grad_() for z in logits]
    loss = pickle.loads(pickle.dumps(GroupedLoss(2, 4, return_stats=True)))
    losses, stats = loss(logits, labels)
    losses.sum().backward()
    expected = loss.value_and_grad([z.detach() for z in logits], labels)
    assert torch.equal(losses, expected[0])
    assert stats.K == 4
    for z, grad in zip(logits, expected[2], strict=True):
        torch.testing.assert_close(z.grad, grad)


@pytest.mark.parametrize("options", [{"peer_weights": torch.ones(4, 4)}, {"students": [0]}])
def test_options_over_all_peers_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} go over all peers"):
        GroupedLoss(2, 4, **options)


def test_logits_of_other_networks_are_refused():
    logits, labels = problem(5)
    with pytest.raises(ValueError, match="logits of 5 networks: this loss is of 4 peers and 0"):
        GroupedLoss(2, 4).value_and_grad(logits, labels)
