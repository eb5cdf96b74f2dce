"""The table of conventions in docs/loss.md: the losses and gradients of other code, written here
from its definitions, and the options that give them.

`theirs` takes the logits of the students, then those of the teachers, whose gradients are not
wanted, and gives a loss for each student. Temperature and weights are none of the usual ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdml import mutual_loss

PAGE = Path(__file__).resolve().parents[1] / "docs" / "loss.md"
N, C = 7, 11
T = 3.0
EXACT = 1e-10  # of float64
Theirs = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction="batchmean"):
    """KL(teacher || student) at a temperature, as kl_div reduces it."""
    return F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.softmax(teacher / temperature, dim=1),
        reduction=reduction,
    )


def others(logits: Sequence[Tensor], k: int) -> list[Tensor]:
    return [z for i, z in enumerate(logits) if i != k]


# ---- mutual learning


def pytorch_dml(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """DMLLoss(temperature, supervised_weight, mimicry_weight) of each peer."""
    return [
        0.7 * F.cross_entropy(z, labels)
        + 0.4 * sum(kl(z, t.detach(), T) * T**2 for t in others(logits, k)) / (len(logits) - 1)
        for k, z in enumerate(logits)
    ]


def chxy95(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    return [
        F.cross_entropy(z, labels)
        + sum(kl(z, t.detach()) for t in others(logits, k)) / (len(logits) - 1)
        for k, z in enumerate(logits)
    ]


EDGES = torch.tensor([[0.0, 0.5, 0.0], [1.0, 0.0, 2.0], [0.3, 0.0, 0.0]], dtype=torch.float64)


def yukiharada1228(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """Graph(nodes, edges): a weight for each edge, over the number of edges that lead to a node."""
    losses = []
    for k, z in enumerate(logits):
        edges = [(w, logits[i].detach()) for i, w in enumerate(EDGES[k]) if w]
        distilled = sum(w * kl(z, teacher, T) * T**2 / len(edges) for w, teacher in edges)
        losses.append(F.cross_entropy(z, labels) + distilled)
    return losses


def torchreid(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """ImageDMLEngine without its triplet loss: a smoothed label, and for the divergence the
    cross-entropy of teacher and student, by probabilities that 1e-8 is added to."""
    target = 0.9 * F.one_hot(labels, C) + 0.1 / C
    losses = []
    for z, teacher in zip(logits, reversed(logits), strict=True):
        smoothed = -(target * z.log_softmax(dim=1)).mean(0).sum()
        teacher = teacher.detach().softmax(dim=1)
        mutual = -(teacher * torch.log(z.softmax(dim=1) + 1e-8)).sum(1).mean()
        losses.append(smoothed + 2.0 * mutual)
    return losses


def okddip_kl(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """KL_Loss: its teacher is not a constant, and 1e-7 is added to its probabilities."""
    log_q = F.log_softmax(student / T, dim=1)
    return T**2 * F.kl_div(log_q, F.softmax(teacher / T, dim=1) + eps, reduction="batchmean")


def okddip(
    logits: Sequence[Tensor], labels: Tensor, pairs: bool = False, eps: float = 0.0
) -> list[Tensor]:
    """train_DML.py: the mean of the others' logits, or with --type each of them."""
    losses = []
    for k, z in enumerate(logits):
        rest = others(logits, k)
        teachers = rest if pairs else [torch.stack(rest).mean(0)]
        mimicry = sum(okddip_kl(z, t, eps) for t in teachers) / len(teachers)
        losses.append(F.cross_entropy(z, labels) + mimicry)
    return losses


# ---- distillation


