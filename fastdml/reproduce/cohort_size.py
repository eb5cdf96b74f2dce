"""More peers: single networks and ensembles of cohorts of 1 to 8."""

from __future__ import annotations

from collections.abc import Sequence

from fastdml.reproduce.cohorts import changes, cohort, largest, network
from fastdml.reproduce.experiment import Experiment, Number, Phase, Row, Value
from fastdml.reproduce.readings import ensemble, ensemble_of, mean_of
from fastdml.reproduce.scales import Scale

# mAP on Market-1501 of so many MobileNets from scratch, read by eye from the figure.
MUTUAL = {1: 46.0, 2: 52.1, 3: 55.0, 4: 55.7, 5: 56.0}
INDEPENDENT = 46.4
MUTUAL_ENSEMBLE = {2: 57.0, 3: 58.4, 4: 60.6, 5: 61.7}
INDEPENDENT_ENSEMBLE = {2: 50.4, 3: 54.8, 4: 55.9, 5: 56.4}


def rows(scale: Scale) -> Sequence[Row]:
    most = max(scale.cohort_sizes)
    alone = largest(scale)

    def row(K: int, series: str, numbers: tuple[Number, Number], paper: tuple) -> Row:
        # One network learns from nobody: the first of those that were trained alone.
        ours = alone if K == 1 else cohort(scale, K)
        phase: Phase = "independent" if K == 1 else "mutual"
        what = "mean of single networks" if series == "single" else "ensemble"
        return Row(
            f"k{K}",
            f"{K} {network(scale)}: {what}" if K > 1 else f"1 {network(scale)}",
            Value("independent", alone, "independent", numbers[0], paper[0]),
            Value("mutual", ours, phase, numbers[1], paper[1]),
            series,
            K,
        )

    found = []
    for K in scale.cohort_sizes:
        paper = (INDEPENDENT if K in MUTUAL else None, MUTUAL.get(K))
        found.append(row(K, "single", (mean_of(K), mean_of(K)), paper))
    for K in scale.cohort_sizes:
        if K > 1:
            paper = (INDEPENDENT_ENSEMBLE.get(K), MUTUAL_ENSEMBLE.get(K))
            baseline = ensemble() if most == K else ensemble_of(K)
            found.append(row(K, "ensemble", (baseline, ensemble()), paper))
    return found


def notes(scale: Scale) -> Sequence[str]:
    return (
        "The paper's figures are mAP on Market-1501 of MobileNets from scratch, read by eye from "
        f"its plot; ours are top-1 of {network(scale)}, so that the columns show the same trend "
        "at best. Ensembles are the mean of probabilities; the paper's concatenate features.",
        "Independent: the first K of the largest cohort's networks, each trained alone; one "
        "network learns from nobody, so that its two columns are one training.",
    )


EXPERIMENT = Experiment(
    "cohort-size",
    "Accuracy by the number of peers",
    "the figure of cohort sizes",
    rows,
    notes,
    changes,
)
