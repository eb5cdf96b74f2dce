"""Market-1501: two MobileNets, with and without ImageNet's weights, by the paper's recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdml.errors import InputError
from fastdml.files import safe_name
from fastdml.reproduce.cohorts import peers_text
from fastdml.reproduce.experiment import Experiment, Number, PeerOf, Phase, Row, Training, Value
from fastdml.reproduce.readings import mean_of
from fastdml.reproduce.scales import REPEATABLE, Scale
from fastdml.reproduce.trainings import Finished

PRETRAINED = "timm:mobilenetv1_100"
# mAP and rank-1 of mutual peers that begin with ImageNet's weights, single and multi query.
SINGLE, MULTI = (68.83, 87.73), (77.14, 91.66)
INDEPENDENT_RANK1 = 83.94
SCRATCH = (46.4, 52.1)  # mAP, independent and mutual, by eye
# Of the pictures of CIFAR-100 in Market-1501's layout, where the scale is not full.
STAND_IN = {"medium": 20, "small": 5, "smoke": 1}  # epochs


def training(
    scale: Scale,
    peers: Sequence[str],
    *,
    kind: str = "",
    teachers: tuple[PeerOf, ...] = (),
    **settings: Any,
) -> Training:
    """Peers on Market-1501, or on its stand-in. settings: over the paper's recipe."""
    data, own = "market1501", {}
    if scale.name in STAND_IN:
        data = "market1501-standin"
        own = {"standin": True, "recipe": "paper", "epochs": STAND_IN[scale.name]}
        own |= {name: scale.settings[name] for name in REPEATABLE if name in scale.settings}
    name = safe_name("-".join(filter(None, [data, peers_text(peers), kind])))
    return Training(
        name, {"data": "market1501", "peers": tuple(peers), **settings, **own}, teachers
    )


def rows(scale: Scale) -> Sequence[Row]:
    if scale.name == "full":
        return full_rows(scale)
    if scale.name not in STAND_IN:
        raise InputError(
            f"market has no scale {scale.name}: its peers tell identities apart by pictures; give "
            f"--scale {' or '.join([*STAND_IN, 'full'])}"
        )
    stand_in = training(scale, ["resnet20"] * 2, independent=True)
    return [
        row("scratch", "stand-in, 2 ResNet-20: mAP", stand_in, mean_of(2, "mAP")),
        row("scratch", "stand-in, 2 ResNet-20: rank-1", stand_in, mean_of(2, "rank1")),
    ]


def full_rows(scale: Scale) -> Sequence[Row]:
    begun = training(scale, [PRETRAINED] * 2, kind="pretrained", pretrained=True, independent=True)
    fresh = training(scale, ["mobilenet"] * 2, independent=True)
    map_, rank1 = mean_of(2, "mAP"), mean_of(2, "rank1")
    return [
        row("pretrained", "pretrained: mAP", begun, map_, None, SINGLE[0]),
        row("pretrained", "pretrained: rank-1", begun, rank1, INDEPENDENT_RANK1, SINGLE[1]),
        row("pretrained", "pretrained: mAP, multi query", begun, multi("mAP"), None, MULTI[0]),
        row("pretrained", "pretrained: rank-1, multi query", begun, multi("rank1"), None, MULTI[1]),
        row("scratch", "from scratch: mAP", fresh, map_, *SCRATCH),
        row("scratch", "from scratch: rank-1", fresh, rank1),
    ]


def row(
    choice: str,
    label: str,
    peers: Training,
    number: Number,
    alone: float | None = None,
    together: float | None = None,
) -> Row:
    return Row(
        choice,
        label,
        Value("independent", peers, "independent", number, alone),
        Value("mutual", peers, "mutual", number, together),
    )


def multi(score: str) -> Number:
    """A score of queries that are means over several images, mean over both peers, in percent."""

    def read(run: Finished, phase: Phase) -> float:
        folder = run.phase_folder(phase)
        measure: Callable[[], Any] = lambda: multi_query(folder, run)  # noqa: E731
        return run.measured(
            "multi-query", phase, measure, lambda found: 100 * sum(found[score]) / len(found[score])
        )

    return Number(read)


def multi_query(folder: Path, run: Finished) -> dict[str, list[float]]:
    """mAP and rank-1, a value a peer, of a run's multiple queries. Raises InputError where the data
    set has none."""
    from fastdml.devices import choose_device
    from fastdml.train.run_weights import load_cohort, run_config
    from fastdml.train.tasks.task import task_of

    config: Any = run_config(folder).replace(root=run.root)
    chosen = choose_device(run.device)
    peers, _ = load_cohort(folder, None, chosen)
    options = {
        "no_rerank": True, "distractors": False, "ranked_lists": 0, "query_expansion": 0,
        "ties": "worst",
    }  # fmt: skip
    found = task_of(config).evaluate(peers, config, chosen, options, run=folder)
    scores = found.scores["multi"]
    if scores is None:
        raise InputError(f"{config.root} has no gt_bbox, the images of multiple queries")
    return {name: scores[name] for name in ("mAP", "rank1")}


def notes(scale: Scale) -> Sequence[str]:
    if scale.name == "full":
        return (
            "Mean of both peers. The paper's figures from scratch are read by eye from its plot. "
            "Where the paper is silent, settings are those of its authors' code.",
        )
    return (
        "Pictures of CIFAR-100 in Market-1501's layout: these figures compare with nothing else.",
    )


def changes(scale: Scale) -> Sequence[str]:
    if scale.name not in STAND_IN:
        return ()
    epochs = STAND_IN[scale.name]
    return (
        "pictures of CIFAR-100 in Market-1501's layout, 32x16 pixels",
        "ResNet-20 in place of MobileNet",
        f"{epochs} epoch{'s' * (epochs > 1)} in place of 100,000 steps",
        "learning rate and schedule of the stand-in",
    )


EXPERIMENT = Experiment(
    "market", "Re-identification on Market-1501", "Table 3", rows, notes, changes
)