def torchdistill(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """KDLoss(temperature, alpha, beta=None)."""
    student, teacher = logits
    alpha = 0.3
    hard = F.cross_entropy(student, labels)
    return [alpha * hard + (1 - alpha) * T**2 * kl(student, teacher, T)]


def torchdistill_soft(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """KDLoss(temperature, alpha=0): the divergence alone, without its weight and without T**2."""
    return [kl(*logits, T)]


def torchdistill_mean(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """KDLoss(temperature, alpha, beta, reduction="mean"): a mean over rows and classes."""
    student, teacher = logits
    soft = T**2 * kl(student, teacher, T, "none").mean()
    return [0.3 * F.cross_entropy(student, labels) + 0.9 * soft]


def mdistiller(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """KD with CE_WEIGHT and KD_WEIGHT."""
    student, teacher = logits
    rows = kl(student, teacher, T, "none").sum(1)
    return [0.1 * F.cross_entropy(student, labels) + 0.9 * rows.mean() * T**2]


def ae_kd(logits: Sequence[Tensor], labels: Tensor, scale: Sequence[float]) -> list[Tensor]:
    """--ensemble_method AVERAGE_LOSS or AEKD, with gamma and alpha; the latter finds `scale` by a
    support vector machine on the gradients of the teachers' losses."""
    student, *teachers = logits
    div = sum(s * kl(student, t, T) * T**2 for s, t in zip(scale, teachers, strict=True))
    return [0.4 * F.cross_entropy(student, labels) + 0.6 * div]


def ae_kd_mean(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """DistillKL with a list of teachers: the mean of their probabilities."""
    student, *teachers = logits
    p = torch.stack([F.softmax(t / T, dim=1) for t in teachers]).mean(0)
    div = F.kl_div(F.log_softmax(student / T, dim=1), p, reduction="sum") * T**2 / len(student)
    return [0.4 * F.cross_entropy(student, labels) + 0.6 * div]


def okddip_kd(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """kd_loss_fn: the divergence times T, and the student softened in the cross-entropy too."""
    student, teacher = logits
    log_q = F.log_softmax(student / T, dim=1)
    soft = F.kl_div(log_q, F.softmax(teacher / T, dim=1), reduction="batchmean") * T
    return [0.7 * soft + 0.3 * F.cross_entropy(log_q, labels)]


def timm(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """LogitDistillationTask(task_loss_weight=0.3), whose other weight is what is left of 1."""
    student, teacher = logits
    return [0.3 * F.cross_entropy(student, labels) + 0.7 * kl(student, teacher, T) * T**2]


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Rows (N,): beta KL(teacher || m) + (1 - beta) KL(student || m), m their mixture; its limits
    are defined to be the two directions of the divergence."""
    q, t = (F.softmax(z / T, dim=1) for z in (student, teacher))
    if beta in (0, 1):
        return (t * (t / q).log() if beta == 0 else q * (q / t).log()).sum(1)
    m = beta * t + (1 - beta) * q
    return (beta * t * (t / m).log() + (1 - beta) * q * (q / m).log()).sum(1)


def liger(logits: Sequence[Tensor], labels: Tensor, beta: float) -> list[Tensor]:
    """LigerFusedLinearJSDLoss(weight_hard_loss, weight_soft_loss, beta, temperature) after its
    linear layers: means over the rows that have a label."""
    student, teacher = logits
    valid = labels != -100
    soft = generalised_jsd(student, teacher, beta)[valid].sum() / valid.sum()
    return [0.3 * F.cross_entropy(student, labels) + 0.7 * soft]


def liger_kl(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """LigerFusedLinearKLDivLoss(temperature): of the student alone; the target is probabilities."""
    student, teacher = logits
    log_q = F.log_softmax(student / T, dim=1)
    return [F.kl_div(log_q, F.softmax(teacher, dim=1), reduction="batchmean")]


def trl(logits: Sequence[Tensor], labels: Tensor, beta: float) -> list[Tensor]:
    """generalized_jsd_loss(student, teacher, labels, beta, temperature)."""
    valid = labels != -100
    return [generalised_jsd(*logits, beta)[valid].sum() / valid.sum()]


def mean_of_elements(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """KLDivLoss() as it comes: a mean over rows and classes."""
    return [
        F.cross_entropy(z, labels) + kl(z, other.detach(), reduction="none").mean()
        for z, other in zip(logits, reversed(logits), strict=True)
    ]


class Convention(NamedTuple):
    row: str  # the first cell of its row in the table
    theirs: Theirs
    students: int
    teachers: int  # beside the students
    unlabelled: bool  # whether some rows have the label -100
    rewrite: Callable[[Sequence[Tensor]], Sequence[Tensor]]  # what ours is given
    options: dict[str, Any]


def convention(
    row: str, theirs: Theirs, students: int = 1, teachers: int = 1, *,
    unlabelled: bool = False, rewrite: Callable = list, **options: Any,
) -> Convention:  # fmt: skip
    return Convention(row, theirs, students, teachers, unlabelled, rewrite, options)


def of_one(teachers: Sequence[float]) -> Tensor:
    """The weights of the teachers of peer 0, the only one that learns."""
    weights = torch.zeros(len(teachers) + 1, len(teachers) + 1, dtype=torch.float64)
    weights[0, 1:] = torch.tensor(teachers, dtype=torch.float64)
    return weights


SVM = (0.7, 0.1, 0.2)
BETAS = (0, 0.3, 0.5, 1)
CONVENTIONS = {
    "pytorch-dml": convention(
        "pytorch-dml", pytorch_dml, 3, 0, temperature=T, ce_weight=0.7, kl_weight=0.4
    ),
    "chxy95": convention("chxy95", chxy95, 4, 0),
    "yukiharada1228": convention(
        "yukiharada1228", yukiharada1228, 3, 0,
        temperature=T, peer_weights=EDGES / (EDGES > 0).sum(1, keepdim=True),
    ),
    "kl_div-mean": convention(
        'kl_div(reduction="mean")', mean_of_elements, 2, 0, kl_weight=1 / C
    ),
    "okddip": convention(
        "OKDDip", okddip, 3, 0, temperature=T, target="ensemble_logits", detach_targets=False
    ),
    "okddip-pairs": convention(
        "OKDDip", partial(okddip, pairs=True), 3, 0, temperature=T, detach_targets=False
    ),
    "okddip-kd": convention(
        "OKDDip", okddip_kd, ce_weight=0.3, kl_weight=0.7 * T,
        rewrite=lambda logits: [z / T for z in logits],
    ),
    "torchdistill": convention(
        "torchdistill", torchdistill, temperature=T, ce_weight=0.3, kl_weight=0.7
    ),
    "torchdistill-soft": convention(
        "torchdistill", torchdistill_soft, temperature=T, ce_weight=0.0, kl_weight=1 / T**2
    ),
    "torchdistill-mean": convention(
        "torchdistill", torchdistill_mean, temperature=T, ce_weight=0.3, kl_weight=0.9 / C
    ),
    "mdistiller": convention(
        "mdistiller", mdistiller, temperature=T, ce_weight=0.1, kl_weight=0.9
    ),
    "timm": convention("timm", timm, temperature=T, ce_weight=0.3, kl_weight=0.7),
    "ae-kd": convention(
        "AE-KD", partial(ae_kd, scale=(1 / 3,) * 3), 1, 3,
        temperature=T, ce_weight=0.4, kl_weight=0.6,
    ),
    "ae-kd-svm": convention(
        "AE-KD", partial(ae_kd, scale=SVM), 1, 3,
        temperature=T, ce_weight=0.4, kl_weight=0.6, peer_weights=of_one(SVM),
    ),
    "ae-kd-mean": convention(
        "AE-KD", ae_kd_mean, 1, 3, temperature=T, ce_weight=0.4, kl_weight=0.6, target="ensemble"
    ),
    "liger-kl": convention(
        "Liger", liger_kl, temperature=T, ce_weight=0.0, kl_weight=1 / T**2,
        rewrite=lambda logits: [logits[0], T * logits[1].log_softmax(dim=1)],
    ),
    **{
        f"liger-{beta}": convention(
            "Liger", partial(liger, beta=beta), unlabelled=True,
            temperature=T, ce_weight=0.3, kl_weight=0.7 / T**2, divergence="jsd", jsd_beta=beta,
        )
        for beta in BETAS
    },
    **{
        f"trl-{beta}": convention(
            "TRL", partial(trl, beta=beta), unlabelled=True,
            temperature=T, ce_weight=0.0, kl_weight=1 / T**2, divergence="jsd", jsd_beta=beta,
        )
        for beta in BETAS
    },
}  # fmt: skip


def inputs(students: int, teachers: int, unlabelled: bool = False) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = [
        2 * torch.randn(N, C, generator=generator, dtype=torch.float64)
        for _ in range(students + teachers)
    ]
    for z in logits[:students]:
        z.requires_grad_()
    labels = torch.randint(C, (N,), generator=generator)
    if unlabelled:
        labels[[1, 4]] = -100
    return logits, labels


def with_gradients(losses: Any, logits: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    losses = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
    wanted = [z for z in logits if z.requires_grad]
    return losses.detach(), list(torch.autograd.grad(losses.sum(), wanted))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_losses_and_gradients_are_theirs(name):
    row = CONVENTIONS[name]
    logits, labels = inputs(row.students, row.teachers, row.unlabelled)
    theirs = with_gradients(row.theirs(logits, labels), logits)
    ours = mutual_loss(row.rewrite(logits), labels, **row.options)[: row.students]
    torch.testing.assert_close(with_gradients(ours, logits), theirs, rtol=EXACT, atol=EXACT)


def test_every_row_of_the_table_is_tested():
    section = PAGE.read_text().partition("\n## Coming from other code\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)[1:]  # the heading
    names = {re.sub(r"[`\[\]]|\(http[^)]*\)", "", row) for row in rows}
    assert names == {row.row for row in CONVENTIONS.values()} | {"torchreid"}


# ---- what differs, and by how much


def test_torchreid_tells_a_cross_entropy_which_is_larger_by_the_teachers_entropy():
    logits, labels = inputs(2, 0)
    theirs, their_gradients = with_gradients(torchreid(logits, labels), logits)
    losses, stats = mutual_loss(
        logits, labels, label_smoothing=0.1, kl_weight=2.0, return_stats=True
    )
    ours, our_gradients = with_gradients(losses, logits)
    entropies = stats.entropy.flip(0)  # of the peer that teaches
    torch.testing.assert_close(ours + 2.0 * entropies, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-5, atol=1e-5)  # of the 1e-8


def test_what_okddip_adds_to_its_teachers_is_small():
    logits, labels = inputs(3, 0)
    with_eps, without = (
        with_gradients(okddip(logits, labels, eps=eps), logits) for eps in (1e-7, 0.0)
    )
    torch.testing.assert_close(with_eps, without, rtol=1e-4, atol=1e-4)
    assert not torch.equal(with_eps[0], without[0])


def test_constant_teachers_have_another_gradient_than_okddips():
    logits, labels = inputs(3, 0)
    options = CONVENTIONS["okddip"].options
    theirs = with_gradients(okddip(logits, labels), logits)
    ours = with_gradients(mutual_loss(logits, labels, **options | {"detach_targets": True}), logits)
    torch.testing.assert_close(ours[0], theirs[0])
    assert not torch.allclose(ours[1][0], theirs[1][0], rtol=0.01)


def test_the_correct_gate_of_yukiharada1228_is_a_mean_over_the_rows_that_pass():
    """Ours is over all rows: a teacher that is often wrong teaches less."""
    logits, labels = inputs(1, 1)
    student, teacher = logits
    labels[:4] = teacher[:4].argmax(dim=1)
    right = (teacher.argmax(dim=1) == labels).double()
    assert 0 < right.sum() < N
    theirs = [
        F.cross_entropy(student, labels)
        + (kl(student, teacher, reduction="none").sum(1) * right).sum() / (right.sum() + 1e-8)
    ]
    share = right.mean().item()
    ours = mutual_loss(logits, labels, gate="correct", kl_weight=1 / share)[:1]
    torch.testing.assert_close(
        with_gradients(ours, logits), with_gradients(theirs, logits), rtol=1e-7, atol=1e-8
    )
