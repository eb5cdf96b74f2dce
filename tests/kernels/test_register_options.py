"""The register kernel's options of distillation: students, divergences, gates, weights of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from covering import Covering
from fastdml_kernels.label_counts import label_counts
from fastdml_kernels.launch import COUNT_IN_KERNEL
from fastdml_kernels.tiles import fits_registers, most_logits
from oracle import (
    DEVICE,
    IN_REGISTERS,
    Problem,
    check,
    make,
    one_row,
    reference,
    register,
    wide,
    within,
)

DIVERGENCES = ("forward", "reverse", "jeffreys", "jsd", "jsd 0.2")
SPACE = {
    "divergence": DIVERGENCES, "gate": ("none", "correct", "best", "confidence", "entropy"),
    "students": (None, "first", "others"), "sample_weight": (False, True),
    "target": ("peers", "ensemble"), "temperature": (1.0, 3.0), "label_smoothing": (0.0, 0.1),
    "mimic_ignored": (False, True), "reduction": ("mean", "sum", "none"),
    "peer_weights": (False, True), "class_weight": (False, True), "K": (2, 3, 5),
    "stats": (True, False), "path": IN_REGISTERS,
}  # fmt: skip


def held(row: dict, seed: int = 0) -> None:
    row = dict(row)
    path, stats, K = row.pop("path"), row.pop("stats"), row.pop("K")
    check(make(K, 4, 6, ignored=0.3, seed=seed, **row), path, stats=stats, max_programs=2)


def test_any_two_options_together():
    for row in Covering(SPACE).rows():
        held(row)


@pytest.mark.slow
def test_any_three_options_together():
    for seed, row in enumerate(Covering(SPACE, 3).rows()):
        held(row, seed)


@pytest.mark.parametrize(("K", "temperature", "path"), [(2, 1.0, one_row), (3, 3.0, register)])
@pytest.mark.parametrize("target", ["peers", "ensemble"])
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_identical_peers_have_no_divergence_of_any_kind(divergence, target, K, temperature, path):
    p = make(1, 2, 12, spread=5.0, divergence=divergence, target=target)
    p = replace(p, logits=list(p.logits) * K,
                weights={"temperature": temperature, "ce_weight": 0.0})  # fmt: skip
    answer = path(p)
    assert (answer.losses == 0).all()
    assert all((g == 0).all() for g in answer.grads)


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("target", ["peers", "ensemble"])
def test_a_mixture_is_finite_where_supports_differ(target, path):
    """Of two peers that share no class the divergence is the entropy of their shares."""
    p = make(2, 2, 4, divergence="jsd", target=target, ce_weight=0.0, reduction="none")
    p.labels[:] = 0
    z = [torch.tensor([[0.5, 0.5, -torch.inf, -torch.inf]]).repeat(2, 1),
         torch.tensor([[-torch.inf, -torch.inf, 1.0, 1.0]]).repeat(2, 1)]  # fmt: skip
    answer = path(replace(p, logits=z))
    torch.testing.assert_close(answer.losses.cpu(), torch.full((2, 2), 2.0).log())
    assert all(g.isfinite().all() for g in answer.grads)


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize(("divergence", "who"), [("reverse", 1), ("jeffreys", 0), ("jeffreys", 1)])
def test_a_class_ruled_out_costs_infinity_where_the_definition_says_so(divergence, who, path):
    """ "reverse": a teacher that rules out what its student does not."""
    p = make(2, 3, 5, divergence=divergence, reduction="none")
    p.labels[:] = 0
    p.logits[who][1, 3] = -torch.inf
    exact = reference(p, grad=False).losses
    assert exact[:, 1].isinf().any()
    within("losses", path(p, stats=False).losses, exact, None, torch.tensor(2e-5))


@pytest.mark.parametrize("path", IN_REGISTERS)
def test_teachers_that_hardly_believe_the_label_are_weighed_against_each_other(path):
    """Probabilities below 1e-38 are 0 in float32; their ratio is not lost."""
    p = make(3, 2, 4, gate="confidence", reduction="none", spread=1.0)
    p.labels[:] = 0
    for k, low in ((1, -120.0), (2, -121.0)):
        p.logits[k][:, 0] = low
    check(p, path)
    for z in p.logits:  # nobody is left
        z[:, 0] = -torch.inf
    answer = path(replace(p, weights={"ce_weight": 0.0}), stats=False)
    assert (answer.losses == 0).all()
    assert all((g == 0).all() for g in answer.grads)


@pytest.mark.parametrize("path", [*IN_REGISTERS, wide])
@pytest.mark.parametrize(
    ("gate", "divergence"),
    [("confidence", "forward"), ("entropy", "reverse"), ("confidence", "jeffreys"),
     ("entropy", "jsd"), ("confidence", "jsd 0.2")],
)  # fmt: skip
def test_a_peer_that_is_nan_teaches_nobody_behind_a_soft_gate(gate, divergence, path):
    p = make(3, 4, 5, gate=gate, divergence=divergence, reduction="none")
    p.logits[1][:] = torch.nan
    answer = path(p, stats=False)
    others = replace(p, logits=[p.logits[0], p.logits[2]])
    want = path(others, stats=False)
    torch.testing.assert_close(answer.losses[[0, 2]], want.losses)
    torch.testing.assert_close([answer.grads[0], answer.grads[2]], list(want.grads))


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("options", [{}, {"mimic_ignored": True}, {"divergence": "jsd"}], ids=str)
def test_a_row_of_weight_0_is_absent_whatever_is_in_it(options, path):
    p = make(3, 5, 6, **options)
    p.labels[3] = 77  # no class
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5])
    p.weights["sample_weight"] = weights
    for z in p.logits:
        z[1], z[3] = torch.nan, torch.inf
    kept = weights.nonzero()[:, 0]
    part = Problem([z[kept] for z in p.logits], p.labels[kept], p.options,
                   {"sample_weight": weights[kept]})  # fmt: skip
    answer, want = path(p), path(part)
    torch.testing.assert_close(answer.losses, want.losses)
    for got, alone in zip(answer.grads, want.grads, strict=True):
        torch.testing.assert_close(got[kept.to(got.device)], alone)
        assert (got[[1, 3]] == 0).all()
    for name, value in answer.stats.items():
        torch.testing.assert_close(value, want.stats[name], msg=name)


def test_rows_of_equal_weight_are_rows_without():
    p = make(2, 6, 5, ignored=0.3)
    even = replace(p, weights={"sample_weight": torch.full((6,), 3.0)})
    torch.testing.assert_close(register(even, stats=False).losses, register(p, stats=False).losses)


@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("mimic_ignored", [False, True])
def test_long_batches_count_their_rows_weights_beforehand(class_weight, mimic_ignored):
    p = make(2, COUNT_IN_KERNEL + 3, 3, ignored=0.3, class_weight=class_weight,
             sample_weight=True, mimic_ignored=mimic_ignored)  # fmt: skip
    check(p, register)
    labels, weight = p.labels.to(DEVICE), p.weights["sample_weight"].to(DEVICE)
    per_class = p.weights["class_weight"].to(DEVICE) if class_weight else torch.ones(3).to(DEVICE)
    found = label_counts(labels, per_class if class_weight else None, weight, -100, 3)
    has = labels != -100
    want = [(weight * per_class[labels.clamp(min=0)])[has].sum(), weight[has].sum(), weight.sum()]
    torch.testing.assert_close(found, torch.stack(want), rtol=1e-5, atol=0)


def test_half_precision_and_gradients_of_some():
    check(make(3, 5, 9, dtype=torch.bfloat16, students=(1,), divergence="reverse"), one_row)


def test_mixtures_of_many_pairs_go_wide():
    jsd = make(2, 1, 2, divergence="jsd").options
    half = most_logits() // 2
    assert fits_registers(2, half, jsd, None)
    assert fits_registers(4, 1000, jsd, None)
    assert not fits_registers(4, 2000, jsd, None)
    assert not fits_registers(5, 10, jsd, None)
    assert fits_registers(8, 1000, replace(jsd, divergence="reverse"), None)
