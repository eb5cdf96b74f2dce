"""Table 2: six pairs of networks on CIFAR-100, each peer against itself trained alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastdml.reproduce.cohorts import LABELS, STAND_INS, training
from fastdml.reproduce.experiment import Experiment, Row, Value
from fastdml.reproduce.readings import peer
from fastdml.reproduce.scales import Scale

# Of the two peers: independent, then mutual.
FIGURES = {
    ("resnet32", "resnet32"): ((68.99, 68.99), (71.19, 70.75)),
    ("wrn_28_10", "resnet32"): ((78.69, 68.99), (78.96, 70.73)),
    ("mobilenet", "resnet32"): ((73.65, 68.99), (76.13, 71.10)),
    ("mobilenet", "mobilenet"): ((73.65, 73.65), (76.21, 76.10)),
    ("wrn_28_10", "mobilenet"): ((78.69, 73.65), (80.28, 77.39)),
    ("wrn_28_10", "wrn_28_10"): ((78.69, 78.69), (80.28, 80.08)),
}
Figures = dict[tuple[str, str], tuple[tuple[float, float], tuple[float, float]]]


def pair_rows(scale: Scale, data: str, figures: Figures) -> list[Row]:
    """A row a peer of each pair."""
    rows = []
    for pair, (alone, together) in figures.items():
        here = [STAND_INS[name] for name in pair] if scale.data else list(pair)
        both = training(scale, here, data=data, independent=True)
        text = " + ".join(LABELS[name] for name in here)
        for k in range(2):
            rows.append(
                Row(
                    "+".join(pair),
                    f"{text}: peer {k + 1}, {LABELS[here[k]]}",
                    Value("independent", both, "independent", peer(k), alone[k]),
                    Value("mutual", both, "mutual", peer(k), together[k]),
                )
            )
    return rows


def rows(scale: Scale) -> Sequence[Row]:
    return pair_rows(scale, "cifar100", FIGURES)


def notes(scale: Scale, data: str) -> Sequence[str]:
    """Where other networks stand in the places of the paper's, whose figures are beside them."""
    if not scale.data:
        return ()
    places = "; ".join(
        f"{LABELS[theirs]}, here {LABELS[ours]}" for theirs, ours in STAND_INS.items()
    )
    return (f"The paper's figures are of its own networks on {data}: {places}.",)


EXPERIMENT = Experiment(
    "table2",
    "Top-1 accuracy of pairs of networks on CIFAR-100",
    "Table 2",
    rows,
    notes=partial(notes, data="CIFAR-100"),
)
