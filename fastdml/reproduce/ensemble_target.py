"""DML_e: peers that imitate the mean of the others' probabilities, against each of the others."""

from __future__ import annotations

from collections.abc import Sequence

from fastdml.reproduce.cohorts import changes, cohort, network, training
from fastdml.reproduce.experiment import Experiment, Number, Row, Value
from fastdml.reproduce.readings import ensemble, mean_of
from fastdml.reproduce.scales import Scale

PAPER_K = 5


def rows(scale: Scale) -> Sequence[Row]:
    K = PAPER_K if PAPER_K in scale.cohort_sizes else max(scale.cohort_sizes)
    peers = cohort(scale, K)
    imitating_mean = training(
        scale,
        [scale.network] * K,
        kind="ensemble-target",
        target="ensemble",
        independent=False,
    )

    def row(
        choice: str, what: str, number: Number, dml: float | None = None, dml_e: float | None = None
    ) -> Row:
        return Row(
            choice,
            f"{K} {network(scale)}: {what}",
            Value("DML", peers, "mutual", number, dml),
            Value("DML_e", imitating_mean, "mutual", number, dml_e),
        )

    entropy = mean_of(K, "entropy", unit="nats", better="")
    return [
        row("single", "mean of single networks", mean_of(K), 56.0, 53.7),
        row("ensemble", "ensemble", ensemble()),
        row("entropy", "entropy of test predictions", entropy),
    ]


def notes(scale: Scale) -> Sequence[str]:
    return (
        "The paper's figures are mAP on Market-1501 of 5 MobileNets, read by eye from its plot.",
        "Both losses have the same gradient, since the mean over peers of KL(p_l || p_k) and "
        "KL(mean of p_l || p_k) differ by a number that p_k does not enter: from one seed they "
        "differ by rounding alone.",
    )


EXPERIMENT = Experiment(
    "ensemble-target",
    "Imitating each other peer (DML) against the mean of the others (DML_e)",
    "the comparison of DML and DML_e",
    rows,
    notes,
    changes,
)
