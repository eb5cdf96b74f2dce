"""Table 4: one-way distillation from a trained, frozen network, against mutual learning with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdml.reproduce import market
from fastdml.reproduce.cohorts import LABELS, changes, cohort, independent_pair, network, training
from fastdml.reproduce.experiment import Experiment, PeerOf, Row, Training, Value
from fastdml.reproduce.readings import peer
from fastdml.reproduce.scales import Scale

STUDENT = "resnet32"
ALONE = 68.99
CIFAR = {"wrn_28_10": (69.48, 70.73), "mobilenet": (69.12, 71.10)}  # one-way, mutual
MARKET = {"googlenet": (49.11, 52.87), "mobilenet": (45.16, 51.26)}  # mAP, from scratch


def pair_rows(
    choice: str,
    text: str,
    score: str,
    distilled: Training,
    mutual: tuple[Training, int],
    independent: tuple[Training, int],
    paper: tuple[float | None, float | None, float | None] = (None, None, None),
) -> list[Row]:
    """The student trained alone, one-way and mutually: of the last two a training, and its place in
    it. paper: of the three in this order."""
    own, k = independent
    alone = Value("independent", own, "independent", peer(k, score), paper[0])
    one_way = Value("one-way", distilled, "mutual", peer(0, score), paper[1])
    return [
        Row(
            choice,
            f"{text}, against one-way",
            one_way,
            Value("mutual", mutual[0], "mutual", peer(mutual[1], score), paper[2]),
        ),
        Row(
            choice,
            f"{text}, one-way against alone",
            alone,
            one_way,
        ),
    ]


def rows(scale: Scale) -> Sequence[Row]:
    return paper_rows(scale) if scale.name == "full" else small_rows(scale)


def small_rows(scale: Scale) -> Sequence[Row]:
    """One kind of network: its teacher is the second peer of those trained alone."""
    alone = independent_pair(scale)
    distilled = training(
        scale, [scale.network], kind="distilled", teachers=(PeerOf(alone, "independent", 1),)
    )
    text = f"{network(scale)} taught by {network(scale)}"
    return pair_rows("same", text, "top1", distilled, (cohort(scale, 2), 0), (alone, 0))


def paper_rows(scale: Scale) -> Sequence[Row]:
    found = []
    for teacher, (one_way, mutual) in CIFAR.items():
        text = f"CIFAR-100, {LABELS[STUDENT]} taught by {LABELS[teacher]}"
        paper = (ALONE, one_way, mutual)
        choice = f"{teacher}+{STUDENT}"
        found += taught_rows(scale, training, (teacher, STUDENT), choice, text, "top1", paper)
    for teacher, (one_way, mutual) in MARKET.items():
        text = f"Market-1501, mAP, MobileNet taught by {LABELS[teacher]}"
        of_market = (None, one_way, mutual)
        pair = (teacher, "mobilenet")
        choice = f"market-{teacher}+mobilenet"
        found += taught_rows(scale, market.training, pair, choice, text, "mAP", of_market)
    return found


def taught_rows(
    scale: Scale,
    training: Callable[..., Training],
    pair: tuple[str, str],
    choice: str,
    text: str,
    score: str,
    paper: tuple[float | None, float | None, float | None],
) -> list[Row]:
    """The teacher is the first peer of the pair, trained alone; the student is the second.
    training: makes one of the data set."""
    teacher, student = pair
    both = training(scale, list(pair), independent=True)
    distilled = training(
        scale,
        [student],
        kind=f"distilled-{teacher}",
        teachers=(PeerOf(both, "independent", 0),),
    )
    return pair_rows(choice, text, score, distilled, (both, 1), (both, 1), paper)


def notes(scale: Scale) -> Sequence[str]:
    same = (
        " The student taught one-way begins with other weights than it has as the second of a pair."
        if scale.name == "full"
        else " Here both are of one kind, as in the paper's last row."
    )
    return (
        "One-way: cross-entropy and the KL term from a network that was trained alone with the "
        f"same seed, and is frozen.{same}",
    )


EXPERIMENT = Experiment(
    "distillation",
    "One-way distillation from a trained network, against mutual learning",
    "Table 4",
    rows,
    notes,
    changes,
)
