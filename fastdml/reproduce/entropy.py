"""How sure peers are of training images: the posterior's entropy, and its largest probability."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastdml.reproduce.cohorts import changes, cohort, independent_pair, network
from fastdml.reproduce.experiment import Experiment, Row, Value
from fastdml.reproduce.readings import posterior
from fastdml.reproduce.scales import Scale


def rows(scale: Scale) -> Sequence[Row]:
    pair, alone = cohort(scale, 2), independent_pair(scale)
    found = []
    for choice, label, number, paper in (
        ("entropy", "mean entropy", posterior("entropy", 2), (0.2602, 1.7099)),
        ("posterior", "mean largest probability", posterior("top1", 2), (96.0, 70.0)),
    ):
        found.append(
            Row(
                choice,
                f"2 {network(scale)}: {label}",
                Value("independent", alone, "independent", number, paper[0]),
                Value("mutual", pair, "mutual", number, paper[1]),
            )
        )
    return found


def notes(scale: Scale) -> Sequence[str]:
    return (
        "Of the training images, as stored, by the weights after the last epoch; mean over both "
        "peers. The paper's are of ResNet-32 on CIFAR-100.",
    )


EXPERIMENT = Experiment(
    "entropy",
    "Entropy of predictions of training images",
    "the discussion of why it works",
    rows,
    notes,
    partial(changes, theirs="resnet32"),
)
